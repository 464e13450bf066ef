"""Small decisions that policies share: thresholds with hysteresis, known ground against slow motion, teleports."""

from __future__ import annotations

import torch

from .base import Scene

__all__ = ["MARGIN", "held", "is_revisit", "jumps"]

# How much nearer the newest latents may be before an old one no longer counts as near. Of the size of the quadrature's
# error, so that a camera that stands still is a revisit.
MARGIN = 0.02


def held(score: float, threshold: float, before: bool | None, hysteresis: float) -> bool:
    """Whether a gate is open: from ``threshold`` on, and once open down to ``threshold - hysteresis``."""
    return score >= threshold - (hysteresis if before else 0.0)


def is_revisit(scene: Scene, old: float) -> bool:
    """Whether the best old chunk overlaps the current view as much as the newest chunk does.

    The authors' gate asks only whether the old overlap is high. It is so while the camera walks slowly into new
    scenery: on "w-31, s-32" it fires from the first chunk that it looks at (0.782 against a threshold of 0.7), ten
    chunks before the camera turns back. What was seen just now is then nearer than anything old. Where the camera
    comes back, an old chunk is as near as the newest one, or nearer.
    """
    start = scene.count - scene.context.chunk_frames
    return start >= 0 and old >= scene.chunk_scores([start])[start] - MARGIN


def jumps(poses: torch.Tensor, limit: float) -> torch.Tensor:
    """Positions i such that the camera's centre moves by more than ``limit`` from pose i - 1 to pose i: int64 ``[n]``.

    poses: ``[N, 4, 4]`` rigid world-to-camera matrices, consecutive latents.
    """
    centre = -(poses[:, :3, :3].mT @ poses[:, :3, 3:]).squeeze(-1)
    return (torch.linalg.vector_norm(centre.diff(dim=0), dim=-1) > limit).nonzero().flatten() + 1

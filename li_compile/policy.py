"""What a chunk attends to and whether its denoising steps are reused, decided on the host from camera poses alone.

Pure functions: poses in, a plan out. Decisions are taken once a chunk, before its first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from li_compile.config import Config
from li_compile.errors import PoseError
from li_compile.kernels.view_overlap import view_overlap

__all__ = ["ChunkPlan", "check_poses", "plan_context"]


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """What was decided for one chunk.

    indices: positions kept in the history that was given, ascending.
    reuse: whether the steps between the first and the last take the first one's output.
    score: view overlap of the best candidate chunk, in [0, 1]; 0.0 without candidates.
    scores: first latent of each candidate chunk (a position in the history given) -> its view overlap.
    reason: one sentence that says why.
    history: latents in the history that was given.
    """

    indices: tuple[int, ...]
    reuse: bool
    score: float
    scores: dict[int, float]
    reason: str
    history: int


def plan_context(history_w2c: torch.Tensor, current_w2c: torch.Tensor, config: Config) -> ChunkPlan:
    """Choose the context of the chunk with poses ``current_w2c`` out of the latents before it.

    The released algorithm: anchor latents and the newest ``temporal_frames`` are kept. Every whole chunk between them
    is a candidate; its score is the mean over the current latents q of (S(q, j) + S(q, j + half a chunk)) / 2, with
    S the view overlap. If the best score reaches ``context.threshold``, candidates are kept best first until
    ``memory_frames`` is full, else none is. A history shorter than ``memory_frames`` is kept whole and not scored.
    Steps are reused if the best score reaches ``cache.threshold``. With ``context`` disabled the whole history is kept
    and scored all the same, for the cache.

    Args:
        history_w2c: ``[N, 4, 4]`` rigid world-to-camera matrices, one a latent, oldest first; N a multiple of
            ``context.chunk_frames``, 0 included. A tensor or anything that ``torch.as_tensor`` takes.
        current_w2c: ``[Q, 4, 4]`` likewise for the chunk to be generated; Q a positive multiple.
        config: its ``context`` and ``cache`` parts are read.

    The history may be all latents so far or what upstream's retrieval already chose from them (anchor chunk, the one
    candidate of best overlap, the newest 12 latents): the plan is the same up to the positions' numbering, as long as
    ``memory_frames - temporal_frames`` leaves room for one retrieved chunk, as all presets do. The reason: a plan uses
    the best candidate only. The candidates here are all chunks older than our temporal window, L latents; upstream's
    are those older than 12. So the best of ours either is upstream's best, which is among those given, or lies
    between the two windows, and all of that is given too. Upstream starts to choose at more than 20 latents only.

    Raises:
        PoseError: a shape, a count that fits no whole chunk, a pose that is not finite or not rigid; names the frame.

    Source: Light Interaction section 3.1 eq. 4 and eq. 5-8; released ``select_aligned_memory_frames`` and the gate in
    its pipeline.
    """
    context, chunk = config.context, config.context.chunk_frames
    history = check_poses(history_w2c, "history", multiple=chunk)
    current = check_poses(current_w2c, "current", multiple=chunk)
    count = history.shape[0]
    if current.shape[0] == 0:
        raise PoseError("the current chunk has no poses; give one world-to-camera matrix for each of its latents")

    everything = tuple(range(count))
    if count < context.memory_frames:
        reason = f"all kept: {count} latents so far, pruning starts at {context.memory_frames}"
        return ChunkPlan(everything, False, 0.0, {}, reason, count)

    oldest_recent = count - context.temporal_frames
    starts = range(context.anchor_frames, oldest_recent, chunk)
    scores = _score(history, current, starts, config)
    best = max(scores.values(), default=0.0)
    reuse = config.cache.enabled and bool(scores) and best >= config.cache.threshold

    if not context.enabled:
        return ChunkPlan(everything, reuse, best, scores, "all kept: context pruning is off", count)

    kept = {*range(context.anchor_frames), *range(oldest_recent, count)}
    if not scores:
        reason = "anchor and recent latents fill the history: no candidates"
    elif best < context.threshold:
        reason = f"retrieved chunks dropped: best view overlap {best:.3f} is below {context.threshold:g}"
    else:
        for start in sorted(scores, key=scores.__getitem__, reverse=True):  # stable: the older of two equals goes first
            if len(kept) >= context.memory_frames:
                break
            kept.update(range(start, start + chunk))
        reason = f"retrieved by view overlap, best {best:.3f} (threshold {context.threshold:g})"
    return ChunkPlan(tuple(sorted(kept)), reuse, best, scores, reason, count)


def _score(history: torch.Tensor, current: torch.Tensor, starts: Sequence[int], config: Config) -> dict[int, float]:
    if not starts:
        return {}
    first = torch.tensor(list(starts))
    looked_at = torch.cat((first, first + config.context.chunk_frames // 2))
    overlap = view_overlap(current, history[looked_at], fov=config.context.fov, radius=config.context.radius)
    per_chunk = overlap.double().view(current.shape[0], 2, -1).mean((0, 1))
    return dict(zip(starts, per_chunk.tolist(), strict=True))


def check_poses(w2c: Any, name: str, *, multiple: int = 1, first: int = 0) -> torch.Tensor:
    """Poses as float64 ``[N, 4, 4]`` on the CPU, known to be finite and rigid.

    Args:
        w2c: world-to-camera matrices; a tensor or anything that ``torch.as_tensor`` takes.
        name: what to call them in an error. first: number of the first frame, for errors.
        multiple: N must be a multiple of this.

    Raises:
        PoseError: what is wrong, in which frame, and what to do.
    """
    try:
        given = torch.as_tensor(w2c)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PoseError(f"{name} poses are {type(w2c).__name__}, not an array of [frames, 4, 4]: {error}") from None
    if given.ndim != 3 or tuple(given.shape[1:]) != (4, 4):
        raise PoseError(
            f"{name} poses have the shape {list(given.shape)}; give [frames, 4, 4] world-to-camera matrices "
            "(one sample at a time: drop the batch dimension)"
        )
    if given.shape[0] % multiple:
        raise PoseError(
            f"{given.shape[0]} {name} poses are no whole number of chunks of {multiple} latents; give a pose a latent "
            "(not one a video frame), whole chunks only, or set context.chunk_frames"
        )
    poses = given.detach().to("cpu", torch.float64)
    bad = (~poses.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise PoseError(f"{name} pose of frame {first + bad[0]} has values that are not finite; check what made it")
    # Half-precision poses are off by rounding alone: up to 2**-8 an entry in bfloat16.
    tolerance = 3e-2 if given.dtype in (torch.bfloat16, torch.float16) else 1e-3
    rotation = poses[:, :3, :3]
    skew = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    last_row = (poses[:, 3] - torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)).abs().amax(1)
    wrong = (skew > tolerance) | (last_row > tolerance) | (torch.linalg.det(rotation) < 0)
    bad = wrong.nonzero().flatten().tolist()
    if bad:
        frame = bad[0]
        if last_row[frame] > tolerance:
            what = "its last row is not (0, 0, 0, 1)"
        elif skew[frame] > tolerance:
            what = f"its rotation is off orthonormal by {float(skew[frame]):.2g}"
        else:
            what = "it mirrors"
        raise PoseError(
            f"{name} pose of frame {first + frame} is no rigid motion: {what}; give [R | t; 0 1] without scale "
            "(intrinsics are not part of it)"
        )
    return poses

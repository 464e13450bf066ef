"""What a selection policy is given, what it answers, and the plan that comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from li_compile.config import ContextConfig
from li_compile.kernels.view_overlap import view_overlap, view_visibility

__all__ = ["ChunkPlan", "Choice", "Policy", "PolicyState", "Scene"]


@dataclasses.dataclass(frozen=True)
class PolicyState:
    """All that decisions remember from one chunk to the next; None: nothing decided yet, or forgotten.

    memory: memory was retrieved for the last chunk. reuse: its steps were reused. dynamics: the smoothed change between
    finished units (D-bar of eq. 2).
    """

    memory: bool | None = None
    reuse: bool | None = None
    dynamics: float | None = None


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """What was decided for one chunk.

    indices: positions kept in the history that was given, in the order in which the model is to see them: ascending,
        but for memory slots, which may also hold one frame twice.
    reuse: whether the steps between the first and the last take the first one's output.
    score: what step reuse is gated on: view overlap of the best candidate, in [0, 1]; 0.0 without candidates. Memory
        slots: of the worst slot.
    scores: candidate (first latent of a chunk; a slot's number) -> its view overlap.
    reason: one sentence that says why.
    history: latents in the history that was given.
    window: newest latents that are kept for being new.
    coverage: share of the current view that the kept latents saw; None where the policy does not look at it.
    revisit: an old latent is as near to the current view as the newest ones are: known ground and not slow motion;
        None where the policy does not ask.
    slots: memory slots kept, for policies that fill slots; else None.
    teleported: the camera jumped just before this chunk, so that nothing is kept for being new.
    state: what the next chunk's plan is to know of this one.
    """

    indices: tuple[int, ...]
    reuse: bool
    score: float
    scores: dict[int, float]
    reason: str
    history: int
    window: int = 0
    coverage: float | None = None
    revisit: bool | None = None
    slots: tuple[int, ...] | None = None
    teleported: bool = False
    state: PolicyState = PolicyState()


@dataclasses.dataclass(frozen=True)
class Choice:
    """A policy's answer: the part of a ChunkPlan that is its own. memory: whether memory beyond anchor and window was
    kept, for hysteresis; None: it does not apply."""

    indices: tuple[int, ...]
    reason: str
    memory: bool | None = None
    score: float = 0.0
    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    coverage: float | None = None
    revisit: bool | None = None
    slots: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What there is to decide from.

    history: ``[N, 4, 4]`` float64 world-to-camera on the CPU, checked; N > 0. current: ``[Q, 4, 4]`` likewise.
    context: options. window: newest latents that are to be kept for being new, 0 ... N. state: left by the chunk before.
    depth: ``[N, h, w]`` depth maps of the history, or None.
    """

    history: torch.Tensor
    current: torch.Tensor
    context: ContextConfig
    window: int
    state: PolicyState = PolicyState()
    depth: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.history.shape[0]

    def overlap(self, frames: Iterable[int]) -> torch.Tensor:
        """View overlap ``[Q, len(frames)]`` float64 of the current latents with these history latents."""
        frames = list(frames)
        return view_overlap(self.current, self.history[frames], **self._view(frames)).double()

    def seen(self, frames: Iterable[int], samples: int) -> torch.Tensor:
        """Which points of the current views these history latents saw: bool ``[Q, len(frames), samples]``."""
        frames = list(frames)
        return view_visibility(self.current, self.history[frames], samples=samples, **self._view(frames))[0]

    def chunk_scores(self, starts: Iterable[int]) -> dict[int, float]:
        """First latent of a whole chunk -> mean over the current latents q of (S(q, j) + S(q, j + half a chunk)) / 2."""
        starts = list(starts)
        if not starts:
            return {}
        half = self.context.chunk_frames // 2
        overlap = self.overlap([*starts, *(j + half for j in starts)])
        return dict(zip(starts, overlap.view(len(overlap), 2, -1).mean((0, 1)).tolist(), strict=True))

    def _view(self, frames: list[int]) -> dict[str, Any]:
        view = self.context.view()
        if self.depth is not None:
            view["history_depth"] = self.depth[frames]
        return view


class Policy(Protocol):
    """One way of choosing a chunk's context. Stateless: what it remembers comes and goes with ``Scene.state``."""

    def choose(self, scene: Scene) -> Choice: ...

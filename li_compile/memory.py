"""What a rollout keeps of one compiled sampling loop from chunk to chunk, and what it says about the next chunk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from li_compile.config import CacheConfig


class Kept:
    """What all compiled models that a rollout runs have left for its next chunk."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop everything, as if none had run yet."""
        self._loops: weakref.WeakKeyDictionary[Any, ChunkMemory] = weakref.WeakKeyDictionary()
        self._steps: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def loop(self, owner: Any, make: Callable[[], ChunkMemory]) -> ChunkMemory:
        """What there is of a compiled loop. What there was of others is dropped, since this one comes between."""
        if owner not in self._loops:
            self._loops = weakref.WeakKeyDictionary({owner: make()})
        return self._loops[owner]

    def step(self, owner: Any, make: Callable[[], Any]) -> Any:
        """What there is of a compiled model that is called step by step."""
        if owner not in self._steps:
            self._steps[owner] = make()
        return self._steps[owner]

    def keep_steps(self, seen: Sequence[Any]) -> None:
        """Drop what there is of models that were not called in the chunk that ends."""
        for trace in self._steps.values():
            if not any(trace is s for s in seen):
                trace.forget()


class ChunkMemory:
    """The quality guard, and the outputs that the predictor "previous" reads. One a Session and compiled loop.

    A chunk is begun, and then either ended or, if anything went wrong in it, forgotten with all that was kept. Drifts are
    read when the next chunk begins, so that nothing waits for a device inside a chunk.
    """

    def __init__(self, config: CacheConfig, across: bool) -> None:
        self.config, self.across = config, across
        self.forget()

    def forget(self) -> None:
        """Drop everything: what follows is no continuation of what was."""
        self._drift: torch.Tensor | None = None
        self._waiting, self._measured, self._guarded = 0, 0.0, False
        self._outputs: list[torch.Tensor] | None = None
        self._controls: list[torch.Tensor] = []

    @property
    def guarded(self) -> bool:
        """Whether the chunk that was begun is computed because of the guard."""
        return self._guarded

    def begin(self, wanted: bool, controls: Sequence[torch.Tensor]) -> tuple[bool, str]:
        """Whether the chunk that begins reuses steps, and a reason where that is not what was wanted.

        controls: inputs that must be what they were for earlier outputs to stand in: actions, settings.
        """
        if self._drift is not None and self.config.guard is not None:
            self._measured, self._drift = float(self._drift), None
            if not self._measured <= self.config.guard:  # NaN too
                self._waiting = self.config.guard_chunks
        if self._outputs is not None and not _equal(self._controls, controls):
            self._outputs = None
        self._guarded = bool(self._waiting) and wanted
        if self._waiting:
            self._waiting -= 1
            if wanted:
                return False, f"every step computed: the last one drifted by {self._measured:.3g} (cache.guard)"
        if wanted and self.across and self._outputs is None:
            return False, "every step computed: no earlier chunk with the same actions and settings to take changes from"
        return wanted, ""

    def end(self, drift: torch.Tensor | None, outputs: Sequence[torch.Tensor], controls: Sequence[torch.Tensor]) -> None:
        """Keep what a chunk gave: its drift, and its outputs if it computed them all."""
        self._drift = drift
        if outputs:
            # Copies: the memory of what a compiled region returns may be its own (CUDA graphs), that of inputs the caller's.
            self._outputs, self._controls = ([x.detach().clone() for x in xs] for xs in (outputs, controls))

    @property
    def outputs(self) -> list[torch.Tensor]:
        """Outputs of the last chunk that was computed in full."""
        return self._outputs or []


def weighted(weights: Mapping[tuple[int, int], Any], source: Callable[[tuple[int, int]], torch.Tensor]) -> torch.Tensor:
    """A predictor's sum of outputs, at least in fp32 and given in their dtype; of a single one, that output itself. weights: as
    ``Skipping.weights`` gives them; source: the output that a key stands for."""
    terms = [(float(c), source(at)) for at, c in weights.items()]
    if len(terms) == 1:
        return terms[0][1]
    wide = torch.promote_types(terms[0][1].dtype, torch.float32)
    return sum(c * x.to(wide) for c, x in terms).to(terms[0][1].dtype)


def drift_of(computed: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """sum |computed - predicted| / sum |computed|, in fp32, as a tensor of no dimensions."""
    a, b = computed.float(), predicted.float()
    return (a - b).abs().sum() / a.abs().sum()


def _equal(before: Sequence[torch.Tensor], now: Sequence[torch.Tensor]) -> bool:
    return len(before) == len(now) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(before, now))

"""The denoising steps of a chunk where the loop is known: no calls to recognise, only outputs to hand on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from li_compile.memory import ChunkMemory, drift_of, weighted
from li_compile.passes.predictors import NOW, PREDICTORS, Skipping
from li_compile.policy import ChunkPlan
from li_compile.session import Session


class ChunkSteps:
    """The steps of one chunk, in order; recorded in the session at its end, if none was left out.

    ::

        with ChunkSteps(session, owner, plan, times) as steps:
            for i, t in enumerate(times):
                velocity = steps.output(i, lambda: model(x, t))

    owner: whose loop it is; what earlier chunks of the same left is used. times: of each step, falling or rising. controls:
    what must be as it was for outputs of an earlier chunk to stand in (actions).
    """

    def __init__(self, session: Session, owner: Any, plan: ChunkPlan, times: Sequence[float], controls: Sequence[torch.Tensor] = ()) -> None:
        self.session, self.given, self.times, self.controls = session, plan, list(times), list(controls)
        config = session.config.cache
        predictor = PREDICTORS[config.predictor]
        self.plan = Skipping(len(self.times), config.skipped(len(self.times)) if config.enabled else (), predictor)
        self.memory = session.kept.loop(owner, lambda: ChunkMemory(config, predictor.across))
        wanted = bool(self.plan.skip) and (config.gate == "always" or plan.reuse)
        self.reuse, self.reason = self.memory.begin(wanted, self.controls)
        self.outputs: list[torch.Tensor | None] = []
        self.drift: torch.Tensor | None = None

    def output(self, step: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The model's output at a step: computed, or what stands in for it. The caller must not write into it."""
        if self.reuse and step in self.plan.skip:
            self.outputs.append(None)
            return self._predict(step)
        out = compute()
        watched = self.session.config.cache.guard is not None and step == len(self.times) - 1 and self.plan.skip
        if watched and not (self.plan.predictor.across and not self.memory.outputs):
            self.drift = drift_of(out, self._predict(step))
        # A copy: a compiled graph may give the same memory again at the next step.
        self.outputs.append(out.detach().clone() if self.plan.skip else out)
        return out

    def _predict(self, step: int) -> torch.Tensor:
        source = lambda at: self.outputs[at[1]] if at[0] == NOW else self.memory.outputs[at[1]]
        return weighted(self.plan.weights(step, self.times), source)

    def __enter__(self) -> ChunkSteps:
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None or len(self.outputs) < len(self.times):  # or a callback interrupted it
            self.memory.forget()
            return
        full = None not in self.outputs
        self.memory.end(self.drift, self.outputs if self.plan.predictor.across and full else [], self.controls)
        reason = "; ".join(r for r in (self.given.reason, self.reason) if r)
        self.session.record(dataclasses.replace(self.given, reuse=self.reuse, reason=reason), steps=len(self.times),
                            calls=sum(o is not None for o in self.outputs), seconds=time.perf_counter() - self._start,
                            drift=self.drift, guarded=self.memory.guarded)

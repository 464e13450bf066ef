"""One chunk of a rollout whose sampling loop runs in Python: where its steps begin and end."""

from __future__ import annotations

import dataclasses
import time
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from li_compile.config import Config
from li_compile.errors import LightInteractionError
from li_compile.policy import ChunkPlan

if TYPE_CHECKING:
    from li_compile.session import Session
    from li_compile.steps import StepTrace


def chunk_begins(config: Config) -> None:
    """Let CUDA graphs write over what they returned in the last chunk; until the next, what they return stays, since calls read it of one
    another: steps the keys and values of their context."""
    if config.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()


class ChunkScope:
    """``with session.chunk(start) as plan:`` - the calls of compiled models inside are the steps of one chunk."""

    def __init__(self, session: Session, plan: ChunkPlan, steps: int | None) -> None:
        self.session, self.plan, self.steps = session, plan, steps
        self.traces: list[StepTrace] = []
        self.reasons: list[str] = []
        self.planned = False  # some call was pruned by a plan, be it that everything was kept

    def enter(self, trace: StepTrace) -> None:
        """A model is called; the first time in this chunk, its steps begin."""
        if not any(trace is t for t in self.traces):
            self.traces.append(trace)
            trace.begin(trace.config.gate == "always" or self.plan.reuse, self.steps)

    def __enter__(self) -> ChunkPlan:
        from li_compile.session import Session

        if self.session.scope is not None:
            raise LightInteractionError("a chunk of this session is open already; leave its `with` block before the next")
        self.session.scope, self._start = self, time.perf_counter()
        chunk_begins(self.session.config)
        self._recorded = self.session.chunks  # a loop inside of a graph records its chunk itself
        self._entered = Session.current() is not self.session
        if self._entered:
            self.session.__enter__()
        return self.plan

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.session.scope = None
        if self._entered:
            self.session.__exit__(kind, error, trace)
        if error is not None:
            self.session.kept.forget()
            return
        self.session.kept.keep_steps(self.traces)
        for one in self.traces:
            one.end()
        if (self.traces or self.reasons or self.planned) and self.session.chunks == self._recorded:
            self._record(time.perf_counter() - self._start)

    def _record(self, seconds: float) -> None:
        done = max((t.done for t in self.traces if t.done is not None), default=(None, None))
        drifts = [t.drift for t in self.traces if t.drift is not None]
        reuse = any(t.reuse for t in self.traces)
        reasons = dict.fromkeys(r for r in (self.plan.reason, *self.reasons, *(t.reason for t in self.traces)) if r)
        plan = dataclasses.replace(self.plan, reuse=reuse, reason="; ".join(reasons))
        self.session.record(plan, steps=done[0], calls=done[1], seconds=seconds,
                            drift=torch.stack(drifts).amax() if drifts else None,
                            guarded=any(t.memory.guarded for t in self.traces))

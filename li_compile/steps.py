"""Run time of a model that is called step by step from Python: inside a Session's chunk, steps are skipped as in a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from li_compile.config import Config
from li_compile.errors import LightInteractionError
from li_compile.memory import ChunkMemory, drift_of, weighted
from li_compile.passes.predictors import NOW, PREDICTORS, Skipping
from li_compile.patterns import Miss
from li_compile.patterns.effects import effect, writes_own
from li_compile.patterns.graph import shape, value
from li_compile.prints import Print
from li_compile.schedule import Schedule, read_schedule

if TYPE_CHECKING:
    from li_compile.pipeline import Facts
    from li_compile.scope import ChunkScope


def why_no_step(facts: Facts) -> Miss | None:
    """Why a graph cannot be one call of a model in a sampling loop; None if it can."""
    graph = facts.module.graph
    refuse = lambda reason: Miss("denoising step", "graph", reason)
    results = graph.output_node().args[0]
    if len(results) != 1 or not isinstance(results[0], torch.fx.Node) or shape(results[0]) is None \
            or not value(results[0]).is_floating_point():
        return refuse(f"it returns {len(results)} values; steps of a loop in Python are skipped for models that return one "
                      "tensor (wrap the model in a function that does)")
    what = next((e for n in graph.nodes if (e := effect(n)) is not None and not writes_own(n)), None)
    if what is not None:
        return refuse(f"it draws random numbers or writes into its inputs ({what})")
    return None


class StepRun:
    """One compiled graph that may be a step. What it has seen of a rollout is kept in the rollout's Session."""

    def __init__(self, config: Config, inputs: Sequence[int]) -> None:
        """inputs: positions of those that are no weights."""
        self.config, self.inputs = config, inputs

    def call(self, scope: ChunkScope, args: Sequence[Any], run: Callable[[], Any]) -> Any:
        """One call inside a chunk. run: computes it."""
        trace = scope.session.kept.step(self, lambda: StepTrace(self.config))
        scope.enter(trace)
        prints = [Print(args[i]) for i in self.inputs]
        held = trace.held(prints)
        if held is not None:
            return (held,)
        out = run()
        trace.computed(prints, out[0])
        return out


class StepTrace:
    """What one rollout has seen of one graph: the schedule of its loop, and the calls of the chunk that is open."""

    def __init__(self, config: Config) -> None:
        self.config = config.cache
        self.memory = ChunkMemory(self.config, PREDICTORS[self.config.predictor].across)
        self.schedule: Schedule | None = None
        self.reason = ""

    def begin(self, wanted: bool, steps: int | None) -> None:
        """A chunk begins. wanted: whether its steps are to be reused. steps: how many it has, None if not said."""
        self.wanted, self.told = wanted, steps
        self.calls: list[list[Print]] = []
        self.outputs: list[torch.Tensor | None] = []
        self.drift: torch.Tensor | None = None
        self.reuse, self.reason, self.decided = False, "", False

    def _decide(self, prints: list[Print]) -> None:
        """At a chunk's first call: whether the steps of the schedule known are skipped."""
        self.decided, schedule = True, self.schedule
        if schedule is None:
            self.reuse, self.reason = False, "every step computed: the loop is not known yet" if self.wanted else ""
            self.memory.begin(False, [])
            return
        if self.told is not None and self.told != schedule.steps:
            self.reuse, self.reason = False, f"every step computed: {self.told} steps, {schedule.steps} before"
            self.memory.forget()
            return
        controls = [p.copy for i, p in enumerate(prints) if i not in schedule.varying and p.copy is not None]
        self.reuse, self.reason = self.memory.begin(self.wanted and bool(self.plan.skip), controls)
        self.controls = controls

    @property
    def plan(self) -> Skipping:
        steps = self.schedule.steps
        return Skipping(steps, self.config.skipped(steps), PREDICTORS[self.config.predictor])

    def held(self, prints: list[Print]) -> torch.Tensor | None:
        """What stands in for this call's output; None if it is to be computed."""
        if not self.decided:
            self._decide(prints)
        if not self.reuse:
            return None
        step, branch = divmod(len(self.calls), self.schedule.branches)
        if (reason := self._differs(prints, step, branch)) is not None:
            self.reuse, self.schedule, self.reason = False, None, f"every step computed from step {step} on: {reason}"
            return None
        if step not in self.plan.skip:
            return None
        out = self._predict(step, branch)
        self.calls.append(prints)
        self.outputs.append(None)
        return out

    def _differs(self, prints: list[Print], step: int, branch: int) -> str | None:
        """What is not as it was at this step of the chunk that the schedule was read from, or at this chunk's start."""
        if step >= self.schedule.steps:
            return f"more calls than the {self.schedule.steps} steps known"
        if any(prints[p] != t for p, t in self.schedule.times[step].items()):
            return "another time than before"
        if step and any(a != b for p, (a, b) in enumerate(zip(prints, self.calls[branch])) if p not in self.schedule.varying):
            return "an input changed within the chunk"
        return None

    def _predict(self, step: int, branch: int) -> torch.Tensor:
        weights = self.plan.weights(step, self.schedule.numbers())
        out = weighted(weights, lambda source: self._source(source, branch))
        return out.clone() if len(weights) == 1 else out  # the caller may write into it

    def _source(self, source: tuple[int, int], branch: int) -> torch.Tensor:
        index = source[1] * self.schedule.branches + branch
        return self.outputs[index] if source[0] == NOW else self.memory.outputs[index]

    def computed(self, prints: list[Print], out: torch.Tensor) -> None:
        """Note a call that was computed."""
        self.calls.append(prints)
        self.outputs.append(out.detach().clone())
        schedule = self.schedule
        if schedule is None or self.config.guard is None or not self.plan.skip:
            return
        step, branch = divmod(len(self.calls) - 1, schedule.branches)
        if step == schedule.steps - 1 and not (self.plan.predictor.across and not self.memory.outputs):
            far = drift_of(out, self._predict(step, branch))
            self.drift = far if self.drift is None else torch.maximum(self.drift, far)

    def end(self) -> None:
        """The chunk ends as it should. Raises LightInteractionError if its last step was not computed."""
        full = None not in self.outputs
        if self.reuse and len(self.calls) != self.schedule.steps * self.schedule.branches:
            last, steps = self.outputs[-1], self.schedule.steps
            self.forget()
            if last is None:
                raise LightInteractionError(
                    f"a chunk ended after {len(self.calls)} calls of a model that made {steps} steps in the chunks before: its "
                    "last output was not computed but taken from an earlier step. Say session.chunk(..., steps=...) where the "
                    "number of steps changes")
            return
        if full and self.calls:
            read = read_schedule(self.calls, tuple(self.outputs[-1].shape))
            if isinstance(read, str):
                self.forget()
                self.reason = read
                return
            known = self.schedule is not None
            self.schedule = read
            across = PREDICTORS[self.config.predictor].across
            controls = [p.copy for i, p in enumerate(self.calls[0]) if i not in read.varying and p.copy is not None]
            self.memory.end(self.drift if known else None, self.outputs if across else [], controls)
        else:
            self.memory.end(self.drift, [], [])

    def forget(self) -> None:
        """Drop the schedule and everything that was kept."""
        self.schedule = None
        self.memory.forget()

    @property
    def done(self) -> tuple[int, int] | None:
        """(steps, steps computed) of the chunk, None if no loop was recognised."""
        if self.schedule is None:
            return None
        branches = self.schedule.branches
        return len(self.calls) // branches, sum(o is not None for o in self.outputs[::branches])

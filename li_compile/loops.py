"""Run time of a graph that holds a sampling loop: whether a chunk reuses steps, and what it leaves for the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from li_compile.config import CacheConfig
from li_compile.memory import ChunkMemory
from li_compile.passes.predictors import Skipping
from li_compile.patterns.graph import is_parameter, placeholders, shape, value
from li_compile.policy import ChunkPlan
from li_compile.report import VariantReport

if TYPE_CHECKING:
    from li_compile.pipeline import Facts
    from li_compile.session import Session

CONTROL = 4096  # most elements of an input that counts as an action or a setting


@dataclasses.dataclass(frozen=True)
class LoopVariant:
    """A compiled variant of a graph. It returns ``results`` values of the graph's own and then ``extra`` ones, by name: the
    drift of its last step, outputs to keep; it takes outputs of an earlier chunk behind its inputs if ``across``.
    reuses: whether steps were really left out of it."""

    run: Callable[..., Any]
    results: int
    extra: tuple[Any, ...] = ()
    across: bool = False
    reuses: bool = False

    @classmethod
    def of(cls, facts: Facts, module: GraphModule, report: VariantReport, run: Callable[..., Any]) -> LoopVariant:
        output = lambda m: m.graph.output_node()
        across = any("li_earlier" in p.meta for p in placeholders(module.graph))
        reuses = report.counts().get("cached_steps", 0) > 0
        return cls(run, len(output(facts.module).args[0]), output(module).meta.get("li_extra", ()), across, reuses)

    def __call__(self, args: Sequence[Any]) -> Any:
        out = self.run(*args)
        return tuple(out)[: self.results] if self.extra else out


class LoopRun:
    """Decides for one graph, chunk by chunk."""

    def __init__(self, plan: Skipping, controls: Sequence[int], config: CacheConfig) -> None:
        """controls: positions, in the graph's inputs, of ``controls_of``."""
        self.plan, self.controls, self.config = plan, controls, config

    def begin(self, session: Session | None, plan: ChunkPlan | None, args: Sequence[Any]) -> Chunk:
        """The chunk that a call is. plan: from the camera poses, None if there are none. args: the graph's inputs."""
        wanted = self.config.gate == "always" or plan is not None and plan.reuse
        controls = [args[i] for i in self.controls]
        memory = session.kept.loop(self, lambda: ChunkMemory(self.config, self.plan.predictor.across)) if session else None
        if memory is not None:
            reuse, reason = memory.begin(wanted, controls)
        else:  # nothing is remembered outside of a session
            reuse, reason = wanted and not self.plan.predictor.across, ""
        if plan is not None and (reuse != plan.reuse or reason):
            plan = dataclasses.replace(plan, reuse=reuse, reason=f"{plan.reason}; {reason}" if reason else plan.reason)
        return Chunk(self.plan.steps, len(self.plan.computed), plan, memory, controls, reuse)


@dataclasses.dataclass
class Chunk:
    """One call of a graph that holds a loop. computed: steps, where some are reused. drift: of the last, once it has run."""

    steps: int
    computed: int
    plan: ChunkPlan | None
    memory: ChunkMemory | None
    controls: list[torch.Tensor]
    reuse: bool
    drift: torch.Tensor | None = None

    @property
    def done(self) -> dict[str, Any]:
        """What a Session records of the chunk: steps computed, drift, whether the guard had them all computed."""
        guarded = self.memory is not None and self.memory.guarded
        return {"calls": self.computed if self.reuse else self.steps, "drift": self.drift, "guarded": guarded}

    def run(self, variant: LoopVariant, args: Sequence[Any]) -> Any:
        """The graph's results. What goes wrong inside leaves nothing behind."""
        if self.reuse and not variant.reuses:  # the pass was refused or failed: the report says why
            self.reuse = False
            if self.plan is not None:
                reason = f"{self.plan.reason}; every step computed: no variant of this graph skips steps"
                self.plan = dataclasses.replace(self.plan, reuse=False, reason=reason)
        try:
            out = variant.run(*args, *(self.memory.outputs if variant.across else ()))
        except BaseException:
            if self.memory is not None:
                self.memory.forget()
            raise
        out = tuple(out)
        extra = dict(zip(variant.extra, out[variant.results:]))
        self.drift = extra.pop("drift", None)
        if self.memory is not None:
            self.memory.end(self.drift, list(extra.values()), self.controls)
        return out[: variant.results]


def controls_of(facts: Facts) -> list[str]:
    """Names of the inputs that say what is to happen in a chunk: few numbers, no weights, poses or context."""
    context = facts.context
    other = set() if context is None else {*context.inputs, *context.sizes, context.history_w2c, context.current_w2c}
    found = []
    for node in placeholders(facts.module.graph):
        sizes = shape(node)
        small = sizes is not None and all(isinstance(s, int) for s in sizes) and torch.Size(sizes).numel() <= CONTROL
        if small and isinstance(value(node), torch.Tensor) and not is_parameter(node) and node.name not in other \
                and sizes != shape(facts.loop.outputs[0][0]):
            found.append(node.name)
    return found

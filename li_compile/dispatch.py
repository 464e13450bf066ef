"""Run time of one compiled graph: decides once a call which variant runs, and compiles variants when first needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from li_compile import _compat
from li_compile.config import Config
from li_compile.errors import PoseError
from li_compile.loops import LoopRun, LoopVariant
from li_compile.patterns import CONTEXT
from li_compile.patterns.graph import placeholders
from li_compile.pipeline import Base, Facts, build, prepare
from li_compile.policy import ChunkPlan, plan_context
from li_compile.regions import lower_regions
from li_compile.report import GraphReport
from li_compile.reuse import can_reuse, why_not
from li_compile.session import Session
from li_compile.steps import StepRun, why_no_step

Variant = tuple[int | None, bool]


class Dispatcher:
    """Callable that Dynamo runs in place of the graph: plan, select the context frames, run the variant.

    The plan is taken on the host, once a call, from the camera poses among the inputs (for a chunk function: once a
    chunk, before its first step). Variants with a pruned context have constant sizes and are compiled at their first
    use; the others are compiled while Dynamo traces, since they may have dynamic sizes.
    """

    def __init__(self, facts: Facts, config: Config, inputs: Sequence[Any], fakes: Sequence[Any], lower: Callable,
                 report: GraphReport) -> None:
        self.facts, self.config, self.lower, self.report = facts, config, lower, report
        self.names = [p.name for p in placeholders(facts.module.graph)]
        self.lock = threading.Lock()
        self.compiled: dict[Variant, LoopVariant] = {}
        # Of each context length: the graph before its variants part, and the regions that they share, compiled.
        self.bases: dict[int | None, tuple[Base, dict[str, Callable]]] = {}
        self.prunes = facts.context is not None and config.context.enabled
        self.reuses = can_reuse(facts, config)
        self.loop = LoopRun(facts, config) if self.reuses else None
        called = facts.loop is None and config.cache.enabled  # perhaps step by step, from a loop in Python
        self.no_step = why_no_step(facts) if called else None
        self.step = StepRun(facts, config) if called and self.no_step is None else None
        if facts.loop is not None and config.cache.enabled and (miss := why_not(facts, config)) is not None:
            report.misses.append(miss)
        if not self.prunes:
            for reuse in (False, True) if self.reuses else (False,):
                self._add((None, reuse), inputs, fakes, _compat.fake_mode_of(fakes))

    def __call__(self, *args: Any):
        plan, given = None, args
        if self.prunes or self.reuses and self.facts.context is not None:
            plan = self.plan(args)
            if self.prunes:
                args = self.select(args, plan)
        session = Session.current()
        plan = plan or self._unplanned()
        chunk = self.loop.begin(session, plan, given) if self.loop is not None else None
        variant = (len(plan.indices) if self.prunes else None, chunk is not None and chunk.reuse)
        run = self.compiled.get(variant)
        if run is None:
            run = self._compile_now(variant, args)
        scope = session.scope if session is not None else None
        if scope is not None and self.facts.loop is None:
            if self.step is not None:
                return self.step.call(scope, given, lambda: run(args))
            scope.reasons += [self.no_step.reason] if self.no_step is not None else []
        start = time.perf_counter()
        out = run(args) if chunk is None else chunk.run(run, args)
        if session is not None and plan is not None:
            steps = self.facts.loop.steps if self.facts.loop is not None else None
            done = {"calls": steps} if chunk is None else chunk.done
            session.record(plan if chunk is None else chunk.plan, steps=steps, seconds=time.perf_counter() - start, **done)
        return out

    def _unplanned(self) -> ChunkPlan | None:
        """What a session records of a chunk for which there was nothing to decide; None if the graph is no chunk."""
        if self.facts.loop is None:
            return None
        frames = next((s.frames(CONTEXT) for s in self.facts.sites if s.kind == "decode"), 0)
        if not isinstance(frames, int):
            return None
        return ChunkPlan(tuple(range(frames)), False, 0.0, {}, "nothing to decide in this graph", frames)

    def plan(self, args: Sequence[Any]) -> ChunkPlan:
        """The plan for these inputs; samples of a batch whose plans differ share the one that computes most."""
        poses = [args[self.names.index(n)] for n in (self.facts.context.history_w2c, self.facts.context.current_w2c)]
        history, current = (p.detach().reshape(-1, *p.shape[-3:]).cpu() for p in poses)
        plans = [plan_context(h, c, self.config) for h, c in zip(history, current)] \
            if not (_same(history) and _same(current)) else [plan_context(history[0], current[0], self.config)]
        if all(p.indices == plans[0].indices and p.reuse == plans[0].reuse for p in plans):
            return plans[0]
        everything = tuple(range(history.shape[1]))
        return ChunkPlan(everything, all(p.reuse for p in plans), min(p.score for p in plans), {},
                         "all kept: the samples of the batch differ", len(everything))

    def select(self, args: Sequence[Any], plan: ChunkPlan) -> list[Any]:
        """Inputs with only the plan's context frames. Raises PoseError if their frame counts differ."""
        frames = {n: args[self.names.index(n)].shape[d] for n, d in self.facts.context.inputs.items()}
        if len(set(frames.values())) > 1:
            counts = ", ".join(f"{n}: {c}" for n, c in frames.items())
            raise PoseError(f"the context inputs hold different numbers of frames ({counts}); give one pose and one "
                            "action for each context latent")
        selected, index = list(args), torch.tensor(plan.indices)
        for name, dim in self.facts.context.inputs.items():
            i = self.names.index(name)
            # Contiguous in any case: a variant is compiled for the strides that it is first given.
            chosen = args[i].index_select(dim, index.to(args[i].device)) if len(index) < plan.history else args[i]
            selected[i] = chosen.contiguous()
        for name in self.facts.context.sizes:
            selected[self.names.index(name)] = len(plan.indices)
        return selected

    def _compile_now(self, variant: Variant, args: Sequence[Any]) -> LoopVariant:
        with self.lock:
            if variant not in self.compiled:
                mode, fakes = _compat.static_fakes(args)
                self._add(variant, args, fakes, mode)
            return self.compiled[variant]

    def _add(self, variant: Variant, inputs: Sequence[Any], fakes: Sequence[Any], mode) -> None:
        kept, reuse = variant
        if kept not in self.bases:
            self.bases[kept] = prepare(self.facts, self.config, fakes, mode, kept), {}
        base, regions = self.bases[kept]
        module, report = build(self.facts, self.config, fakes, mode, kept=kept, reuse=reuse, base=base)
        self.report.variants.append(report)
        self.compiled[variant] = LoopVariant.of(self.facts, module, report, lower_regions(module, inputs, self.lower, regions))


def _same(poses: torch.Tensor) -> bool:
    return bool((poses == poses[:1]).all())



"""Run time of one compiled graph: decides once a call which variant runs, and compiles variants when first needed."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from li_compile import _compat
from li_compile.config import Config
from li_compile.errors import PoseError
from li_compile.loops import LoopRun, LoopVariant
from li_compile.patterns import CONTEXT
from li_compile.patterns.graph import placeholders
from li_compile.pipeline import Base, Facts, build, prepare
from li_compile.policy import ChunkPlan, dynamics_unit, latent_change, plan_context
from li_compile.regions import lower_regions
from li_compile.report import GraphReport
from li_compile.reuse import can_reuse, why_not
from li_compile.session import Session
from li_compile.steps import StepRun, why_no_step

if TYPE_CHECKING:
    from li_compile.scope import ChunkScope


class Variant(NamedTuple):
    """What a compiled variant is for. kept: context frames, None: all that are given; sizes: others that may change."""

    kept: int | None
    reuse: bool
    sizes: tuple[torch.Size, ...] = ()


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
        self.bases: dict[tuple, tuple[Base, dict[str, Callable]]] = {}
        self.prunes = facts.context is not None and config.context.enabled
        self.reuses = can_reuse(facts, config)
        self.loop = LoopRun(facts, config) if self.reuses else None
        called = facts.loop is None and config.cache.enabled  # perhaps step by step, from a loop in Python
        self.no_step = why_no_step(facts) if called else None
        self.step = StepRun(facts, config) if called and self.no_step is None else None
        if facts.loop is not None and config.cache.enabled and (miss := why_not(facts, config)) is not None:
            report.misses.append(miss)
        # What may change without the plan: dynamic sizes and numbers that are not the context's.
        context, pruned = facts.context, set()
        if self.prunes:
            pruned = set(context.sizes) | (set(context.inputs) if context.at_source else set())
        self.other = [i for i, (name, fake) in enumerate(zip(self.names, fakes)) if name not in pruned and isinstance(fake, torch.Tensor)
                      and any(isinstance(d, torch.SymInt) for d in fake.shape)]
        self.free = free_numbers(fakes, pruned, self.names) if self.prunes else []
        if not self.prunes or context.history_w2c is None:  # without cameras, a call outside of Session.chunk() is not pruned
            for reuse in (False, True) if self.reuses else (False,):
                self._add(Variant(None, reuse), inputs, fakes, _compat.fake_mode_of(fakes))

    def __call__(self, *args: Any):
        session, given = Session.current(), args
        scope = session.scope if session is not None else None
        plan = self.plan(args, session) if self.prunes or self.reuses and self.facts.context is not None else None
        kept, sizes = None, ()
        if self.prunes and plan is not None:
            frames = plan.indices if plan.slots is None else plan.slots
            if self.facts.context.at_source or len(frames) < plan.history:  # else all of the cache is read: the graph as it is
                args = self.select(args, plan, frames)
                kept, sizes = len(frames), tuple(args[i].shape for i in self.other)
        plan = plan or self._unplanned()
        chunk = self.loop.begin(session, plan, given) if self.loop is not None else None
        variant = Variant(kept, chunk is not None and chunk.reuse, sizes)
        run = self.compiled.get(variant)
        if run is None:
            run = self._compile_now(variant, args)
        if scope is not None and self.facts.loop is None:
            scope.planned |= self.prunes
            return self._step(scope, given, lambda: run(args))
        start = time.perf_counter()
        out = run(args) if chunk is None else chunk.run(run, args)
        if session is not None and plan is not None:
            steps = self.facts.loop.steps if self.facts.loop is not None else None
            done = {"calls": steps} if chunk is None else chunk.done
            session.record(plan if chunk is None else chunk.plan, steps=steps, seconds=time.perf_counter() - start, **done)
        return out

    def _step(self, scope: ChunkScope, given: Sequence[Any], run: Callable[[], Any]) -> Any:
        """One call of perhaps several in a chunk that the scope records."""
        if self.step is not None:
            return self.step.call(scope, given, run)
        scope.reasons += [self.no_step.reason] if self.no_step is not None else []
        return run()

    def _unplanned(self) -> ChunkPlan | None:
        """What a session records of a chunk for which there was nothing to decide; None if the graph is no chunk."""
        if self.facts.loop is None:
            return None
        frames = next((s.frames(CONTEXT) for s in self.facts.sites if s.kind == "decode"), 0)
        if not isinstance(frames, int):
            return None
        return ChunkPlan(tuple(range(frames)), False, 0.0, {}, "nothing to decide in this graph", frames)

    def plan(self, args: Sequence[Any], session: Session | None) -> ChunkPlan | None:
        """The plan for these inputs; None if the graph has no cameras and no session says which chunk this is."""
        context = self.facts.context
        if context.history_w2c is None:
            return self._pending(args, session)
        poses = [args[self.names.index(n)] for n in (context.history_w2c, context.current_w2c)]
        history, current = (p.detach().reshape(-1, *p.shape[-3:]).cpu() for p in poses)
        change = self._change(args)
        if _same(history) and _same(current):
            if session is not None:
                return session.planner.decide(history[0], current[0], self.config, change)
            return plan_context(history[0], current[0], self.config, change=change)
        # Samples of a batch whose plans differ share the one that computes most.
        plans = [plan_context(h, c, self.config, change=change) for h, c in zip(history, current)]
        if all(p.indices == plans[0].indices and p.reuse == plans[0].reuse for p in plans):
            return plans[0]
        everything = tuple(range(history.shape[1]))
        return ChunkPlan(everything, all(p.reuse for p in plans), min(p.score for p in plans), {},
                         "all kept: the samples of the batch differ", len(everything))

    def _pending(self, args: Sequence[Any], session: Session | None) -> ChunkPlan | None:
        """The plan of the session's open chunk, if it is for as many frames as the graph holds."""
        context, plan = self.facts.context, session.scope.plan if session is not None and session.scope is not None else None
        if plan is None or not self.prunes:
            return plan
        given = plan.history if plan.slots is None else len(self.config.context.slot_references)
        name, held = next(iter(context.inputs.items()))
        holds = held.frames(args[self.names.index(name)].shape[held.dim])
        # A preallocated cache has room for more than it holds; how much that is cannot be seen from outside.
        if context.form != "slices" and holds != given:
            raise PoseError(f"the session's plan is for {given} context frames, {name} holds {holds}; plan the chunk with the history that "
                            "the model is given, call it outside of Session.chunk(), or set context.enabled = False")
        return plan if plan.slots is None else dataclasses.replace(plan, history=given)

    def _change(self, args: Sequence[Any]) -> float | None:
        """D_t (eq. 1) of the context's newest latents, where the window depends on it."""
        context = self.facts.context
        if self.config.context.window == "fixed" or context.latents is None:
            return None
        return latent_change(args[self.names.index(context.latents)], context.inputs[context.latents].dim, dynamics_unit(self.config.context))

    def select(self, args: Sequence[Any], plan: ChunkPlan, frames: Sequence[int]) -> list[Any]:
        """Inputs with only these context frames, or with the frames as a further input where the graph selects.

        Raises PoseError if the inputs' frame counts differ.
        """
        context, selected, index = self.facts.context, list(args), torch.tensor(frames, dtype=torch.int64)
        if not context.at_source:
            cache = args[self.names.index(next(iter(context.inputs)))]
            return [*selected, index.to(cache.device, non_blocking=True)]
        held = {n: c.frames(args[self.names.index(n)].shape[c.dim]) for n, c in context.inputs.items()}
        if len(set(held.values())) > 1:
            counts = ", ".join(f"{n}: {c}" for n, c in held.items())
            raise PoseError(f"the context inputs hold different numbers of frames ({counts}); give one pose and one "
                            "action for each context latent")
        everything = list(frames) == list(range(plan.history))
        for name, c in context.inputs.items():
            i = self.names.index(name)
            # Contiguous in any case: a variant is compiled for the strides that it is first given.
            if not everything:
                # Compacted positions are those of the newest frames, whichever frames are kept.
                own = torch.arange(plan.history - len(index), plan.history) if context.compact and name == context.positions else index
                selected[i] = args[i].index_select(c.dim, c.entries(own, args[i].shape[c.dim]).to(args[i].device))
            selected[i] = selected[i].contiguous()
        for name, c in context.sizes.items():
            selected[self.names.index(name)] = c.size(len(index))
        return selected

    def _compile_now(self, variant: Variant, args: Sequence[Any]) -> LoopVariant:
        with self.lock:
            if variant not in self.compiled:
                mode, fakes = _compat.static_fakes(args, free=self.free)
                self._add(variant, fakes if self.free else args, fakes, mode)
            return self.compiled[variant]

    def _add(self, variant: Variant, inputs: Sequence[Any], fakes: Sequence[Any], mode) -> None:
        length = variant.kept, variant.sizes
        if length not in self.bases:
            self.bases[length] = prepare(self.facts, self.config, fakes, mode, variant.kept), {}
        base, regions = self.bases[length]
        module, report = build(self.facts, self.config, fakes, mode, kept=variant.kept, reuse=variant.reuse, base=base)
        self.report.variants.append(report)
        self.compiled[variant] = LoopVariant.of(self.facts, module, report, lower_regions(module, inputs, self.lower, regions))


def free_numbers(fakes: Sequence[Any], pruned: set[str], names: Sequence[str]) -> list[int]:
    """Positions of symbolic numbers that are no tensor's size, such as the frame at which a chunk starts."""
    sizes = {str(d) for fake in fakes if isinstance(fake, torch.Tensor) for d in fake.shape if isinstance(d, torch.SymInt)}
    return [i for i, (name, fake) in enumerate(zip(names, fakes))
            if isinstance(fake, torch.SymInt) and name not in pruned and str(fake) not in sizes]


def _same(poses: torch.Tensor) -> bool:
    return bool((poses == poses[:1]).all())



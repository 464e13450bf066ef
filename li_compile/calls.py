"""Run time of one graph, whoever compiled it: decides once a call which variant runs. All that it knows is plain data."""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from li_compile.config import Config
from li_compile.errors import PoseError
from li_compile.loops import LoopRun, LoopVariant, controls_of
from li_compile.patterns import CONTEXT, ContextConcat
from li_compile.patterns.graph import is_parameter, placeholders
from li_compile.policy import ChunkPlan, dynamics_unit, latent_change, plan_context
from li_compile.reuse import can_reuse, skipping
from li_compile.scope import chunk_begins
from li_compile.session import Session
from li_compile.steps import StepRun, why_no_step

if TYPE_CHECKING:
    from li_compile.pipeline import Facts
    from li_compile.scope import ChunkScope


@dataclasses.dataclass(frozen=True)
class Known:
    """What a graph's calls depend on.

    names: its inputs, in order. context: what a plan selects from, None if there is none. prunes, reuses: whether there are
    variants for a plan to choose. steps: of the loop in the graph, None without one. controls: positions of inputs that earlier
    outputs depend on (li_compile/loops.py). frames: context frames where they are a constant. changing: positions of what is no
    weight, for steps of a loop in Python. no_step: why the graph is no such step; None if it may be one.
    """

    names: tuple[str, ...]
    context: ContextConcat | None
    prunes: bool
    reuses: bool
    steps: int | None
    controls: tuple[int, ...]
    frames: int
    changing: tuple[int, ...]
    no_step: str | None

    @classmethod
    def of(cls, facts: Facts, config: Config, weights: frozenset[str] = frozenset()) -> Known:
        """weights: inputs of the graph that a call is not given."""
        own = {p.name: p for p in placeholders(facts.module.graph) if p.name not in weights}
        names, loop = tuple(own), facts.loop
        reuses = can_reuse(facts, config)
        frames = next((s.frames(CONTEXT) for s in facts.sites if s.kind == "decode"), 0)
        no_step = why_no_step(facts) if loop is None and config.cache.enabled else None
        return cls(names, facts.context, facts.context is not None and config.context.enabled, reuses, None if loop is None else loop.steps,
                   tuple(names.index(n) for n in controls_of(facts) if n in own) if reuses else (), frames if isinstance(frames, int) else -1,
                   tuple(i for i, p in enumerate(own.values()) if not is_parameter(p)), None if no_step is None else no_step.reason)


class Calls(abc.ABC):
    """Callable in the place of a graph: plan, select the context frames, run the variant that ``variant`` gives.

    The plan is taken on the host, once a call, from the camera poses among the inputs (for a chunk function: once a
    chunk, before its first step).
    """

    def __init__(self, known: Known, config: Config) -> None:
        self.known, self.config, self.names, self.prunes = known, config, list(known.names), known.prunes
        self.loop = LoopRun(skipping(known.steps, config), known.controls, config.cache) if known.reuses else None
        called = known.steps is None and config.cache.enabled  # perhaps step by step, from a loop in Python
        self.step = StepRun(config, known.changing) if called and known.no_step is None else None

    @abc.abstractmethod
    def variant(self, kept: int | None, reuse: bool, args: Sequence[Any]) -> LoopVariant:
        """What runs. kept: context frames, None: all that are given. args: as it will be given them."""

    def __call__(self, *args: Any):
        session, given = Session.current(), args
        scope = session.scope if session is not None else None
        if scope is None and self.known.steps is not None:
            chunk_begins(self.config)
        context = self.known.context
        plan = self.plan(args, session) if self.prunes or self.loop is not None and context is not None else None
        kept = None
        if self.prunes and plan is not None:
            frames = plan.indices if plan.slots is None else plan.slots
            if context.at_source or len(frames) < plan.history:  # else all of the cache is read: the graph as it is
                args, kept = self.select(args, plan.history, frames), len(frames)
        plan = plan or self._unplanned()
        chunk = self.loop.begin(session, plan, given) if self.loop is not None else None
        run = self.variant(kept, chunk is not None and chunk.reuse, args)
        if scope is not None and self.known.steps is None:
            scope.planned |= self.prunes
            return self._step(scope, given, lambda: run(args))
        start = time.perf_counter()
        out = run(args) if chunk is None else chunk.run(run, args)
        if session is not None and plan is not None:
            done = {"calls": self.known.steps} if chunk is None else chunk.done
            session.record(plan if chunk is None else chunk.plan, steps=self.known.steps, seconds=time.perf_counter() - start, **done)
        return out

    def _step(self, scope: ChunkScope, given: Sequence[Any], run: Callable[[], Any]) -> Any:
        """One call of perhaps several in a chunk that the scope records."""
        if self.step is not None:
            return self.step.call(scope, given, run)
        scope.reasons += [self.known.no_step] if self.known.no_step is not None else []
        return run()

    def _unplanned(self) -> ChunkPlan | None:
        """What a session records of a chunk for which there was nothing to decide; None if the graph is no chunk."""
        frames = self.known.frames
        if self.known.steps is None or frames < 0:
            return None
        return ChunkPlan(tuple(range(frames)), False, 0.0, {}, "nothing to decide in this graph", frames)

    def plan(self, args: Sequence[Any], session: Session | None) -> ChunkPlan | None:
        """The plan for these inputs; None if the graph has no cameras and no session says which chunk this is."""
        context = self.known.context
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
        context, plan = self.known.context, session.scope.plan if session is not None and session.scope is not None else None
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
        context = self.known.context
        if self.config.context.window == "fixed" or context.latents is None:
            return None
        return latent_change(args[self.names.index(context.latents)], context.inputs[context.latents].dim, dynamics_unit(self.config.context))

    def select(self, args: Sequence[Any], history: int, frames: Sequence[int]) -> list[Any]:
        """Inputs with only these of ``history`` context frames, or with the frames as a further input where the graph selects.

        Raises PoseError if the inputs' frame counts differ.
        """
        context, selected, index = self.known.context, list(args), torch.tensor(frames, dtype=torch.int64)
        if not context.at_source:
            cache = args[self.names.index(next(iter(context.inputs)))]
            return [*selected, index.to(cache.device, non_blocking=True)]
        held = {n: c.frames(args[self.names.index(n)].shape[c.dim]) for n, c in context.inputs.items()}
        if len(set(held.values())) > 1:
            counts = ", ".join(f"{n}: {c}" for n, c in held.items())
            raise PoseError(f"the context inputs hold different numbers of frames ({counts}); give one pose and one "
                            "action for each context latent")
        everything = list(frames) == list(range(history))
        for name, c in context.inputs.items():
            i = self.names.index(name)
            # Contiguous in any case: a variant is compiled for the strides that it is first given.
            if not everything:
                # Compacted positions are those of the newest frames, whichever frames are kept.
                own = torch.arange(history - len(index), history) if context.compact and name == context.positions else index
                selected[i] = args[i].index_select(c.dim, c.entries(own, args[i].shape[c.dim]).to(args[i].device))
            selected[i] = selected[i].contiguous()
        for name, c in context.sizes.items():
            selected[self.names.index(name)] = c.size(len(index))
        return selected


def _same(poses: torch.Tensor) -> bool:
    return bool((poses == poses[:1]).all())

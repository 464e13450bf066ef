"""Cached steps, planned: which steps of a graph's loop are skipped and with what, and the passes that do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from li_compile.config import Config
from li_compile.passes.cached_steps import add_earlier, cached_steps, too_few, watch_steps
from li_compile.passes.fold_updates import fold_updates
from li_compile.passes.predictors import PREDICTORS, Skipping
from li_compile.passes.propagate import tidy
from li_compile.passes.record import Record, Refused
from li_compile.passes.share_steps import shared_regions
from li_compile.patterns import DenoisingLoop, Family, Miss
from li_compile.patterns.matching import match_loop

if TYPE_CHECKING:
    from li_compile.pipeline import Facts


def can_reuse(facts: Facts, config: Config) -> bool:
    """Whether a graph has a variant with cached steps: a step to skip, and something that says when to skip it."""
    return config.cache.enabled and facts.loop is not None and why_not(facts, config) is None


def why_not(facts: Facts, config: Config) -> Miss | None:
    """Why the steps of a loop that was found are all computed in every chunk."""
    cache, loop = config.cache, facts.loop
    refuse = lambda reason: Miss("cached steps", loop.calls[0][0].name, reason)
    if loop.steps < cache.min_steps:
        return refuse(too_few(loop.steps, cache.min_steps))
    if not skipping(loop.steps, config).skip:
        return refuse(f"cache.skip = {cache.skip} names no step between the first and the last of {loop.steps}")
    if facts.context is None and cache.gate == "views":
        return refuse("no context with camera poses that could say when the camera is back where it was "
                      "(cache.gate='always' reuses steps in every chunk)")
    return None


def skipping(steps: int, config: Config) -> Skipping:
    return Skipping(steps, config.cache.skipped(steps), PREDICTORS[config.cache.predictor])


def apply_reuse(apply: Callable, facts: Facts, config: Config, reuse: bool) -> None:
    """Run the passes of one variant that concern its loop. apply(name, run): runs a pass on the variant's graph."""
    if not can_reuse(facts, config):
        return
    plan = skipping(facts.loop.steps, config)
    across, guarded = plan.predictor.across, config.cache.guard is not None

    def cached(module: GraphModule) -> Record:
        loop, shared = found_loop(module, facts.family), bool(shared_regions(module))
        if across and not shared:
            raise Refused(Miss("cached steps", loop.calls[0][0].name, f"predictor {plan.predictor.name!r} reads an earlier "
                               "chunk, for which the calls of the model must be alike (share_steps says where they are not)"))
        if across:
            add_earlier(module, loop, plan)
        record = cached_steps(module, loop, plan)
        if shared:
            tidy(module)  # or a state that only a dead call reads would be computed for it
            record.details += fold_updates(module, [n for i in plan.computed for n in loop.outputs[i]]).details
        if guarded:
            watch_steps(module, loop, plan, drift=True, keep=False)
        return record

    def watched(module: GraphModule) -> Record:
        return watch_steps(module, found_loop(module, facts.family), plan, drift=guarded and not across, keep=across)

    if reuse:
        apply("cached_steps", cached)
    elif across or guarded:
        apply("watch_steps", watched)


def found_loop(module: GraphModule, family: Family | None = None) -> DenoisingLoop:
    """The loop of a graph that was found before, after other passes; raises Refused if it is not to be found any more."""
    loop, misses, _ = match_loop(module, family)
    if loop is None:
        raise Refused(misses[0])
    return loop


def describe(loop: DenoisingLoop) -> str:
    """A loop in words, for the report."""
    parts = [f"{loop.steps} steps ({loop.form})", loop.updates.kind or "update not linear"]
    if loop.branches > 1:
        parts.append(f"{loop.branches} calls a step")
    if isinstance(loop.body, Miss):
        parts.append("calls not alike")
    else:
        parts.append(f"{len(loop.body.varying)} operands of a call vary, {len(loop.body.shared)} are shared")
    return ", ".join(parts)

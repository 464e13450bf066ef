"""The variants of a traced graph that an artifact holds: one a number of context frames, with every step and with steps reused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch.fx import GraphModule

from li_compile.config import Config
from li_compile.exporting.gating import gate_steps
from li_compile.exporting.trace import Traced
from li_compile.loops import LoopVariant
from li_compile.passes.gated_steps import inline_regions
from li_compile.pipeline import Base, build, prepare, static_inputs
from li_compile.report import VariantReport
from li_compile.reuse import can_reuse


@dataclasses.dataclass
class Variant:
    """A rewritten graph without nested regions, of constant sizes. reuse: None where the graph itself takes that as an input."""

    kept: int | None
    reuse: bool | None
    graph: GraphModule
    report: VariantReport
    loop: LoopVariant

    @property
    def name(self) -> str:
        context = "all" if self.kept is None else f"keep{self.kept}"
        return f"{context}_{ {None: 'gated', False: 'full', True: 'reuse'}[self.reuse] }"


def wanted(traced: Traced, config: Config, gates: str) -> list[tuple[int | None, bool | None]]:
    """(kept, reuse) of each variant, in the order of :func:`variants`."""
    context, reuses = traced.facts.context, can_reuse(traced.facts, config)
    lengths: list[int | None] = [None]
    if context is not None and config.context.enabled:
        lengths = list(config.context.kept_of(context.frames))
        if not context.at_source:
            lengths = [n for n in lengths if n < context.frames]
        if not context.at_source or context.history_w2c is None:  # all of a cache, or a call that no plan is for: the graph as it is
            lengths = [None, *lengths]
    if reuses and gates == "device":
        return [(n, None) for n in lengths]
    return [(n, r) for n in lengths for r in ((False, True) if reuses and config.may_reuse(n) else (False,))]


def variants(traced: Traced, config: Config, gates: str) -> Iterator[Variant]:
    """Build them, by the same passes as the backend. Raises ExportError where a gate on the device cannot be had."""
    # What is compiled once is of no use where regions are inlined, and steps that are gated one by one are not made one region.
    exact = dataclasses.replace(config.exact, repeated_blocks=False, encode=False, dense_attention=False, linear_gelu=False, shared_steps=config.exact.shared_steps and gates != "device")
    config = dataclasses.replace(config, exact=exact)
    facts, bases = traced.facts, {}
    for kept, reuse in wanted(traced, config, gates):
        mode, inputs = static_inputs(facts, traced.fakes, kept)
        if kept not in bases:
            bases[kept] = prepare(facts, config, inputs, mode, kept)
        base: Base = bases[kept]
        if reuse is None:
            graph, records = base.module, list(base.records)
            inline_regions(graph)
            records.append(gate_steps(graph, facts.family, config))
            report = VariantReport(kept, False, records, 0, 0)
        else:
            graph, report = build(facts, config, inputs, mode, kept=kept, reuse=reuse, base=base)
        loop = LoopVariant.of(facts, graph, report, None)
        inline_regions(graph)
        yield Variant(kept, reuse, graph, report, dataclasses.replace(loop, reuses=loop.reuses or reuse is None))

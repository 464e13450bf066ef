"""``li_compile.explain``: what would be rewritten, without compiling or running anything of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from li_compile import _compat, patterns
from li_compile.breaks import breaks_met, ended, preparation_of
from li_compile.compiling import with_family
from li_compile.config import Config
from li_compile.exporting.advice import advise
from li_compile.exporting.lowering import lowered
from li_compile.exporting.manifest import device_of
from li_compile.outlines import outline
from li_compile.passes.cost import Product, products
from li_compile.patterns.attention import ROLE_NAMES
from li_compile.patterns.graph import hint, name_of, placeholders, source_line, value
from li_compile.patterns.preparation import arguments_of, prepare
from li_compile.pipeline import Facts, build, canonical, constant_lengths, family_of, match, report_of, static_inputs
from li_compile.report import GraphReport, PassEffect, Report, SiteReport, Work
from li_compile.reuse import can_reuse
from li_compile.roofline import Machine, machine_of

SITE = "li_site"  # in a node's meta: number of the row of attention that it is counted in, also after it was rewritten


def explain(fn: Callable[..., Any], *args: Any, config: Config | None = None, **kwargs: Any) -> Report:
    """Trace a function or module with these inputs and report what the compiler finds and would do.

    A family's preparation is run before and undone after (``prepared`` lists what it changed).

    fn: a transformer, one denoising step, or a whole chunk (context encoding and denoising loop). args, kwargs: inputs
    as for a real call; their shapes matter, and their values only where fn branches on them. config: None: all
    defaults (preset "all").

    Graphs are traced and rewritten on fake tensors and no kernel of the model runs: behind each graph, its outputs are
    zeros of the right shapes. Returns a Report: print it, take ``to_dict()``, or write ``html(path)``. ``graphs`` has the
    sites found, the misses with their reasons and source lines, and for each variant what every pass did and the
    operations, bytes and roofline milliseconds of its products. Where a graph breaks, ``breaks`` says at which line; each
    piece is reported on its own.
    """
    config = with_family(Config() if config is None else config, fn)
    family = family_of(config)
    prepared = prepare(fn, family)
    try:
        given = arguments_of(fn, family, config.context.enabled)
        if given is not None:
            args, kwargs, *_ = given(args, kwargs) or (args, kwargs)
        report = _explain(fn, args, kwargs, config)
    finally:
        prepared.undo()
    report.prepared = prepared.changes
    return report


def _explain(fn: Callable[..., Any], args: tuple, kwargs: dict, config: Config) -> Report:
    report = Report(config.to_options())
    frames = _trace(fn, args, kwargs, report, config, settled=False)
    if frames:
        # The context length was a constant. As in a rollout, where lengths differ from chunk to chunk, make it dynamic.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                for dim in (i for i, size in enumerate(tensor.shape) if size in frames):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        report.graphs.clear()
        report.breaks.clear()
        _trace(fn, args, kwargs, report, config, settled=True)
    return report


def _trace(fn: Callable[..., Any], args: tuple, kwargs: dict, report: Report, config: Config, settled: bool) -> set[int]:
    """Trace into the report. Returns the context lengths that were constants, of graphs that were not rewritten for that
    reason; settled: rewrite in any case."""
    constant: set[int] = set()
    inputs: list[Any] = []
    engines: list[dict[str, Any]] = []  # what would become of our operators in TensorRT

    def record(module, example_inputs):
        fakes = [value(p) for p in placeholders(module.graph)]
        facts = match(canonical(module, fakes, config), config)
        graph = report_of(len(report.graphs), facts)
        report.graphs.append(graph)
        lengths = set() if settled else constant_lengths(facts)
        constant.update(lengths)
        if not lengths:
            engines.extend(_rewrite(facts, fakes, graph, report, config))
            inputs.extend(f for f in fakes if isinstance(f, torch.Tensor))
        results = module.graph.output_node().args[0]
        return lambda *real: tuple(_zeros(value(r)) if isinstance(r, torch.fx.Node) else r for r in results)

    tried = preparation_of(family_of(config))
    torch._dynamo.reset()
    _compat.forget_breaks()
    try:
        with torch.no_grad():
            torch.compile(fn, backend=record)(*args, **kwargs)
        report.breaks.extend(breaks_met(tried))
    except Exception as error:
        met = breaks_met(tried)
        if not met:
            raise
        report.breaks.extend([*met, ended(error, tried)])
    finally:
        torch._dynamo.reset()
    report.advice = advise(engines, device_of(inputs), len(report.breaks)) if inputs else None
    return constant


def _rewrite(facts: Facts, fakes: list[Any], graph: GraphReport, report: Report, config: Config) -> list[dict[str, Any]]:
    """Build each variant that is worth showing, and price the graph, its sites and what every pass does. Returns what would become of
    our operators in TensorRT."""
    engines: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[patterns.AttentionSite]] = {}
    for site in facts.sites:  # the same line, matched alike, in every layer and step of a graph without regions, is one
        groups.setdefault((source_line(site.node), _pattern(site)), []).append(site)
    for i, group in enumerate(groups.values()):
        for site in group:
            site.node.meta[SITE] = i
    work = list(products(facts.module))
    if report.machine is None:
        device = next((x.device for x in fakes if isinstance(x, torch.Tensor)), torch.device("cpu"))
        report.machine = machine_of(device, {p.dtype for p in work})
    price = partial(_price, report.machine)
    graph.ms, graph.outline = price(work).ms, outline(facts.module)
    for i, ((where, pattern), group) in enumerate(groups.items()):
        mine = [p for p in work if p.node.meta.get(SITE) == i]
        graph.sites.append(SiteReport(group[0].node.name, pattern, where, sum(p.runs for p in mine), price(mine)))
    for kept, reuse in _variants(facts, config):
        mode, static = static_inputs(facts, fakes, kept)
        effects, last = [], price(work)

        def observe(name: str, module: torch.fx.GraphModule) -> None:
            nonlocal last
            now = price(products(module))
            effects.append(PassEffect(name, last - now))
            last = now

        module, variant = build(facts, config, static, mode, kept=kept, reuse=reuse, observe=observe)
        engines += lowered(module, "tensorrt")
        after = list(products(module))
        variant.ms, variant.effects, variant.outline = price(after).ms, effects, outline(module)
        graph.variants.append(variant)
        for i, site in enumerate(graph.sites):
            mine = [p for p in after if p.node.meta.get(SITE) == i]
            operators = Counter()
            for p in mine:
                operators[name_of(p.node)] += p.runs
            site.after[variant.label] = price(mine), ", ".join(f"{n} {name}" for name, n in operators.items()) or "not run"
    return engines


def _price(machine: Machine, work: Iterable[Product]) -> Work:
    work = list(work)
    return Work(sum(p.runs * p.operations for p in work), sum(p.runs * p.bytes for p in work), machine.milliseconds(work))


def _pattern(site: patterns.AttentionSite) -> str:
    """What matched a site, in words: its kind and segments, and the registered spelling that brought it here, if any."""
    segments = " | ".join(f"{ROLE_NAMES[s.role]} {s.length}" for s in site.segments)
    branches = f", {site.branches} branches" if site.branches > 1 else ""
    spelling = site.node.meta.get("li_pattern")
    return f"{site.kind}, keys [{segments}]{branches}" + (f", written as {spelling}" if spelling else "")


def _variants(facts: Facts, config: Config) -> list[tuple[int | None, bool]]:
    """The variants to show: nothing pruned or skipped, and the most that the options allow."""
    reuse = can_reuse(facts, config)
    if facts.context is None or not config.context.enabled:
        return [(None, False), (None, True)] if reuse else [(None, False)]
    given = facts.context.frames
    lengths = sorted({min(given, length) for length in config.context.lengths()})
    return [(lengths[0], False), (lengths[-1], True)] if reuse else [(n, False) for n in lengths]


def _zeros(fake: Any) -> Any:
    if not isinstance(fake, torch.Tensor):
        return hint(fake) if isinstance(fake, torch.SymInt) else fake
    return torch.zeros([hint(d) for d in fake.shape], dtype=fake.dtype, device=fake.device)

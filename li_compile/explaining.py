"""``li_compile.explain``: what would be rewritten, without compiling or running anything of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from li_compile import _compat, patterns
from li_compile.compiling import with_family
from li_compile.config import Config
from li_compile.patterns.graph import hint, placeholders, value
from li_compile.patterns.preparation import prepare
from li_compile.pipeline import Facts, build, canonical, family_of, match, report_of
from li_compile.report import Report
from li_compile.reuse import can_reuse


def explain(fn: Callable[..., Any], *args: Any, config: Config | None = None, **kwargs: Any) -> Report:
    """Trace a function or module with these inputs and report what the compiler finds and would do.

    A family's preparation is run before and undone after (``prepared`` lists what it changed).

    fn: a transformer, one denoising step, or a whole chunk (context encoding and denoising loop). args, kwargs: inputs
    as for a real call; their shapes matter, and their values only where fn branches on them. config: None: all
    defaults (preset "all").

    Graphs are traced and rewritten on fake tensors and no kernel of the model runs: behind each graph, its outputs are
    zeros of the right shapes. Returns a Report: print it, or take ``to_dict()``; ``graphs`` has the
    sites found, the misses with their reasons and source lines, and for each variant what every pass did and the
    operations and bytes of its products. Where a graph breaks, ``breaks`` says so; each piece is reported on its own.
    """
    config = with_family(Config() if config is None else config, fn)
    prepared = prepare(fn, family_of(config))
    try:
        report = _explain(fn, args, kwargs, config)
    finally:
        prepared.undo()
    report.prepared = prepared.changes
    return report


def _explain(fn: Callable[..., Any], args: tuple, kwargs: dict, config: Config) -> Report:
    report = Report(config.to_options())
    _trace(fn, args, kwargs, report, config)
    frames = {size for g in report.graphs for size in g.found.pop("_constant_context", ())}
    if frames:
        # The context length was a constant. As in a rollout, where lengths differ from chunk to chunk, make it dynamic.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                for dim in (i for i, size in enumerate(tensor.shape) if size in frames):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        report.graphs.clear()
        report.breaks.clear()
        _trace(fn, args, kwargs, report, config)
        for graph in report.graphs:
            graph.found.pop("_constant_context", None)
    return report


def _trace(fn: Callable[..., Any], args: tuple, kwargs: dict, report: Report, config: Config) -> None:
    def record(module, example_inputs):
        fakes = [value(p) for p in placeholders(module.graph)]
        facts = match(canonical(module, fakes, config), config)
        graph = report_of(len(report.graphs), facts)
        report.graphs.append(graph)
        decode = [s for s in facts.sites if s.kind == "decode"]
        if decode and isinstance(decode[0].frames(patterns.CONTEXT), int):
            frames, tokens = decode[0].frames(patterns.CONTEXT), decode[0].grid[0] * decode[0].grid[1]
            graph.found["_constant_context"] = (frames, frames * tokens)  # cached keys and values have its tokens
        for kept, reuse in _variants(facts, config):
            mode, static = _static(facts, fakes, kept)
            graph.variants.append(build(facts, config, static, mode, kept=kept, reuse=reuse)[1])
        results = next(n for n in module.graph.nodes if n.op == "output").args[0]
        return lambda *real: tuple(_zeros(value(r)) if isinstance(r, torch.fx.Node) else r for r in results)

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(fn, backend=record)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    report.breaks.extend(_compat.graph_breaks())


def _variants(facts: Facts, config: Config) -> list[tuple[int | None, bool]]:
    """The variants to show: nothing pruned or skipped, and the most that the options allow."""
    reuse = can_reuse(facts, config)
    if facts.context is None or not config.context.enabled:
        return [(None, False), (None, True)] if reuse else [(None, False)]
    given = facts.context.frames
    lengths = sorted({min(given, length) for length in config.context.lengths()})
    return [(lengths[0], False), (lengths[-1], True)] if reuse else [(n, False) for n in lengths]


def _static(facts: Facts, fakes: list[Any], kept: int | None):
    """Fake inputs of constant sizes, with the kept number of context frames."""
    context = facts.context
    pruned = kept is not None and context.at_source
    shapes = []
    for fake, node in zip(fakes, placeholders(facts.module.graph)):
        if not isinstance(fake, torch.Tensor):
            size = context.sizes[node.name].size(kept) if pruned and node.name in context.sizes else None
            shapes.append(fake if not isinstance(fake, torch.SymInt) else hint(fake) if size is None else size)
            continue
        dims = [hint(d) for d in fake.shape]
        if pruned and node.name in context.inputs:
            held = context.inputs[node.name]
            dims[held.dim] = held.size(kept)
        shapes.append(torch.empty(dims, dtype=fake.dtype, device="meta"))
    devices = [getattr(f, "device", None) for f in fakes]
    if kept is not None and not context.at_source:
        shapes.append(torch.empty(kept, dtype=torch.int64, device="meta"))
        devices.append(devices[[p.name for p in placeholders(facts.module.graph)].index(next(iter(context.inputs)))])
    return _compat.static_fakes(shapes, devices)


def _zeros(fake: Any) -> Any:
    if not isinstance(fake, torch.Tensor):
        return hint(fake) if isinstance(fake, torch.SymInt) else fake
    return torch.zeros([hint(d) for d in fake.shape], dtype=fake.dtype, device=fake.device)

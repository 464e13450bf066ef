"""The backend ``light_interaction`` of ``torch.compile``. Light to import: torch lists it without importing it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_LOCAL = threading.local()


def light_interaction(gm, example_inputs: Sequence[Any], *, mode: str | None = None,
                      options: Mapping[str, Any] | None = None, ordered: bool = False) -> Callable:
    """Compile a traced graph: find the patterns, rewrite them, hand the rest to Inductor.

    ``torch.compile(fn, backend="light_interaction", options={"preset": "all", "sparse.topk_ratio": 0.2})``; options as
    in :class:`li_compile.Config`, ``mode`` as for Inductor. Raises ConfigError for unknown options and modes. ordered: of
    :class:`li_compile.compiling.Compiled` alone, which watches over caches in tile order (li_compile/handover.py).
    """
    import torch

    from li_compile import _compat
    from li_compile.config import Config
    from li_compile.dispatch import Dispatcher
    from li_compile.errors import LightInteractionError, RewriteError
    from li_compile.patterns.graph import placeholders, value
    from li_compile.patterns.preparation import in_force, is_prepared
    from li_compile.pipeline import canonical, digest, match, report_of, with_caches_in_order
    from li_compile.report import GraphReport

    config = Config.from_options(options or {})
    graphs = {"triton.cudagraphs": True} if config.cuda_graphs and any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs) else {}
    patches = {**_compat.mode_patches(mode), **graphs, **config.inductor}
    key = digest(config.digest() + " in tile order" * ordered)

    def lower(module, inputs):
        if config.lowering == "eager":
            return module
        return _compat.inductor(module, inputs, patches, key)

    report = _LOCAL.report = getattr(_LOCAL, "owned", None) or last_report(new=config.to_options())
    trained = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
    if trained and config.rewrites:
        warnings.warn(
            "light_interaction leaves this graph to Inductor: gradients are on and inputs or weights require them, and the "
            "rewrites are for inference. Call the model under torch.inference_mode() or torch.no_grad().", stacklevel=2)
    if trained or not config.rewrites:
        report.graphs.append(GraphReport(len(report.graphs), len(gm.graph.nodes), {}, []))
        return lower(gm, example_inputs)
    # Dynamo's fake values, with symbolic sizes where it made them dynamic; the example inputs may be real tensors.
    fakes = [value(p) for p in placeholders(gm.graph)]
    try:
        facts = match(canonical(gm, fakes, config), config)
        facts = with_caches_in_order(facts) if ordered else facts
    except LightInteractionError:
        raise
    except Exception as error:
        text = f"light_interaction could not read this graph and leaves it to Inductor: {type(error).__name__}: {error}"
        if config.strict:
            raise RewriteError(f"{text}. Report it with the graph, or compile without strict.") from error
        warnings.warn(text, stacklevel=2)
        return lower(gm, example_inputs)
    report.prepared = in_force()
    if not is_prepared(facts.family):
        warnings.warn(
            f"this graph is of family {facts.family.name}, whose preparation was not run: there was no model of it when torch looked the "
            "backend up. Compile it with li_compile.compile(model, ...), which prepares first, or expect graph breaks.", stacklevel=2)
    graph_report = report_of(len(report.graphs), facts)
    report.graphs.append(graph_report)
    if facts.empty:
        warnings.warn(
            "light_interaction found nothing to rewrite in this graph and compiles it as Inductor does. Looked for: "
            "attention over latent frames, context concatenation, a denoising loop. li_compile.explain says why not.",
            stacklevel=2)
    return Dispatcher(facts, config, example_inputs, fakes, lower, graph_report)


@contextlib.contextmanager
def reporting(report) -> Iterator[None]:
    """Graphs that this thread compiles meanwhile are told in ``report``, whatever their options."""
    before, _LOCAL.owned = getattr(_LOCAL, "owned", None), report
    try:
        yield
    finally:
        _LOCAL.owned = before


def last_report(new: dict[str, Any] | None = None):
    """The report of the graphs compiled last in this thread under one set of options (``new`` starts or continues it)."""
    from li_compile.report import Report

    current = getattr(_LOCAL, "report", None)
    if new is not None and (current is None or current.options != new):
        current = _LOCAL.report = Report(new)
    return current

"""Variants of one graph, compiled when first needed; which one runs is decided in ``li_compile.calls``."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from li_compile import _compat, handover
from li_compile.calls import Calls, Known
from li_compile.config import Config
from li_compile.loops import LoopVariant
from li_compile.patterns import CONTEXT, Miss
from li_compile.pipeline import Base, Facts, build, prepare
from li_compile.regions import lower_regions
from li_compile.report import GraphReport
from li_compile.reuse import why_not
from li_compile.tf32 import tf32, within_tf32


_WARMING: contextvars.ContextVar[bool] = contextvars.ContextVar("li_compile_warming", default=False)


@contextlib.contextmanager
def warming() -> Iterator[None]:
    """Calls of compiled graphs compile first all that a plan could choose for their inputs."""
    token = _WARMING.set(True)
    try:
        yield
    finally:
        _WARMING.reset(token)


class Variant(NamedTuple):
    """What a compiled variant is for. kept: context frames, None: all that are given; sizes: others that may change."""

    kept: int | None
    reuse: bool
    sizes: tuple[torch.Size, ...] = ()


class Dispatcher(Calls):
    """Callable that Dynamo runs in place of the graph.

    Variants with a pruned context have constant sizes and are compiled at their first use; the others are compiled while
    Dynamo traces, since they may have dynamic sizes.
    """

    def __init__(self, facts: Facts, config: Config, inputs: Sequence[Any], fakes: Sequence[Any], lower: Callable,
                 report: GraphReport) -> None:
        super().__init__(Known.of(facts, config), config)
        self.facts, self.lower, self.report = facts, lower, report
        self.lock = threading.Lock()
        self.compiled: dict[Variant, LoopVariant] = {}
        # Of each context length: the graph before its variants part, and the regions that they share, compiled.
        self.bases: dict[tuple, tuple[Base, dict[str, Callable]]] = {}
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
            for reuse in (False, True) if self.known.reuses else (False,):
                self._add(Variant(None, reuse), inputs, fakes, _compat.fake_mode_of(fakes))
        # Of caches that are handed on in tile order: the order of those that the graph reads, and of those that it returns.
        order = handover.Order(config.sparse.tile, facts.sites[0].grid) if facts.ordered and facts.sites else None
        self.reads = order if any(s.role == CONTEXT for site in facts.sites for s in site.segments) else None
        self.returns = order if self.reads is None and order is not None and report.variants[0].counts()["tile_order"] else None

    def __call__(self, *args: Any):
        if _WARMING.get() and self.prunes:
            self.warm(args)
        if self.reads is not None:
            handover.check(self.reads)
        out = super().__call__(*args)
        for x in out if self.returns is not None else ():
            if isinstance(x, torch.Tensor):
                handover.remember(x, self.returns)
        return out

    def warm(self, args: Sequence[Any]) -> None:
        """Compile the variants for these inputs, and for less context than they hold, that the policy can come to."""
        name, held = next(iter(self.known.context.inputs.items()))
        given = held.frames(args[self.names.index(name)].shape[held.dim])
        for kept in self.config.context.kept_of(given):
            if kept == given and not self.known.context.at_source:  # all of a cache: the graph as it is
                continue
            fewer = self.select(args, given, range(kept))
            for reuse in (False, True) if self.known.reuses and self.config.may_reuse(kept) else (False,):
                self.variant(kept, reuse, fewer)

    def variant(self, kept: int | None, reuse: bool, args: Sequence[Any]) -> LoopVariant:
        sizes = () if kept is None else tuple(args[i].shape for i in self.other)
        wanted = Variant(kept, reuse, sizes)
        run = self.compiled.get(wanted)
        return self._compile_now(wanted, args) if run is None else run

    def _compile_now(self, variant: Variant, args: Sequence[Any]) -> LoopVariant:
        with self.lock:
            if variant not in self.compiled:
                mode, fakes = _compat.static_fakes(args, free=self.free)
                self._add(variant, fakes if self.free else args, fakes, mode)
            return self.compiled[variant]

    def _add(self, variant: Variant, inputs: Sequence[Any], fakes: Sequence[Any], mode) -> None:
        started, length = time.perf_counter(), (variant.kept, variant.sizes)
        if length not in self.bases:
            self.bases[length] = prepare(self.facts, self.config, fakes, mode, variant.kept), {}
        base, regions = self.bases[length]
        module, report = build(self.facts, self.config, fakes, mode, kept=variant.kept, reuse=variant.reuse, base=base)
        self.report.variants.append(report)
        unrecorded = _compat.without_cuda_graph()
        in_tf32 = self.config.exact.islands == "tf32" and report.counts().get("islands", 0) > 0
        with tf32() if in_tf32 else contextlib.nullcontext():  # Inductor's own products are written for it or not
            run = lower_regions(module, inputs, self.lower, regions)
        if self.config.cuda_graphs and _compat.without_cuda_graph() > unrecorded:
            self.report.misses.append(Miss("CUDA graphs", "graph", "Inductor records none of this graph, or of a part of it; TORCH_LOGS=perf_hints says why"))
        self.compiled[variant] = LoopVariant.of(self.facts, module, report, within_tf32(run) if in_tf32 else run)
        report.seconds = time.perf_counter() - started


def free_numbers(fakes: Sequence[Any], pruned: set[str], names: Sequence[str]) -> list[int]:
    """Positions of symbolic numbers that are no tensor's size, such as the frame at which a chunk starts."""
    sizes = {str(d) for fake in fakes if isinstance(fake, torch.Tensor) for d in fake.shape if isinstance(d, torch.SymInt)}
    return [i for i, (name, fake) in enumerate(zip(names, fakes))
            if isinstance(fake, torch.SymInt) and name not in pruned and str(fake) not in sizes]

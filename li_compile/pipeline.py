"""From a traced graph to variants: canonical form, matching, and the passes in their fixed order."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pathlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.fx import GraphModule

from li_compile import _compat, patterns
from li_compile.config import Config
from li_compile.errors import ConfigError, RewriteError
from li_compile.passes.cost import cost
from li_compile.passes.dead_tails import dead_tails
from li_compile.passes.equal_rows import equal_rows
from li_compile.passes.forward_stores import forward_stores
from li_compile.passes.functional_writes import functional_writes
from li_compile.passes.invariants import invariants
from li_compile.passes.islands import describe as describe_islands
from li_compile.passes.islands import lower_islands
from li_compile.passes.merge_regions import merge_regions
from li_compile.passes.normalize import normalize
from li_compile.passes.pack_context import pack_context
from li_compile.passes.propagate import propagate, tidy
from li_compile.passes.prune_cache import prune_cache
from li_compile.passes.prune_context import prune_context
from li_compile.passes.real_arithmetic import real_arithmetic
from li_compile.passes.record import Record, Refused
from li_compile.passes.share_steps import share_steps
from li_compile.passes.sparse_attention import sparse_attention
from li_compile.patterns import registry
from li_compile.patterns.context_check import check_context
from li_compile.patterns.graph import placeholders, value
from li_compile.report import GraphReport, VariantReport
from li_compile.reuse import apply_reuse, describe, found_loop


# In this order: values that are written in place cannot be moved, rows are found before equal nodes are merged (which hides
# none), and regions are compared when they are as small as they get.
EXACT = (functional_writes, real_arithmetic, equal_rows, invariants, dead_tails, merge_regions)


@dataclasses.dataclass
class Facts:
    """What was matched in a canonical graph. context and loop are None where there is none or the part is off."""

    module: GraphModule
    sites: list[patterns.AttentionSite]
    context: patterns.ContextConcat | None
    loop: patterns.DenoisingLoop | None
    misses: list[patterns.Miss]

    @property
    def empty(self) -> bool:
        return not self.sites and self.context is None and self.loop is None


@cache
def digest(canonical_options: str) -> str:
    """sha256 over our sources, the options, and the versions of torch and of registered families: a cache key."""
    import li_compile

    sha = hashlib.sha256(canonical_options.encode())
    sha.update(torch.__version__.encode())
    root = pathlib.Path(li_compile.__file__).parent
    folders = [root, *(pathlib.Path(m.__file__).parent for m in (patterns, *_folders()))]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            sha.update(path.read_bytes())
    for family in registry.families().values():
        sha.update(repr(family).encode())
    return sha.hexdigest()


def _folders():
    from li_compile import kernels, passes

    return passes, kernels


def family_of(config: Config) -> patterns.Family | None:
    if config.family is None:
        return None
    known = registry.families()
    if config.family not in known:
        raise ConfigError(f"family {config.family!r} is unknown; known: {', '.join(sorted(known)) or 'none'}")
    return known[config.family]


def canonical(module: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """A normalised copy of a traced graph, with shapes on every node."""
    module = copy.deepcopy(module)
    normalize(module)
    forward_stores(module)
    tidy(module)
    propagate(module, inputs, _compat.fake_mode_of(inputs))
    return module


def match(module: GraphModule, config: Config) -> Facts:
    """Find the patterns in a canonical graph."""
    family = family_of(config)
    grid = config.sparse.grid or (family.grid if family else None)
    sites, misses = patterns.find_attention(module, grid)
    context, why = patterns.find_context(module, sites, dict(family.roles) if family else None)
    if context is not None:
        context, why = check_context(module, context, family.positions if family else None)
    loop, why_not = patterns.find_loop(module)
    return Facts(module, sites, context, loop, [*misses, *why, *why_not])


@dataclasses.dataclass
class Base:
    """A graph after the passes that all variants of one context length share. observe: told of each pass that was done."""

    module: GraphModule
    records: list[Record]
    observe: Callable[[str, GraphModule], None] | None = None


def report_of(index: int, facts: Facts) -> GraphReport:
    """The matched half of a graph's report."""
    found: dict[str, Any] = {}
    for kind in ("prefill", "decode"):
        here = [s for s in facts.sites if s.kind == kind]
        if here:
            found[f"attention, {kind}"] = f"{sum(len(s.calls) for s in here)} sites, grid {here[0].grid[0]} x " \
                                          f"{here[0].grid[1]}, {here[0].branches} branches"
    if facts.context is not None:
        c = facts.context
        found["context"] = f"{c.sites} concatenations (form {c.form}), {c.tokens} tokens a frame, inputs {', '.join(c.inputs)}" \
                           + ("" if c.history_w2c else "; no cameras among them: pruned by Session.chunk()")
    if facts.loop is not None:
        found["denoising loop"] = describe(facts.loop)
    if (islands := describe_islands(facts.module)) is not None:
        found["precision islands"] = islands
    flops, moved = cost(facts.module)
    return GraphReport(index, len(facts.module.graph.nodes), found, facts.misses, flops, moved)


def build(facts: Facts, config: Config, inputs: Sequence[Any], mode, *, kept: int | None, reuse: bool,
          base: Base | None = None, observe: Callable[[str, GraphModule], None] | None = None) -> tuple[GraphModule, VariantReport]:
    """Run the passes for one variant. base: what ``prepare`` gave for this context length, if it was run before.
    observe: called with each pass's name and the graph after it."""
    base = base or prepare(facts, config, inputs, mode, kept, observe)
    variant = Base(copy.deepcopy(base.module), list(base.records), observe)
    apply_reuse(partial(_apply, variant, config, inputs, mode), facts, config, reuse)
    flops, moved = cost(variant.module)
    return variant.module, VariantReport(kept, reuse, variant.records, flops, moved)


def prepare(facts: Facts, config: Config, inputs: Sequence[Any], mode, kept: int | None,
            observe: Callable[[str, GraphModule], None] | None = None) -> Base:
    """Run the passes that all variants of one context length share: exact first, then approximate.

    inputs: fake tensors of mode, already of the kept context length; where only cached keys and values are at hand, of the
    length as it is, with the vector of kept frames after them. A pass that fails leaves the graph as it was,
    with a warning, or raises RewriteError under ``strict``; pruning cannot be left out, and raises in any case.
    """
    base = Base(copy.deepcopy(facts.module), [], observe)
    apply = partial(_apply, base, config, inputs, mode)
    if kept is not None and facts.context.at_source:
        apply("prune_context", lambda m: prune_context(m, facts.context, kept), needed=True)
    elif kept is not None:
        # Block-sparse attention selects blocks itself and takes whole segments; dense attention can read by lists of frames.
        by_lists = None if config.sparse.enabled or facts.context.tokens % config.sparse.block_size else config.sparse.block_size
        apply("prune_context", lambda m: prune_cache(m, facts.context, patterns.find_attention(m, config.sparse.grid or _grid(facts))[0],
                                                     by_lists), needed=True)
    if config.exact.enabled:
        for run in EXACT:
            if getattr(config.exact, run.__name__):
                with_loop = run is invariants and facts.loop is not None
                apply(run.__name__, (lambda m: invariants(m, found_loop(m))) if with_loop else run)
        if config.exact.islands == "bf16":
            apply("islands", lower_islands)
    if config.sparse.enabled:
        s = config.sparse
        apply("sparse_attention", lambda m: sparse_attention(
            m, patterns.find_attention(m, s.grid or _grid(facts))[0], topk_ratio=s.topk_ratio,
            prefill_ratio=s.prefill_ratio, tile=s.tile, block_size=s.block_size, sub_blocks=s.sub_blocks,
            min_context=s.min_context, skip_layers=s.skip_layers, summary=s.summary, head_ratios=s.head_ratios))
        apply("pack_context", pack_context)
    if config.exact.enabled and config.exact.shared_steps and facts.loop is not None:
        apply("share_steps", lambda m: share_steps(m, found_loop(m), config.exact.invariants))
    return base


def _apply(base: Base, config: Config, inputs: Sequence[Any], mode, name: str, run: Callable[[GraphModule], Record],
           needed: bool = False) -> None:
    trial = copy.deepcopy(base.module)
    try:
        record = run(trial)
        tidy(trial)
        added = [value(p) for p in placeholders(trial.graph)[len(inputs):]]
        propagate(trial, [*inputs, *added], mode)
    except Refused as why:
        base.records.append(Record(name, misses=[why.miss]))
    except Exception as error:
        text = f"pass {name} failed on this graph and was left out: {type(error).__name__}: {error}"
        if needed or config.strict:
            raise RewriteError(f"{text}. Switch the part off, or report this with the graph.") from error
        warnings.warn(text, stacklevel=2)
        base.records.append(Record(name, misses=[patterns.Miss(name, "graph", text)]))
    else:
        record.flops, record.bytes = (old - new for old, new in zip(cost(base.module), cost(trial)))
        base.module = trial
        base.records.append(record)
        if base.observe is not None:
            base.observe(name, trial)


def _grid(facts: Facts) -> tuple[int, int] | None:
    return facts.sites[0].grid if facts.sites else None

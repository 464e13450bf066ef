"""From a traced graph to variants: canonical form, matching, and the passes in their fixed order."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch.fx import GraphModule

from li_compile import _compat, patterns
from li_compile.config import Config
from li_compile.errors import ConfigError, PatternError, RewriteError
from li_compile.passes.cost import cost
from li_compile.passes.dead_tails import dead_tails
from li_compile.passes.dense_attention import dense_attention
from li_compile.passes.encode import encode
from li_compile.passes.equal_rows import equal_rows
from li_compile.passes.fold_encodings import fold_encodings
from li_compile.passes.forward_stores import forward_stores
from li_compile.passes.functional_writes import functional_writes
from li_compile.passes.index_slices import index_slices
from li_compile.passes.invariants import invariants
from li_compile.passes.islands import describe as describe_islands
from li_compile.passes.islands import islands_in_tf32, lower_islands
from li_compile.passes.linear_gelu import linear_gelu
from li_compile.passes.merge_regions import merge_regions
from li_compile.passes.normalize import normalize
from li_compile.passes.pack_context import pack_context
from li_compile.passes.padding import padding_left_out
from li_compile.passes.propagate import propagate, tidy
from li_compile.passes.plain_einops import plain_einops
from li_compile.passes.prune_cache import prune_cache
from li_compile.passes.prune_context import prune_context
from li_compile.passes.real_arithmetic import real_arithmetic
from li_compile.passes.record import Record, Refused
from li_compile.passes.regions import drop_unused
from li_compile.passes.repeated_blocks import repeated_blocks
from li_compile.passes.respell import respell
from li_compile.passes.share_steps import share_steps
from li_compile.passes.small_products import small_products
from li_compile.passes.sparse_attention import sparse_attention
from li_compile.passes.split_cone import split_cone
from li_compile.passes.tile_order import tile_order
from li_compile.patterns import registry
from li_compile.patterns.context_check import check_context
from li_compile.patterns.find_spellings import Found, find_spellings, fired, never_fired
from li_compile.patterns.graph import hint, placeholders, subgraphs, value
from li_compile.patterns.matching import input_shapes, match_attention, match_context, match_loop
from li_compile.patterns.recognise import FRAME, family_of_graph, group_of, qualified
from li_compile.report import GraphReport, VariantReport
from li_compile.reuse import apply_reuse, describe, found_loop


ANYWHERE = ("keys and values that this graph returns or is given may go anywhere and come from anywhere: they stay in the model's order. In a "
            "pipeline's rollout, li_compile.compile(pipeline), they go from an encoding to its steps alone")

# In this order: of equal regions the others then see one, values that are written in place cannot be moved, rows are found before equal
# nodes are merged (which hides none).
EXACT = (merge_regions, functional_writes, real_arithmetic, equal_rows, encode, small_products, invariants, dead_tails)
# What puts operators of ours in the place of PyTorch's, which the others look for; of the blocks that come of it, equal ones are folded.
LAST = (dense_attention, linear_gelu, repeated_blocks)


@dataclasses.dataclass
class Facts:
    """What was matched in a canonical graph. context and loop are None where there is none or the part is off. ordered: its caller hands
    caches in tile order from encodings to steps (li_compile/handover.py)."""

    module: GraphModule
    sites: list[patterns.AttentionSite]
    context: patterns.ContextConcat | None
    loop: patterns.DenoisingLoop | None
    misses: list[patterns.Miss]
    family: patterns.Family | None = None
    ordered: bool = False

    @property
    def empty(self) -> bool:
        return not self.sites and self.context is None and self.loop is None


def digest(canonical_options: str) -> str:
    """sha256 over our sources, the options, the version of torch and what is registered: a cache key."""
    return _digest(canonical_options, registry.identity())


@cache
def _digest(canonical_options: str, registered: str) -> str:
    import li_compile

    sha = hashlib.sha256((canonical_options + registered).encode())
    sha.update(torch.__version__.encode())
    root = pathlib.Path(li_compile.__file__).parent
    folders = [root, *(pathlib.Path(m.__file__).parent for m in (patterns, *_folders()))]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            sha.update(path.read_bytes())
    return sha.hexdigest()


def _folders():
    from li_compile import kernels, passes

    return passes, kernels


def family_of(config: Config, module: GraphModule | None = None) -> patterns.Family | None:
    """The family that the config names, else the one that a graph's modules belong to, else None.

    Raises ConfigError for an unknown name, PatternError where several families claim a graph.
    """
    if config.family is None:
        found = family_of_graph(module) if module is not None else []
        if len(found) > 1:
            raise PatternError(f"families {' and '.join(f.name for f in found)} both claim the modules of this graph; say which with "
                               "Config(family=...)")
        return found[0] if found else None
    known = registry.families()
    if config.family not in known:
        raise ConfigError(f"family {config.family!r} is unknown; known: {', '.join(sorted(known)) or 'none'}")
    return known[config.family]


def canonical(module: GraphModule, inputs: Sequence[Any], config: Config | None = None) -> GraphModule:
    """A normalised copy of a traced graph, with shapes on every node."""
    module = copy.deepcopy(module)
    module.meta[FRAME] = [qualified(type(m)) for m in _compat.frame_modules()]
    plain_einops(module)
    respell(module, family_of(config or Config(), module))
    index_slices(module)
    normalize(module)
    split_cone(module)
    forward_stores(module)
    for region, sub in subgraphs(module).items():  # Dynamo of 2.11 hands a region sizes that it does not read, and a like one none
        drop_unused(module, sub, region)
    tidy(module)
    propagate(module, inputs, _compat.fake_mode_of(inputs))
    return module


def match(module: GraphModule, config: Config) -> Facts:
    """Find the patterns in a canonical graph.

    A registered pattern that is ambiguous, disagrees with the graph or, named by the family, fires nowhere raises
    PatternError under ``strict``; else it is a warning, and what it concerns is left alone.
    """
    family = family_of(config, module)
    left = find_spellings(module, family)
    sites, misses = match_attention(module, family, config.sparse.grid)
    context, why, bad_context = match_context(module, sites, family)
    if context is not None:
        context, why = check_context(module, context, family.positions if family else None)
    loop, why_not, bad_loop = match_loop(module, family)
    wrong = [*left.wrong, *(never_fired(module, family) if family else []), *bad_context, *bad_loop]
    for miss in wrong:
        text = f"{miss.reason} ({miss.where or miss.node})"
        if config.strict:
            raise PatternError(text)
        warnings.warn(text, stacklevel=3)
    return Facts(module, sites, context, loop, [*left.misses, *wrong, *_told(misses, left), *why, *why_not], family)


def with_caches_in_order(facts: Facts) -> Facts:
    """The facts of a graph whose caller hands on caches in tile order: what a plan would drop of a cache was left out when it was made, and could
    not be found in it."""
    return dataclasses.replace(facts, context=None, ordered=True)


def _told(misses: list[patterns.Miss], left: Found) -> list[patterns.Miss]:
    """Without "no attention in this graph" where there is one that could not be respelled, which says more."""
    return [m for m in misses if m.node != "graph"] if left.misses or left.wrong else misses


@dataclasses.dataclass
class Base:
    """A graph after the passes that all variants of one context length share. observe: told of each pass that was done; settled: whether
    its shapes are those of its inputs, which they are from the first pass on."""

    module: GraphModule
    records: list[Record]
    observe: Callable[[str, GraphModule], None] | None = None
    settled: bool = False


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
        found["context"] = f"{c.sites} concatenations (form {c.form}), {c.tokens} tokens a frame, inputs {_some(list(c.inputs))}" \
                           + ("" if c.history_w2c else "; no cameras among them: pruned by Session.chunk()")
    if facts.loop is not None:
        found["denoising loop"] = describe(facts.loop)
    if (islands := describe_islands(facts.module)) is not None:
        found["precision islands"] = islands
    for pattern, count in fired(facts.module).items():
        found[f"pattern {pattern}"] = f"{count} nodes put into canonical form"
    if facts.family is not None:
        found["family"] = facts.family.name
    flops, moved = cost(facts.module)
    return GraphReport(index, len(facts.module.graph.nodes), found, facts.misses, flops, moved, prepared=_prepared(facts))


def _prepared(facts: Facts) -> list[Record]:
    """What the family's preparation left out of a graph."""
    family = facts.family
    if family is None or family.padded is None or not facts.sites or (latents := family.padded(input_shapes(facts.module))) is None:
        return []
    tokens, padded = (hint(n) * math.prod(facts.sites[0].grid) for n in latents)
    record = padding_left_out(facts.module, tokens, padded, lambda node: group_of(node, family) in family.never_padded)
    return [] if record is None else [record]


def constant_lengths(facts: Facts) -> set[int]:
    """Sizes that inputs have from a context whose length is a constant of the graph: its frames, and their tokens, which cached keys and
    values have. Empty where it is none, or where there is no context."""
    decode = [s for s in facts.sites if s.kind == "decode"]
    frames = decode[0].frames(patterns.CONTEXT) if decode else None
    return {frames, frames * decode[0].grid[0] * decode[0].grid[1]} if isinstance(frames, int) else set()


def _some(names: list[str]) -> str:
    """The names, of many the first ones and how many more."""
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:4])} and {len(names) - 4} more"


def build(facts: Facts, config: Config, inputs: Sequence[Any], mode, *, kept: int | None, reuse: bool,
          base: Base | None = None, observe: Callable[[str, GraphModule], None] | None = None) -> tuple[GraphModule, VariantReport]:
    """Run the passes for one variant. base: what ``prepare`` gave for this context length, if it was run before.
    observe: called with each pass's name and the graph after it."""
    base = base or prepare(facts, config, inputs, mode, kept, observe)
    variant = Base(copy.deepcopy(base.module), list(base.records), observe, base.settled)
    apply = partial(_apply, variant, config, inputs, mode)
    apply_reuse(apply, facts, config, reuse)
    for run in LAST if config.exact.enabled and not facts.empty else ():
        if getattr(config.exact, run.__name__):
            apply(run.__name__, run)
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
        apply("prune_context", lambda m: prune_cache(m, facts.context, _sites(m, facts, config),
                                                     by_lists), needed=True)
    if config.exact.enabled:
        for run in EXACT if not facts.empty else (merge_regions,):  # what is no video model is Inductor's; merging changes no arithmetic
            if getattr(config.exact, run.__name__):
                with_loop = run is invariants and facts.loop is not None
                apply(run.__name__, (lambda m: invariants(m, found_loop(m, facts.family))) if with_loop else run)
    if config.sparse.enabled:
        s = config.sparse
        apply("sparse_attention", lambda m: sparse_attention(
            m, _sites(m, facts, config), topk_ratio=s.topk_ratio,
            prefill_ratio=s.prefill_ratio, tile=s.tile, block_size=s.block_size, sub_blocks=s.sub_blocks,
            min_context=s.min_context, skip_layers=s.skip_layers, summary=s.summary, head_ratios=s.head_ratios))
        if facts.ordered:
            apply("tile_order", tile_order, needed=True)  # what is left as it is would choose among blocks of tokens from everywhere
            apply("fold_encodings", fold_encodings)
        elif config.exact.enabled and config.exact.tile_order and facts.family is not None and facts.family.handed_on is not None:
            base.records.append(Record("tile_order", misses=[patterns.Miss("tile order", "graph", ANYWHERE)]))
        apply("pack_context", pack_context)
    if config.exact.enabled and config.exact.islands != "keep":  # after what moves products: none leaves an autocast of its own
        apply("islands", lower_islands if config.exact.islands == "bf16" else islands_in_tf32)
    if config.exact.enabled and config.exact.shared_steps and facts.loop is not None:
        apply("share_steps", lambda m: share_steps(m, found_loop(m, facts.family), config.exact.invariants,
                                                         invariant_memory(config.exact.invariant_memory, inputs)))
    return base


def invariant_memory(share: float, inputs: Sequence[Any]) -> float:
    """Bytes that are this share of the memory of the inputs' device; infinite where it is not at hand, as of a GPU of another machine."""
    kind = next((x.device.type for x in inputs if isinstance(x, torch.Tensor)), None)
    if kind == "cuda" and torch.cuda.is_available():
        return int(share * torch.cuda.get_device_properties("cuda").total_memory)
    if kind == "cpu" and hasattr(os, "sysconf"):
        return int(share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf


def static_inputs(facts: Facts, fakes: Sequence[Any], kept: int | None):
    """(mode, fake inputs) of constant sizes, with the kept number of context frames, for ``build``."""
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


def _apply(base: Base, config: Config, inputs: Sequence[Any], mode, name: str, run: Callable[[GraphModule], Record],
           needed: bool = False) -> None:
    trial = copy.deepcopy(base.module)
    try:
        record = run(trial)
        if not record.count and base.settled:  # most passes find nothing in most graphs
            trial = base.module
        else:
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
        if trial is not base.module:
            record.flops, record.bytes = (old - new for old, new in zip(cost(base.module), cost(trial)))
        base.module, base.settled = trial, True
        base.records.append(record)
        if base.observe is not None:
            base.observe(name, trial)


def _sites(module: GraphModule, facts: Facts, config: Config) -> list[patterns.AttentionSite]:
    """The attention sites of a graph that passes have changed since it was matched."""
    grid = config.sparse.grid or (facts.sites[0].grid if facts.sites else None)
    return match_attention(module, facts.family, grid)[0]

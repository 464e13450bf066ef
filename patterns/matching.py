"""All matchers, ours and registered ones, in a canonical graph of a family (or of none)."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule

from .attention import AttentionSite, find_attention
from .context import ContextConcat, find_context
from .context_cache import cache_reads
from .graph import SDPA, Miss, calls, hint, placeholders, shape, source_line, subgraphs
from .loop import DenoisingLoop, find_loop
from .recognise import group_of
from .registry import Family, patterns


def input_shapes(module: GraphModule) -> dict[str, tuple]:
    """Of each tensor among a graph's inputs, as families are asked by."""
    return {p.name: tuple(s) for p in placeholders(module.graph) if (s := shape(p)) is not None}


def match_attention(module: GraphModule, family: Family | None, grid: tuple[int, int] | None) -> tuple[list[AttentionSite], list[Miss]]:
    """Attention sites, without the groups that the family opts out of."""
    sites, misses = find_attention(module, grid or (family.grid if family else None))
    cached = {n.name for n in module.graph.nodes if calls(n, SDPA) and cache_reads(n) is not None}
    misses = [dataclasses.replace(m, reason="its keys are read from a preallocated cache, of which pruned context selects frames; "
                                  "block-sparse attention does not apply") if m.node in cached else m for m in misses]
    if family is not None and family.current is not None:
        new = family.current(input_shapes(module))
        for site in (s for s in sites if s.kind == "prefill"):
            site.protected = new
    if family is None or not family.groups:
        return sites, misses
    nodes = {(source_line(n), n.name): n for m in (module, *subgraphs(module).values()) for n in m.graph.nodes if calls(n, SDPA)}
    say = lambda node, group: Miss("attention", node.name, f"it is of the group {group!r}, which family {family.name!r} leaves alone", source_line(node))
    kept = [s for s in sites if group_of(s.node, family) not in family.opt_out]
    told = [say(s.node, group_of(s.node, family)) for s in sites if s not in kept]
    for i, m in enumerate(misses):  # what no matcher would have taken either is left alone because the family says so
        node = nodes.get((m.where, m.node))
        group = group_of(node, family) if node is not None else None
        if group in family.opt_out:
            misses[i] = dataclasses.replace(m, reason=f"{say(node, group).reason}; besides, {m.reason}")
    return kept, misses + told


def match_context(module: GraphModule, sites: list[AttentionSite], family: Family | None
                  ) -> tuple[ContextConcat | None, list[Miss], list[Miss]]:
    """(context, misses, what a registered pattern does that it must not)."""
    if family is not None and "context" in family.opt_out:
        return None, [Miss("context", "graph", f"family {family.name!r} opts out of pruned context")], []
    roles, wanted = dict(family.roles) if family else {}, family.context if family else None
    found, misses, wrong = _registered("context", wanted, lambda find: find(module, sites, roles))
    if found is not None and (why := _disagrees(module, found[1])) is not None:
        wrong.append(Miss("context", "graph", f"pattern {found[0]!r}: {why}"))
        found = None
    if found is not None or wrong or wanted in {p.name for p in patterns("context") if p.find}:
        return found and found[1], misses, wrong
    context, why = find_context(module, sites, roles or None)
    if context is not None and wanted not in (None, context.form):
        return None, [Miss("context", "graph", f"this graph holds its context in the form {context.form!r}, and family {family.name!r} "
                           f"names {wanted!r}")], []
    return context, misses + why, []


def match_loop(module: GraphModule, family: Family | None) -> tuple[DenoisingLoop | None, list[Miss], list[Miss]]:
    """(loop, misses, what a registered pattern does that it must not)."""
    if family is not None and "loop" in family.opt_out:
        return None, [Miss("denoising loop", "graph", f"family {family.name!r} opts out of cached steps")], []
    wanted = family.loop if family else None
    found, misses, wrong = _registered("loop", wanted, lambda find: find(module))
    if found is not None or wrong or wanted is not None:
        return found and found[1], misses, wrong
    loop, why = find_loop(module)
    return loop, misses + why, []


def _registered(kind: str, wanted: str | None, run) -> tuple[tuple | None, list[Miss], list[Miss]]:
    """What the registered matchers of a kind find: ((name, fact) or None, misses, wrong)."""
    found, misses = [], []
    for pattern in patterns(kind):
        if pattern.find is None or wanted not in (None, pattern.name):
            continue
        read = run(pattern.find)
        if isinstance(read, Miss):
            misses.append(read)
        elif read is not None:
            found.append((pattern.name, read))
    known = {p.name for p in patterns(kind) if p.find is not None}
    if len(found) > 1:
        return None, misses, [Miss(kind, "graph", f"patterns {' and '.join(repr(n) for n, _ in found)} both fire on this graph; name one "
                                   "in the family")]
    if not found and wanted in known:
        return None, misses, [Miss(kind, "graph", f"pattern {wanted!r}, which the family names, fires nowhere in this graph"
                                   + (f" ({misses[0].reason})" if misses else ""), misses[0].where if misses else "")]
    if kind == "loop" and wanted is not None and wanted not in known:
        return None, misses, [Miss(kind, "graph", f"the family names the loop pattern {wanted!r}, which nobody has registered")]
    return (found[0] if found else None), misses, []


def _disagrees(module: GraphModule, context: ContextConcat) -> str | None:
    """How a context that a registered pattern gives does not fit its graph."""
    inputs = {p.name: shape(p) for p in placeholders(module.graph)}
    for name, held in context.inputs.items():
        if inputs.get(name) is None:
            return f"it names the input {name!r}, and the graph has {', '.join(n for n, s in inputs.items() if s is not None)}"
        size = hint(inputs[name][held.dim]) if held.dim < len(inputs[name]) else None
        if context.form != "slices" and size != held.size(context.frames):
            return (f"it says that {name} holds {context.frames} frames of {held.per} and {held.rest} more along dimension {held.dim}, "
                    f"and that has {inputs[name]}")
    return None

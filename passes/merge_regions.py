"""Equal regions become one, exact: a block that is called N times is compiled once.

Before::                                     After::

    x1 = invoke_subgraph(block_0, x0, w0)        x1 = invoke_subgraph(block_0, x0, w0)
    x2 = invoke_subgraph(block_1, x1, w1)        x2 = invoke_subgraph(block_0, x1, w1)

Dynamo gives calls of a region one identifier where it is sure that they trace alike (from 2.13 on for layers with weights
of their own; in 2.11 each layer has one), and other passes split regions. Two regions are equal if their graphs are,
operator for operator, constants and the layout of what they are handed included. Sizes that are symbols may be others, as long as
what the region gives has none: Dynamo gives each layer's cache a size of its own.
"""

from __future__ import annotations

import re

import torch
from torch.fx import GraphModule

from li_compile.patterns._compat import free_symbols
from li_compile.patterns.effects import mode_texts
from li_compile.patterns.graph import placeholders, region_calls, subgraphs, value

from .propagate import layout
from .record import Record
from .regions import retarget


def merge_regions(module: GraphModule) -> Record:
    """Retarget calls, in place. Counts the regions that are no longer needed."""
    record = Record("merge_regions")
    first: dict[str, str] = {}
    modes = mode_texts(module.graph)
    for region, sub in subgraphs(module).items():
        # Traced once, a region keeps the autocast of its first call.
        around = {modes[call] for call in region_calls(module, region)}
        kept = first.setdefault(f"{sorted(around)}\n{signature(sub)}", region)
        if kept == region:
            continue
        for call in region_calls(module, region):
            retarget(module, call, kept)
        record.count += 1
    if record.count:
        record.details.append(f"{record.count + len(first)} regions, {len(first)} different ones")
    return record


def signature(sub: GraphModule) -> str:
    """What a region computes, as text: equal for two regions that compute the same of operands of the same layout."""
    numbers = {node: i for i, node in enumerate(sub.graph.nodes)}
    text = lambda x: repr(torch.fx.map_arg(x, lambda n: f"%{numbers[n]}"))
    names = _names(sub)
    lines = [_renamed(layout(value(p)), names) for p in placeholders(sub.graph)]
    for node in sub.graph.nodes:
        what = "" if node.op == "placeholder" else str(node.target)
        if node.op == "get_attr":  # another region, or a constant that only this region has
            inner = getattr(sub, node.target)
            what = signature(inner) if isinstance(inner, GraphModule) else f"constant {id(inner)}"
        lines.append(f"{node.op} {what} {text(node.args)} {text(node.kwargs)}")
    return "\n".join(lines)


def _names(sub: GraphModule) -> dict[str, str]:
    """Names for the size symbols of a region's operands, by where they first occur; none where its results depend on them."""
    results = sub.graph.output_node().all_input_nodes
    if any(free_symbols(value(n)) for n in results if isinstance(value(n), (torch.Tensor, torch.SymInt))):
        return {}
    found: dict[str, str] = {}
    for p in placeholders(sub.graph):
        if isinstance(value(p), (torch.Tensor, torch.SymInt)):
            for symbol in sorted(map(str, free_symbols(value(p)))):
                found.setdefault(symbol, f"size {len(found)}")
    return found


def _renamed(what, names: dict[str, str]) -> str:
    return re.sub(r"\b[su]\d+\b", lambda m: names.get(m[0], m[0]), str(what))

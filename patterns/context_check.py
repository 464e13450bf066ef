"""What must hold for a context before it may be pruned."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule

from ._compat import free_symbols
from .context import ContextConcat, miss
from .graph import Miss, placeholders, shape, value

__all__ = ["check_context"]


def check_context(module: GraphModule, context: ContextConcat, positions: str | None) -> tuple[ContextConcat | None, list[Miss]]:
    """The context with its family's positions rule, or None with the reason why it is to be left alone.

    positions: "keep", "compact" or None, as in ``Family``.
    """
    out = _results(module, context) if context.at_source else None
    if out is not None:
        return None, [miss(f"the graph returns {out}, whose size depends on the number of context frames: with fewer frames it would hand "
                           "back fewer than its caller expects", None)]
    if positions == "keep" and context.positions is None and context.at_source:
        return None, [miss("the family keeps temporal indices, but in this graph they follow from the context's length, and would be "
                           "compacted; give them as an integer input [frames], or name it in the family's roles as 'positions'")]
    if positions == "compact" and not context.at_source:
        return None, [miss("the family compacts temporal indices, but the cached keys are rotated already; compile the encoding of the "
                           "context and the denoising loop as one function, or select the frames before they are encoded")]
    return dataclasses.replace(context, compact=positions == "compact"), []


def _results(module: GraphModule, context: ContextConcat) -> str | None:
    """The first output whose shape depends on a size that pruning changes."""
    changed = set()
    for p in placeholders(module.graph):
        if p.name in context.inputs:
            changed |= free_symbols(shape(p)[context.inputs[p.name].dim])
        elif p.name in context.sizes:
            changed |= free_symbols(value(p))
    output = module.graph.output_node()
    for node in output.all_input_nodes:
        sizes = shape(node) or ((value(node),) if isinstance(value(node), torch.SymInt) else ())
        if any(free_symbols(s) & changed for s in sizes):
            return node.name
    return None


"""Pruned context: a variant of the graph that is given fewer context frames.

Before (N is a dynamic size)::                 After::

    prefill(context_latents [.., N, ..])           the same graph with N = kept, a constant
    k = cat([text_k, context_k, k])                the frames are selected at the entrance, once a chunk

Memory that goes through the model with the new frames is pruned in the same way::

    x = cat([x_memory, x], 2)                      fewer frames in x_memory, fewer tokens of time and masks, and of what
                                                   holds both, such as camera rays, fewer of the first entries

Paper section 3.1; selection itself is the policy's. Everything behind the entrance is computed for kept frames only:
embedding, prefill, the concatenated keys and values, attention. Temporal RoPE indices that follow from the context's
length are compacted by this; those that are an input are selected with the frames, or counted back from the newest
where the family compacts them.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, GraphModule, Node

from li_compile.patterns import ContextConcat
from li_compile.patterns.graph import placeholders, region_calls, subgraphs

from .record import Record

ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg}


def prune_context(module: GraphModule, context: ContextConcat, kept: int) -> Record:
    """Make the context length the constant ``kept``, in place; inputs keep their positions."""
    for node in placeholders(module.graph):
        if node.name in context.sizes:
            node.replace_all_uses_with(context.sizes[node.name].size(kept))
    _fold_arithmetic(module.graph)
    for region, sub in subgraphs(module).items():
        _fold_sizes(region_calls(module, region), sub)
        _fold_arithmetic(sub.graph)
    return Record("prune_context", context.sites,
                  [f"{kept} context frames, selected at {len(context.inputs)} inputs: {', '.join(context.inputs)}"])


def _fold_arithmetic(graph: Graph) -> None:
    """Sizes that follow from constants alone become constants too."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ARITHMETIC and not node.kwargs and all(type(a) is int for a in node.args):
            node.replace_all_uses_with(node.target(*node.args))
            graph.erase_node(node)


def _fold_sizes(calls: list[Node], sub: GraphModule) -> None:
    """Sizes that a region was handed as operands and that are constants now become constants inside it.

    Inductor takes no plain number as an operand of a region.
    """
    for i, inner in reversed(list(enumerate(placeholders(sub.graph)))):
        given = {c.args[2 + i] for c in calls if isinstance(c.args[2 + i], int)}
        if len(given) == 1 and all(isinstance(c.args[2 + i], int) for c in calls):
            inner.replace_all_uses_with(given.pop())
            sub.graph.erase_node(inner)
            for call in calls:
                call.args = (*call.args[: 2 + i], *call.args[3 + i :])

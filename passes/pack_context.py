"""Text and history packed once a chunk, exact: sparse attention is parted where the steps' own tokens begin.

Before, in each of N steps::                           After::

    li.sparse_attention(q, [text_k, context_k, k],         packed = li.pack_context([text_k, context_k], [text_v, context_v])
        [text_v, context_v, v], roles=[0, 1, 2], ...)      li.sparse_decode(q, k, v, *packed, ...)     # in each step

Nothing is concatenated, and of a step's keys and values only its own are brought into blocks. Where the attention stands
in a nested region, the packing moves out of it: the region is handed the blocks in place of the keys and values, and calls
that are handed the same ones share them. The blocks live from the first step to the last, in place of what they were
made of.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

import li_compile.kernels  # noqa: F401  (registers the operators)
from li_compile.patterns import CONTEXT, CURRENT, Miss
from li_compile.patterns.graph import SHAPE_ONLY, name_of, placeholders, region_calls, shape, source_line, subgraphs

from .record import Record

WHOLE = torch.ops.li.sparse_attention.default
PACK, STEP = torch.ops.li.pack_context.default, torch.ops.li.sparse_decode.default
# What may stand between a region's operands and its segments: values are moved and repeated, not computed.
MOVES = SHAPE_ONLY | {"repeat", "repeat_interleave"}


def pack_context(module: GraphModule) -> Record:
    """Part the graph's decode attention, in place. Counts the attention calls that no longer pack their context."""
    record = Record("pack_context")
    packs: dict[tuple, list[Node]] = {}
    for region, owner in {"": module, **subgraphs(module)}.items():
        for node in list(owner.graph.nodes):
            if node.target is not WHOLE or CONTEXT not in node.args[3]:
                continue
            reason = _refusal(owner, node, region)
            if reason is not None:
                record.misses.append(Miss("pack context", node.name, reason, source_line(node)))
                continue
            calls = region_calls(module, region) if region else [node]
            packed = [_pack_for(module, owner, node, call, region, packs) for call in calls]
            inside = _hand_in(module, owner, region, calls, packed) if region else packed[0]
            _step(owner, node, inside)
            record.count += len(calls)
        if region:
            _drop_unused(module, owner, region)
    if record.count:
        record.details.append(f"{record.count} attention calls share {len(packs)} packed contexts")
    return record


def _static(node: Node) -> list[int]:
    """Numbers of the segments that are not the current one."""
    return [s for s, role in enumerate(node.args[3]) if role != CURRENT]


def _refusal(owner: GraphModule, node: Node, region: str) -> str | None:
    for s in _static(node):
        for x in (node.args[1][s], node.args[2][s]):
            if not isinstance(shape(x)[2], int):
                return f"the context's length {shape(x)[2]} is not known when compiling, so it is packed at each step"
            while region and x.op != "placeholder":
                if x.op not in ("call_function", "call_method") or name_of(x) not in MOVES or len(x.all_input_nodes) != 1:
                    return f"its context is computed inside the region ({x.name})"
                x = x.all_input_nodes[0]
    return None


def _structure(x) -> object:
    """What makes two values of a graph equal: the same moves of the same nodes."""
    if not isinstance(x, Node):
        return tuple(map(_structure, x)) if isinstance(x, (list, tuple)) else repr(x)
    if x.op in ("call_function", "call_method") and name_of(x) in MOVES:
        return (name_of(x), _structure(x.args), tuple(sorted((k, _structure(v)) for k, v in x.kwargs.items())))
    return x


def _pack_for(module: GraphModule, owner: GraphModule, node: Node, call: Node, region: str, packs: dict) -> list[Node]:
    """The packed context of one call, in the outer graph: made before it, or an earlier call's where it is the same."""
    static = _static(node)
    keys, values = ([_outside(module.graph, owner, x[s], call) if region else x[s] for s in static] for x in node.args[1:3])
    roles = [node.args[3][s] for s in static]
    _, _, _, _, height, width, tile, block_size, _, _, sub_blocks, _, summary, *_ = node.args
    settings = (roles, height, width, tile, block_size, sub_blocks, summary)
    identity = (_structure(keys), _structure(values), repr(settings))
    if identity not in packs:
        with module.graph.inserting_before(call):
            pack = module.graph.call_function(PACK, (keys, values, *settings))
            packs[identity] = [module.graph.call_function(operator.getitem, (pack, i)) for i in range(4)]
        for new in (pack, *packs[identity]):
            new.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return packs[identity]


def _outside(graph: Graph, sub: GraphModule, x: Node, call: Node) -> Node:
    """A value of a region in terms of the operands of one of its calls."""
    if x.op == "placeholder":
        return call.args[2 + placeholders(sub.graph).index(x)]
    args, kwargs = map_arg((x.args, x.kwargs), lambda a: _outside(graph, sub, a, call))
    with graph.inserting_before(call):
        new = graph.create_node(x.op, x.target, args, kwargs)
    new.meta = dict(x.meta)
    return new


def _hand_in(module: GraphModule, sub: GraphModule, region: str, calls: list[Node], packed: list[list[Node]]) -> list[Node]:
    """Four new placeholders of a region, and each call's packed context as their operands."""
    last = placeholders(sub.graph)[-1]
    inside = []
    for i in range(4):
        with sub.graph.inserting_after(inside[-1] if inside else last):
            inside.append(sub.graph.placeholder(f"packed_{i}_{len(placeholders(sub.graph))}"))
    for call, values in zip(calls, packed):
        call.args = (*call.args, *values)
    return inside


def _step(owner: GraphModule, node: Node, packed: list[Node]) -> None:
    q, keys, values, roles, height, width, tile, block_size, topk, _, sub_blocks, scale, *more = node.args
    current = roles.index(CURRENT)
    static = _static(node)
    lengths = [shape(keys[s])[2] for s in static]
    with owner.graph.inserting_before(node):
        new = owner.graph.call_function(STEP, (
            q, keys[current], values[current], *packed, lengths, [roles[s] for s in static], height, width, tile, block_size, topk,
            sub_blocks, scale, *more))  # fmt: skip
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    owner.graph.erase_node(node)


def _drop_unused(module: GraphModule, sub: GraphModule, region: str) -> None:
    """Operands that a region no longer reads, and the moves in it that nothing reads: what they hold could be freed."""
    for node in reversed(list(sub.graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and name_of(node) in MOVES:
            sub.graph.erase_node(node)
    for i, inner in reversed(list(enumerate(placeholders(sub.graph)))):
        if not inner.users:
            sub.graph.erase_node(inner)
            for call in region_calls(module, region):
                call.args = (*call.args[: 2 + i], *call.args[3 + i :])

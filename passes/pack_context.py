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
from torch.fx import GraphModule, Node

import li_compile.kernels  # noqa: F401  (registers the operators)
from li_compile.patterns import CONTEXT, CURRENT, Miss
from li_compile.patterns.graph import name_of, region_calls, shape, source_line, subgraphs

from .record import Record
from .regions import MOVES, drop_unused, hand_in, outside, structure

WHOLE = torch.ops.li.sparse_attention.default
PACK, STEP = torch.ops.li.pack_context.default, torch.ops.li.sparse_decode.default


def pack_context(module: GraphModule) -> Record:
    """Part the graph's decode attention, in place. Counts the attention calls that no longer pack their context."""
    record = Record("pack_context")
    packs: dict[tuple, list[Node]] = {}
    for region, owner in {"": module, **subgraphs(module)}.items():
        for node in list(owner.graph.nodes):
            if node.target is not WHOLE or CONTEXT not in node.args[3] or node.kwargs.get("in_place"):
                continue
            reason = _refusal(owner, node, region)
            if reason is not None:
                record.misses.append(Miss("pack context", node.name, reason, source_line(node)))
                continue
            calls = region_calls(module, region) if region else [node]
            packed = [_pack_for(module, owner, node, call, region, packs) for call in calls]
            inside = hand_in(owner, calls, packed, "packed") if region else packed[0]
            _step(owner, node, inside)
            record.count += len(calls)
        if region:
            drop_unused(module, owner, region)
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


def _pack_for(module: GraphModule, owner: GraphModule, node: Node, call: Node, region: str, packs: dict) -> list[Node]:
    """The packed context of one call, in the outer graph: made before it, or an earlier call's where it is the same."""
    static = _static(node)
    keys, values = ([outside(module.graph, owner, x[s], call, {}) if region else x[s] for s in static] for x in node.args[1:3])
    roles = [node.args[3][s] for s in static]
    _, _, _, _, height, width, tile, block_size, _, _, sub_blocks, _, summary, *_ = node.args
    settings = (roles, height, width, tile, block_size, sub_blocks, summary)
    identity = (structure(keys), structure(values), repr(settings))
    if identity not in packs:
        with module.graph.inserting_before(call):
            pack = module.graph.call_function(PACK, (keys, values, *settings))
            packs[identity] = [module.graph.call_function(operator.getitem, (pack, i)) for i in range(4)]
        for new in (pack, *packs[identity]):
            new.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return packs[identity]


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

"""Context keeps its tile order from the graph that encodes it to the graphs that read it, exact: keys and values are a set to attention.

Before, in an encoding and in each of N steps::                After::

    o = li.sparse_attention(q, [text_k, k], [text_v, v], ...)       o, k1, v1 = li.sparse_prefill(q, [text_k, k], [text_v, v], ...)
    return k, v                                                     return k1, v1

    li.sparse_attention(q, [text_k, context_k, k], ...)             li.sparse_attention(q, [text_k, context_k, k], ..., in_place=True)

Block-sparse attention among the encoded frames brings their keys and values into blocks in any case, and now these are what is returned; where
the attention is dense, or leads nowhere, as in the last block, they are brought into order by themselves. A step then moves nothing of its
context. Only for graphs whose callers hand caches from the one to the others and watch over it (li_compile/handover.py): all that an encoding
returns is in order, or nothing is.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from li_compile.patterns import CONTEXT, CURRENT, Miss
from li_compile.patterns.graph import hint, region_calls, shape, source_line, subgraphs, value

from .cost import nbytes
from .record import Record, Refused

SPARSE = torch.ops.li.sparse_attention.default
PREFILL, ORDER = torch.ops.li.sparse_prefill.default, torch.ops.li.in_tile_order.default


def tile_order(module: GraphModule) -> Record:
    """Rewrite an encoding or a step, in place. Counts the tensors that are returned in tile order, or the calls that read such a context.

    Raises Refused for an encoding that returns other things than keys and values; a step is never refused."""
    record = Record("tile_order")
    found = [(region, owner, node) for region, owner in {"": module, **subgraphs(module)}.items() for node in owner.graph.nodes if node.target is SPARSE]
    reading = [(region, node) for region, _, node in found if CONTEXT in node.args[3]]
    if reading:
        _read(module, reading, record)
    elif found:
        _return(module, found, record)
    return record


def _read(module: GraphModule, found: list[tuple[str, Node]], record: Record) -> None:
    saved = 0
    for region, node in found:
        times = len(region_calls(module, region)) if region else 1
        _, keys, _, roles = node.args[:4]
        if roles.count(CONTEXT) > 1:
            node.args = (*node.args[:8], 1.0, *node.args[9:13], [])  # a choice of blocks would be one of tokens from everywhere
            record.misses.append(Miss("tile order", node.name, f"{roles.count(CONTEXT)} context segments cannot be read in place, and are read as a whole",
                                      source_line(node)))  # fmt: skip
            continue
        node.kwargs = {**node.kwargs, "in_place": True}
        record.count += times
        saved += times * _moved_less(keys, roles)
    if record.count:
        record.details.append(f"{record.count} calls read their context where it lies, which moves {saved / 1e6:,.0f} MB less")


def _moved_less(keys: list[Node], roles: list[int]) -> int:
    """Bytes that bringing keys and values of text and context into blocks reads and writes, less those of reading the context's keys for their
    means, and of joining text to the current tokens."""
    text, context, current = (sum(nbytes(value(k)) for k, r in zip(keys, roles) if r == role) for role in (0, CONTEXT, CURRENT))
    return 4 * (text + context) - context - (4 * (text + current) if text else 0)


def _return(module: GraphModule, found: list[tuple[str, GraphModule, Node]], record: Record) -> None:
    output = module.graph.output_node()
    results = [r for r in output.args[0] if isinstance(r, Node) and isinstance(value(r), torch.Tensor)]
    key = found[0][2].args[1][found[0][2].args[3].index(CURRENT)]
    like = [hint(n) for n in shape(key)]
    other = next((r for r in results if [hint(n) for n in shape(r)] != like), None)
    if other is not None or not results:
        said = "nothing" if other is None else f"something of {list(shape(other))}"
        raise Refused(Miss("tile order", "graph" if other is None else other.name,
                           f"this graph returns {said}, and is no encoding, which returns keys and values alone"))  # fmt: skip
    done: dict[Node, Node] = {}
    for region, owner, node in found:
        if "protected" not in node.kwargs:
            done |= _by_attention(module, region, owner, node)
    height, width, tile = found[0][2].args[4:7]
    with module.graph.inserting_before(output):
        for result in dict.fromkeys(results):
            if result not in done:
                done[result] = module.graph.call_function(ORDER, (result, height, width, tile))
                record.misses.append(Miss("tile order", result.name, "no block-sparse attention brings it into order: it is moved for it"))
    output.args = (tuple(done.get(r, r) if isinstance(r, Node) else r for r in output.args[0]),)
    record.count = len(results)
    record.details.append(f"{len(results)} keys and values are returned in tile order, {len(results) - len(record.misses)} of them as attention made them")


def _by_attention(module: GraphModule, region: str, owner: GraphModule, node: Node) -> dict[Node, Node]:
    """Let the attention return keys and values in order, if all that its region's calls return of them is returned by the graph and read by
    nothing else. What the graph returns -> what it is to return."""
    inner, outer = owner.graph.output_node(), module.graph.output_node()
    current = [x[node.args[3].index(CURRENT)] for x in node.args[1:3]]
    returned = [r for r in inner.args[0] if isinstance(r, Node)]
    if not set(current) <= set(returned):
        return {}
    at = {i for i, r in enumerate(inner.args[0]) if r in current}
    taken = [u for call in region_calls(module, region) for u in call.users if u.args[1] in at] if region else []
    if any(set(u.users) != {outer} for u in taken):
        return {}
    q, keys, values, roles, height, width, tile, block, _, prefill, *more = node.args
    with owner.graph.inserting_before(node):
        whole = owner.graph.call_function(PREFILL, (q, keys, values, roles, height, width, tile, block, prefill, *more))
        out, *kept = (owner.graph.call_function(operator.getitem, (whole, i)) for i in range(3))
    whole.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    owner.graph.erase_node(node)
    new = dict(zip(current, kept))
    if not region:
        return new
    inner.args = (tuple(new.get(r, r) if isinstance(r, Node) else r for r in inner.args[0]),)
    return {u: u for u in taken}

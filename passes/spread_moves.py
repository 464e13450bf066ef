"""Moves in front of concatenations, exact: keys and values that are joined first and laid out afterwards.

Before::                                            After::

    k = cat([context_k, k], dim=1).transpose(1, 2)      k = cat([context_k.transpose(1, 2), k.transpose(1, 2)], dim=2)
    kv = cat([context_kv, kv], dim=1)                   v = cat([context_kv.unbind(2)[1], kv.unbind(2)[1]], dim=1)
    v = kv.unbind(2)[1]

Only where the keys and the values of an attention both fall into the same segments by it: then each segment is a node,
which is what matchers and later passes work on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from li_compile.patterns.effects import target, writers
from li_compile.patterns.graph import SDPA, SHAPE_ONLY, argument, calls, cat_operands, hint, known, name_of, shape, value

KEEP = {"to", "float", "half", "bfloat16", "type", "type_as", "_to_copy", "contiguous", "clone", "detach", "alias"}
RESHAPES = {"view", "reshape", "_unsafe_view"}
# An operand of a concatenation; the moves to copy onto it, last to first, each with the dimension that its result has the
# segments along; its length.
Piece = tuple[Node, list[tuple[Node, int]], Any]


def spread_moves(module: GraphModule) -> int:
    """Rewrite the keys and values of every attention of a graph, in place. Returns how many attentions changed."""
    count, order = 0, {n: i for i, n in enumerate(module.graph.nodes)}
    for node in [n for n in module.graph.nodes if calls(n, SDPA)]:
        operands = [argument(node, i, name) for i, name in ((1, "key"), (2, "value"))]
        found = [_segments(x, 2, []) if len(shape(x) or ()) == 4 else [] for x in operands]
        pieces = [p for operand in found for p in operand]
        if any(moves for _, moves, _ in pieces) and len(found[0]) > 1 and _alike(*found) and all(
                order[w] < order[p] or order[w] > order[node] for p, _, _ in pieces for w in writers(target(p))):
            for x, pieces in zip(operands, found):
                _join(module, node, x, pieces)
            count += 1
    return count


def _alike(one: list[Piece], other: list[Piece]) -> bool:
    return len(one) == len(other) and all(hint(a) is not None and hint(a) == hint(b) for (_, _, a), (_, _, b) in zip(one, other))


def _segments(node: Node, dim: int, moves: list[tuple[Node, int]]) -> list[Piece]:
    """The pieces that ``node`` consists of along ``dim``, with ``moves`` behind them."""
    chain, at, along = [], node, dim
    while (read := cat_operands(at)) is None or read[1] != along:
        source = _before(at, along) if at.op in ("call_function", "call_method") else None
        if source is None:
            return [(node, moves, shape(node)[dim])]
        chain.append((at, along))
        at, along = at.args[0], source
    return [piece for operand in read[0] for piece in _segments(operand, along, [*moves, *chain])]


def _before(node: Node, dim: int) -> int | None:
    """The dimension of a move's operand that is ``dim`` of its result, untouched by the move; None if it is no such move."""
    if not node.args or not isinstance(node.args[0], Node):
        return None
    given = _tensor(node.args[0])
    if given is None:
        return None
    for d in range(given.dim()):
        if _after(node, given, d) == dim:
            return d
    return None


def _tensor(node: Node):
    """The example value of a node or, of several tensors, of the first."""
    v = value(node)
    v = v[0] if isinstance(v, (tuple, list)) and v else v
    return v if isinstance(v, torch.Tensor) else None


def _after(node: Node, given, dim: int) -> int | None:
    """Where dimension ``dim`` of a move's operand is in its result, of the same size; None if it is gone or mixed."""
    name, rank = name_of(node), given.dim()
    if name in KEEP:
        return dim
    if name == "getitem":
        return dim if isinstance(value(node.args[0]), (tuple, list)) else _indexed(node.args[1], rank, dim)
    if name in RESHAPES:
        return _reshaped(given.shape, shape(node), dim)
    if name not in SHAPE_ONLY:
        return None
    if name == "unflatten":
        at, sizes = argument(node, 1, "dim") % rank, argument(node, 2, "sizes", "unflattened_size")
        return None if dim == at else dim + (len(sizes) - 1) * (dim > at)
    if name == "flatten":
        first, last = (argument(node, i, key, default=d) % rank for i, key, d in ((1, "start_dim", 0), (2, "end_dim", -1)))
        return None if first <= dim <= last and first < last else dim - (last - first) * (dim > last)
    rest = list(node.args[1:])
    if name == "split" and rest:
        rest = rest[1:]  # the sizes
    elif name == "chunk" and rest:
        rest = rest[1:]
    rest = list(rest[0]) if rest and isinstance(rest[0], (list, tuple)) and name == "permute" else rest
    rest = rest or [node.kwargs[k] for k in ("dim0", "dim1", "axis0", "axis1", "source", "destination", "dims", "dim") if k in node.kwargs]
    rest = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if not all(isinstance(d, int) for d in rest):
        return None
    if name in ("transpose", "swapaxes", "mT", "t"):
        a, b = (d % rank for d in rest) if rest else (rank - 2, rank - 1)
        return {a: b, b: a}.get(dim, dim)
    if name == "permute":
        return [d % rank for d in rest].index(dim)
    if name == "movedim":
        order = [d for d in range(rank) if d != rest[0] % rank]
        order.insert(rest[1] % rank, rest[0] % rank)
        return order.index(dim)
    if name in ("chunk", "split"):
        return None if dim == (rest[0] if rest else 0) % rank else dim
    if name in ("unbind", "select"):
        gone = (rest[0] if rest else 0) % rank
        return None if dim == gone else dim - (gone < dim)
    if name == "unsqueeze":
        return dim + (rest[0] % (rank + 1) <= dim)
    return None


def _indexed(index, rank: int, dim: int) -> int | None:
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) and not isinstance(i, bool) for i in index):
        return None
    named = sum(i is not None and i is not Ellipsis for i in index)
    at = after = 0
    for i in (*index, *(() if Ellipsis in index else (Ellipsis,))):
        if i is None:
            after += 1
            continue
        for _ in range(rank - named if i is Ellipsis else 1):
            if at == dim:
                return after if i is Ellipsis or i == slice(None) else None
            after += not isinstance(i, int)
            at += 1
    return None


def _reshaped(before, after, dim: int) -> int | None:
    """Of a reshape that neither splits nor merges ``dim``, where it is afterwards."""
    if after is None or known(before[dim] == 1):
        return None
    size = lambda dims: 1 if not dims else dims[0] * size(dims[1:])
    found = [d for d in range(len(after)) if known(after[d] == before[dim]) and known(size(after[:d]) == size(before[:dim]))]
    return found[0] if found and all(isinstance(s, int) for d, s in enumerate(after) if d != found[0]) else None


def _join(module: GraphModule, attention: Node, node: Node, pieces: list[Piece]) -> None:
    with module.graph.inserting_before(attention):
        parts = [_moved(module, operand, moves) for operand, moves, _ in pieces]
        joined = module.graph.call_function(torch.cat, (parts,), {"dim": 2})
    joined.meta = dict(node.meta)
    attention.args = tuple(joined if a is node else a for a in attention.args)
    attention.kwargs = {k: joined if a is node else a for k, a in attention.kwargs.items()}


def _moved(module: GraphModule, node: Node, moves: list[tuple[Node, int]]) -> Node:
    for move, along in reversed(moves):
        if name_of(move) in RESHAPES:
            sizes = [-1 if d == along else s for d, s in enumerate(shape(move))]
            new = module.graph.call_method("reshape", (node, *sizes))
        else:
            new = module.graph.create_node(move.op, move.target, (node, *move.args[1:]), move.kwargs)
        new.meta = dict(move.meta)
        args, kwargs = map_arg((new.args, new.kwargs), value)
        new.meta["example_value"] = getattr(args[0], new.target)(*args[1:], **kwargs) if new.op == "call_method" \
            else new.target(*args, **kwargs)
        node = new
    return node

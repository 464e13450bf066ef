"""Which operators compute each row along a dimension by itself, and where that dimension is in their result.

The knowledge behind equal_rows.py. A row is an index along the token dimension; an operator is row-wise if row i of its result
depends on row i of its operands alone, the same way for every i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch.fx import Node

from li_compile.patterns.graph import LINEAR, argument, calls, letters_of, name_of, shape, subscripts, value

UNARY = {"silu", "gelu", "relu", "sigmoid", "tanh", "exp", "log", "neg", "float", "half", "bfloat16", "double", "to", "type", "type_as", "softplus",
         "contiguous", "clone", "detach", "cos", "sin", "sqrt", "rsqrt", "pow", "abs", "reciprocal", "square", "dropout"}  # fmt: skip
BINARY = {"mul", "add", "sub", "truediv", "div", "multiply", "divide", "subtract", "maximum", "minimum", "pow"}
LIKE = {"zeros_like", "ones_like", "empty_like", "full_like"}
NORMS = {"layer_norm", "rms_norm"}
REDUCED = {"sum", "mean", "amax", "amin", "softmax", "log_softmax"}


def same(a, b) -> bool:
    """Whether two sizes are equal, known sizes or symbols; asking a symbol would make it a constant of the graph."""
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def row_dim(node: Node, rows: Mapping[Node, int]) -> int | None:
    """Dimension of the rows in the result of a node that reads values with rows; None if the node is not row-wise.

    rows: nodes with rows -> their dimension. All of them have the same number of rows. For chunk, split and unbind: the
    dimension in each part.
    """
    name = name_of(node)
    mine = [x for x in node.all_input_nodes if x in rows]
    if node.op not in ("call_function", "call_method") or not mine:
        return None
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    rule = _RULES.get(name)
    if rule is not None:
        return rule(node, rows)
    if calls(node, LINEAR):
        return rows[first] if first in rows and mine == [first] and rows[first] != len(shape(first)) - 1 else None
    if name in UNARY and (name != "pow" or not isinstance(node.args[1], Node)):
        # A second operand (type_as, to) lends its dtype and device only.
        return rows[first] if first in rows and (len(mine) == 1 or name in ("to", "type_as")) else None
    if name in LIKE:
        return rows[first] if first in rows else None
    if name in BINARY:
        return _broadcast(node, rows)
    return None


def _broadcast(node: Node, rows) -> int | None:
    rank = len(shape(node))
    at = {rows[x] - len(shape(x)) for x in node.args[:2] if isinstance(x, Node) and x in rows}
    if len(at) != 1:
        return None
    (back,) = at
    for x in node.args[:2]:
        if isinstance(x, Node) and x not in rows:
            s = shape(x)
            if s is None or (len(s) >= -back and s[back] != 1):
                return None
    return rank + back


def _only_first(rule):
    def checked(node: Node, rows) -> int | None:
        x = node.args[0]
        if not isinstance(x, Node) or x not in rows or any(y in rows for y in node.all_input_nodes if y is not x):
            return None
        return rule(node, x, rows[x])

    return checked


@_only_first
def _norm(node, x, dim):
    normalised = argument(node, 1, "normalized_shape")
    return dim if dim < len(shape(x)) - len(normalised) else None


@_only_first
def _reduce(node, x, dim):
    rank = len(shape(x))
    over = argument(node, 1, "dim", "axis")
    over = [over] if isinstance(over, int) else list(over) if isinstance(over, (tuple, list)) else None
    if over is None or dim in [d % rank for d in over]:
        return None
    kept = name_of(node).endswith("softmax") or argument(node, 2, "keepdim", default=False)
    return dim if kept else dim - sum(d % rank < dim for d in over)


@_only_first
def _parts(node, x, dim):
    return dim if argument(node, 2, "dim", default=0) % len(shape(x)) != dim else None


@_only_first
def _unbind(node, x, dim):
    over = argument(node, 1, "dim", default=0) % len(shape(x))
    return None if over == dim else dim - (over < dim)


@_only_first
def _unsqueeze(node, x, dim):
    at = argument(node, 1, "dim")
    at += len(shape(x)) + 1 if at < 0 else 0
    return dim + (at <= dim)


@_only_first
def _squeeze(node, x, dim):
    at = argument(node, 1, "dim")
    if not isinstance(at, int) or at % len(shape(x)) == dim:
        return None
    return dim - (at % len(shape(x)) < dim) if same(shape(x)[at], 1) else dim


@_only_first
def _outer(node, x, dim):
    return 0


@_only_first
def _transpose(node, x, dim):
    a, b = (argument(node, i, f"dim{i - 1}") % len(shape(x)) for i in (1, 2))
    return {a: b, b: a}.get(dim, dim)


@_only_first
def _permute(node, x, dim):
    order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return [d % len(shape(x)) for d in order].index(dim)


@_only_first
def _select(node, x, dim):
    at = argument(node, 1, "dim") % len(shape(x))
    return None if at == dim else dim - (at < dim)


@_only_first
def _narrow(node, x, dim):
    return dim if argument(node, 1, "dim", default=0) % len(shape(x)) != dim else None


@_only_first
def _expand(node, x, dim):
    sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    at = dim + len(sizes) - len(shape(x))
    return at if same(shape(node)[at], shape(x)[dim]) else None


@_only_first
def _reshape(node, x, dim):
    """A dimension of the same size, with as many elements before it."""
    before, after = shape(x), shape(node)
    ahead = math.prod(before[:dim])
    at = next((i for i in range(len(after)) if same(math.prod(after[:i]), ahead) and same(after[i], before[dim])), None)
    # One of several leading ones could be taken for the rows' dimension only if there were one row.
    return at if not same(before[dim], 1) else None


def _getitem(node: Node, rows) -> int | None:
    x, index = node.args
    if x not in rows or any(y in rows for y in node.all_input_nodes if y is not x):
        return None
    if isinstance(value(x), (tuple, list)):
        return rows[x] if isinstance(index, int) else None
    index = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in index):
        return None
    rank = len(shape(x))
    taken = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index[at : at + 1] = [slice(None)] * (rank - taken)
    source = result = 0
    for i in index:
        if i is None:
            result += 1
            continue
        if source == rows[x]:
            return result if i == slice(None) else None
        source += 1
        result += isinstance(i, slice)
    return result + rows[x] - source


def _cat(node: Node, rows) -> int | None:
    operands, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", default=0)
    found = {rows.get(x) for x in operands}
    if len(found) != 1 or None in found:
        return None
    (at,) = found
    if name_of(node) == "stack":
        dim += len(shape(operands[0])) + 1 if dim < 0 else 0
        return at + (dim <= at)
    return at if dim % len(shape(operands[0])) != at else None


def _scatter(node: Node, rows) -> int | None:
    """select_scatter and slice_scatter: what is written has the rows too."""
    base, given, dim = node.args[0], node.args[1], node.args[2]
    if base not in rows or given not in rows or dim % len(shape(base)) == rows[base]:
        return None
    shift = name_of(node) == "select_scatter" and dim % len(shape(base)) < rows[base]
    return rows[base] if rows[given] == rows[base] - shift else None


def _einsum(node: Node, rows) -> int | None:
    equation, operands = node.args[0], node.args[1:]
    if not isinstance(equation, str) or not all(isinstance(x, Node) for x in operands):
        return None
    terms, right = subscripts(equation)
    if len(terms) != len(operands) or not right:
        return None
    letters = set()
    for term, x in zip(terms, operands):
        whole = letters_of(term, len(shape(x)))
        if whole is None:
            return None
        if x in rows:
            letters.add(whole[rows[x]])
    out = letters_of(right, len(shape(node)))
    if len(letters) != 1 or out is None or (letter := letters.pop()) not in out:
        return None
    for term, x in zip(terms, operands):
        whole = letters_of(term, len(shape(x)))
        if x not in rows and letter in whole and shape(x)[whole.index(letter)] != 1:
            return None
    return out.index(letter)


def _repeat_once(node: Node, rows) -> int | None:
    x = node.args[0]
    return rows[x] if x in rows and argument(node, 1, "repeats") == 1 and argument(node, 2, "dim") is not None else None


_RULES = {
    **dict.fromkeys(NORMS, _norm), **dict.fromkeys(REDUCED, _reduce), **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _parts),
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten"), _reshape), **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(("cat", "concat", "stack"), _cat), **dict.fromkeys(("select_scatter", "slice_scatter"), _scatter),
    "unbind": _unbind, "unsqueeze": _unsqueeze, "squeeze": _squeeze, "outer": _outer, "permute": _permute, "select": _select, "narrow": _narrow, "slice": _narrow, "expand": _expand,
    "getitem": _getitem, "einsum": _einsum, "repeat_interleave": _repeat_once,
}  # fmt: skip


def resized(node: Node, dim: int, new) -> None:
    """Give a row-wise node, whose rows are along dim of its result, a new number of rows in place of the one it was given.

    new: a number or, where it is a symbol, None: "whatever is left".
    """
    name, left = name_of(node), -1 if new is None else new
    if name in ("zeros", "ones", "full"):
        node.args = ([new if i == dim else s for i, s in enumerate(shape(node))], *node.args[1:])
    elif name in ("reshape", "view", "expand"):
        given = node.args[1:]
        packed = len(given) == 1 and isinstance(given[0], (tuple, list))
        sizes = list(given[0]) if packed else list(given)
        if not (isinstance(sizes[dim], int) and sizes[dim] == -1):
            if new is None and name != "expand":  # only one size can be left open
                sizes = [shape(node)[i] if isinstance(s, int) and s == -1 else s for i, s in enumerate(sizes)]
            sizes[dim] = left
        node.args = (node.args[0], sizes) if packed else (node.args[0], *sizes)
    elif name == "unflatten":
        sizes = list(node.args[2])
        at = dim - node.args[1] % len(shape(node.args[0]))
        if 0 <= at < len(sizes) and not (isinstance(sizes[at], int) and sizes[at] == -1):
            sizes[at] = left
        node.args = (*node.args[:2], tuple(sizes))


def resizable(node: Node, dim: int) -> bool:
    """Whether ``resized`` can give a node a number of rows that is a symbol."""
    name, given = name_of(node), node.args[1:]
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if name in ("reshape", "view"):
        return all(i == dim or not (isinstance(s, int) and s == -1) or isinstance(shape(node)[i], int) for i, s in enumerate(sizes))
    return name not in ("zeros", "ones", "full", "unflatten")

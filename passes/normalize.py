"""Canonical spelling, exact: no-ops vanish, attention written by hand becomes one node.

Before::                                            After::

    s = matmul(q, k.transpose(-2, -1)) * scale          o = scaled_dot_product_attention(q, k, v, scale=scale)
    o = matmul(softmax(s, dim=-1), v)
    a = cat([x]); b = x.repeat_interleave(1, dim=1)     a, b, c, d, e -> x
    (c,) = x.split([8]); d = x.to(x.dtype); e = x.expand(x.shape)
    sdpa(q, k, v, attn_mask=ones(L, S, dtype=bool))     sdpa(q, k, v)
    einsum("abc->cab", x); stack([x])                   x.permute(2, 0, 1); x.unsqueeze(0)
"""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from li_compile.patterns.effects import target, writers, written
from li_compile.patterns.graph import (CAT, CONV, LINEAR, MATMUL, SDPA, SHAPE_ONLY, argument, calls, cat_operands, name_of,
                                       shape, subgraphs, subscripts, through_shapes, value)

from .record import Record

SOFTMAX = {"softmax"}
TRANSPOSES = {"transpose", "swapaxes", "permute", "mT", "t"}
CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "_to_copy"}
FITS = {"expand", "view", "reshape", "repeat", "tile"}  # what these do to a tensor that has the shape already
COPIES = {"repeat_interleave", "repeat", "tile", "_to_copy"}
SPLITS = {"chunk", "split", "tensor_split", "split_with_sizes"}
# Functions (input, other, ...) whose operands some matcher reads.
READ = SHAPE_ONLY | SOFTMAX | {"matmul", "bmm", "mul", "multiply", "div", "divide", "truediv", "add", "sub", "dropout",
                               "repeat_interleave", "silu", "gelu", "relu", "sigmoid", "tanh", "exp", "neg", "softplus"}


def normalize(module: GraphModule) -> Record:
    """Fold no-ops and hand-written attention in a graph and its regions, in place. Operands become positional."""
    record = Record("normalize")
    for graph_module in (module, *subgraphs(module).values()):
        for node in graph_module.graph.nodes:
            _positional(node)
        changing = written(graph_module.graph)
        for node in list(graph_module.graph.nodes):
            if (same := _no_op(node, changing)) is not None:
                node.replace_all_uses_with(same)
                graph_module.graph.erase_node(node)
                record.count += 1
        for node in list(graph_module.graph.nodes):
            if (move := _moved_only(node)) is not None:
                _respell(graph_module.graph, node, *move)
                record.count += 1
        for node in list(graph_module.graph.nodes):
            if (found := _attention(node)) is not None:
                _fuse(graph_module.graph, node, *found)
                record.count += 1
                record.details.append(f"{node.name}: hand-written attention folded into one node")
            elif calls(node, SDPA) and isinstance(mask := argument(node, 3, "attn_mask"), Node) and _masks_nothing(mask):
                node.args = tuple(None if a is mask else a for a in node.args)
                node.kwargs = {name: a for name, a in node.kwargs.items() if a is not mask}
                record.count += 1
    return record


def _moved_only(node: Node) -> tuple[str, Node, tuple[int, ...]] | None:
    """(method, tensor, arguments) of an einsum that only orders dimensions anew, and of a stack of one tensor."""
    if node.op != "call_function" or not isinstance(value(node), torch.Tensor):
        return None
    if name_of(node) == "stack" and isinstance(node.args[0], (list, tuple)) and len(node.args[0]) == 1:
        return "unsqueeze", node.args[0][0], (argument(node, 1, "dim", default=0),)
    if name_of(node) != "einsum" or len(node.args) != 2 or not isinstance(node.args[0], str):
        return None
    tensor = node.args[1][0] if isinstance(node.args[1], (list, tuple)) and len(node.args[1]) == 1 else node.args[1]
    (left, *others), right = subscripts(node.args[0])
    if others or right is None or not isinstance(tensor, Node) or not left.isalpha() or len(set(left)) < len(left) or sorted(left) != sorted(right):
        return None
    return "permute", tensor, tuple(left.index(a) for a in right)


def _respell(graph: torch.fx.Graph, node: Node, method: str, tensor: Node, arguments: tuple[int, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_method(method, (tensor, *arguments))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _positional(node: Node) -> None:
    """Operands given by name to their positions, which is where matching looks for them, and those of ATen's einsum one by one."""
    if node.target is torch.ops.aten.einsum.default and isinstance(node.args[1], (list, tuple)) and not node.kwargs:
        node.target, node.args = torch.functional.einsum, (node.args[0], *node.args[1])
        return
    if node.op != "call_function" or not (calls(node, SDPA | LINEAR | CONV | CAT) or name_of(node) in READ):
        return
    names = ("query", "key", "value") if calls(node, SDPA) else ("input", "weight") if calls(node, LINEAR | CONV) \
        else ("tensors",) if calls(node, CAT) else ("input", "mat2") if name_of(node) == "bmm" else ("input", "other")
    args, kwargs = list(node.args), dict(node.kwargs)
    while len(args) < len(names) and names[len(args)] in kwargs:
        args.append(kwargs.pop(names[len(args)]))
    node.args, node.kwargs = tuple(args), kwargs


def _no_op(node: Node, changing: set[Node]) -> Node | None:
    """The node that this one equals, or None. changing: what is written in place; a copy of that, or a copy that is, is none."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    same = _same_value(node)
    copies = name_of(node) in COPIES or calls(node, CAT)
    if same is not None and copies and (target(node) in changing or target(same) in changing or any(u.op == "output" for u in node.users)):
        return None
    return same


def _same_value(node: Node) -> Node | None:
    name, first = name_of(node), node.args[0]
    if (read := cat_operands(node)) is not None:
        return read[0][0] if len(read[0]) == 1 and isinstance(read[0][0], Node) else None
    if not isinstance(first, Node):
        return None
    if name == "getitem":  # of a split into one part
        parts = first.op in ("call_function", "call_method") and name_of(first) in SPLITS and value(first)
        return first.args[0] if isinstance(parts, (tuple, list)) and len(parts) == 1 else None
    if name == "repeat_interleave":
        return first if argument(node, 1, "repeats") == 1 and argument(node, 2, "dim") is not None else None
    if name == "dropout":
        return first if argument(node, 1, "p", default=0.5) == 0.0 or not argument(node, 2, "training", default=True) else None
    plain = not node.kwargs.get("copy") and node.kwargs.get("memory_format") is None and not any(a is True for a in node.args[1:])
    return first if (name in CASTS | {"contiguous"} and plain or name in FITS) and _alike(value(node), value(first), name == "contiguous") else None


def _alike(one, other, strided: bool) -> bool:
    """Whether two example values have one dtype, device and shape, and if asked for one layout."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    layout = lambda x: (x.dtype, x.device, str(tuple(x.shape)), str(x.stride()) if strided else "")
    return layout(one) == layout(other)


def _cast(node: Node) -> Node | None:
    """What a node gives in another dtype, or in the same; None if it is no cast."""
    is_cast = node.op in ("call_function", "call_method") and name_of(node) in CASTS and isinstance(value(node), torch.Tensor)
    return node.args[0] if is_cast and isinstance(node.args[0], Node) else None


def _masks_nothing(mask: Node) -> bool:
    """Whether a mask is all true or, to be added, all zeros, as the graph itself says."""
    made, kept = through_shapes(mask), getattr(value(mask), "dtype", None) is torch.bool
    number = argument(made, 2 if name_of(made) == "new_full" else 1, "fill_value") if "full" in name_of(made) else \
        {"ones": 1, "zeros": 0}.get(name_of(made).removeprefix("new_").removesuffix("_like"))
    return isinstance(number, (int, float)) and bool(number) == kept and made.op.startswith("call") and not writers(made)


def _swapped(node: Node) -> Node | None:
    """x of a node that swaps the last two dimensions of x."""
    s = shape(node)
    if s is None or node.op not in ("call_function", "call_method") or name_of(node) not in TRANSPOSES:
        return None
    if not isinstance(node.args[0], Node):
        return None
    rank, rest = len(s), list(node.args[1:])
    rest = list(rest[0]) if rest and isinstance(rest[0], (list, tuple)) else rest
    rest = rest or [node.kwargs[k] for k in ("dim0", "dim1", "dims") if k in node.kwargs]
    dims = [d % rank for d in rest if isinstance(d, int)]
    if name_of(node) == "permute":
        ok = dims == [*range(rank - 2), rank - 1, rank - 2]
    else:
        ok = name_of(node) == "mT" or sorted(dims) == [rank - 2, rank - 1]
    return node.args[0] if ok else None


def _scaled(node: Node) -> tuple[Node, float]:
    """x and c of a node that is x * c or x / c with a number c (c = 1 if it is neither)."""
    name = name_of(node)
    if name in ("mul_", "div_") and len(node.args[0].users) == 1 and not name_of(node.args[0]) in SHAPE_ONLY:
        name = name[:-1]  # in place, of what nobody else reads
    if node.op in ("call_function", "call_method") and name in ("mul", "multiply", "truediv", "div", "divide"):
        a, b = node.args[:2]
        if isinstance(a, Node) and isinstance(b, (int, float)):
            return a, (b if name.startswith("mul") else 1.0 / b)
        if isinstance(b, Node) and isinstance(a, (int, float)) and name.startswith("mul"):
            return b, a
    return node, 1.0


def _einsum(node: Node, *, keys: bool) -> tuple[Node, Node] | None:
    """Operands of an einsum that is q k^T (keys) or p v over equal leading dimensions."""
    if name_of(node) != "einsum" or not isinstance(node.args[0], str) or len(node.args) != 3:
        return None
    (a, b), out = subscripts(node.args[0])
    if out is None or not len(a) == len(b) == len(out) or a[:-2] != b[:-2] or out[:-2] != a[:-2]:
        return None
    ok = (a[-1] == b[-1] and out[-2:] == a[-2] + b[-2]) if keys else (a[-1] == b[-2] and out[-2:] == a[-2] + b[-1])
    return (node.args[1], node.args[2]) if ok else None


def _scores(node: Node) -> tuple[Node, Node, float] | None:
    """q, k and the scale of scores q k^T * scale, seen through casts and through zeros that are added."""
    if name_of(node) == "add" and all(isinstance(a, Node) for a in node.args[:2]) and not node.kwargs and _masks_nothing(node.args[1]):
        node = node.args[0]
    node, scale = _scaled(_cast(node) or node)
    node, more = _scaled(_cast(node) or node)
    scale *= more
    if (read := _einsum(node, keys=True)) is not None:
        q, k = read
    elif (calls(node, MATMUL) or node.target is operator.matmul) and isinstance(node.args[1], Node):
        q, (k, s) = node.args[0], _scaled(node.args[1])
        scale, k = scale * s, _swapped(k)
        if k is None:
            return None
    else:
        return None
    (q, s), (k, t) = _scaled(q), _scaled(k)
    return q, k, scale * s * t


def _attention(node: Node) -> tuple[Node, Node, Node, float] | None:
    """q, k, v and scale, if the node is attention written as two products around a softmax, used nowhere else."""
    if (read := _einsum(node, keys=False)) is not None:
        p, v = read
    elif calls(node, MATMUL) or node.target is operator.matmul:
        p, v = node.args[:2]
    else:
        return None
    # Scores and softmax in fp32, as SDPA computes them in any dtype, are given in the values' dtype.
    if isinstance(p, Node) and (cast := _cast(p)) is not None and len(p.users) == 1:
        p = cast
    if not isinstance(p, Node) or not isinstance(v, Node) or name_of(p) not in SOFTMAX or len(p.users) != 1:
        return None
    if len(shape(node) or ()) != 4 or argument(p, 1, "dim") not in (-1, 3) or argument(p, 2, "dtype") not in (None, torch.float32):
        return None
    scores = p.args[0]
    if len(scores.users) != 1 or (found := _scores(scores)) is None:
        return None
    q, k, scale = found
    q, k = (_of_dtype(x, v) for x in (q, k))
    return None if q is None or k is None else (q, k, v, scale)


def _of_dtype(x: Node, like: Node) -> Node | None:
    """x, or what it is a cast of, in the dtype of ``like``; None if neither has it."""
    for found in (x, _cast(x)):
        if found is not None and value(found).dtype == value(like).dtype:
            return found
    return None


def _fuse(graph: torch.fx.Graph, node: Node, q: Node, k: Node, v: Node, scale: float) -> None:
    head_dim = shape(q)[-1]
    # The default scale is left out, so that all spellings give the same node.
    given = {} if isinstance(head_dim, int) and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6) else {"scale": scale}
    with graph.inserting_before(node):
        fused = graph.call_function(F.scaled_dot_product_attention, (q, k, v), given)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)

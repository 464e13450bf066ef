"""What is done to queries, keys or values before attention: a norm, a rotation by position, a camera's matrix, in two branches.

::

    y = rms_norm(x) * weight                                     # or x itself
    first = y * cos + stack([-y[1::2], y[0::2]]) * sin           # RoPE over interleaved pairs, or y itself
    second = y in groups of four channels, each times its frame's 4 x 4 matrix                            # PRoPE
    cat([first, second], 0)

One spelling is read, that of a canonical graph of HY-WorldPlay; whatever differs from it is none.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch.fx import Node

from .graph import argument, cat_operands, name_of, shape, subscripts, value


class Encoded(NamedTuple):
    """x: [B, L, H, D], before all of it. norm: [D] weights; cos, sin: [1, L, 1, D]; None where it is not done.
    camera: [B, F, 4, 4], of F frames or tokens. Results are two branches of x's layout, one after the other in the batch."""

    x: Node
    norm: Node | None
    eps: float
    cos: Node | None
    sin: Node | None
    camera: Node


def read_encoded(node: Node) -> Encoded | None:
    """What a concatenation of two branches is made of; None if it is none."""
    found = cat_operands(node)
    if found is None or found[1] != 0 or len(found[0]) != 2 or len(shape(node) or ()) != 4:
        return None
    first, second = found[0]
    if (projected := _projected(second)) is None:
        return None
    y, camera = projected
    cos = sin = None
    if (source := _source(first)) is not y:
        if (rotated := _rotated(source)) is None or rotated[0] is not y:
            return None
        _, cos, sin = rotated
    norm, eps, x = None, 0.0, y
    if (normed := _normed(y)) is not None:
        x, norm, eps = normed
    if value(x).dtype != value(node).dtype:
        return None
    return Encoded(x, norm, eps, cos, sin, camera)


def _source(node: Node) -> Node:
    """Without casts."""
    while node.op == "call_method" and name_of(node) in ("to", "type_as", "float") or name_of(node) == "_to_copy":
        node = node.args[0]
    return node


def _swapped(node: Node) -> Node | None:
    """The operand of a permutation that swaps tokens and heads."""
    if name_of(node) == "permute":
        dims = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims", default=())
        return node.args[0] if list(dims) == [0, 2, 1, 3] else None
    if name_of(node) in ("transpose", "swapaxes"):
        return node.args[0] if sorted(d % 4 for d in node.args[1:3]) == [1, 2] else None
    return None


def _projected(node: Node) -> tuple[Node, Node] | None:
    """(y [B, L, H, D], matrices [B, F, 4, 4]) of the camera's branch."""
    if (flat := _swapped(node)) is None or name_of(flat) not in ("reshape", "view", "flatten") or not isinstance(flat.args[0], Node):
        return None
    product = flat.args[0]
    if name_of(product) != "einsum" or len(product.args) != 3 or not isinstance(product.args[0], str):
        return None
    (matrix, groups), out = subscripts(product.args[0])
    # The channels of a group are the last dimension, a token's groups the one before, frames (or tokens) the third.
    if len(matrix) != 4 or len(groups) != 6 or groups[:5] + matrix[2] != out or (matrix[0], matrix[1], matrix[3]) != (groups[0], groups[2], groups[5]):
        return None
    camera, grouped = product.args[1:]
    sizes = shape(camera)
    if name_of(grouped) not in ("reshape", "view") or sizes is None or sizes[2:] != (4, 4) or (y := _swapped(grouped.args[0])) is None:
        return None
    before, after, inside = shape(y), shape(node), shape(grouped)
    if before != after or inside[-1] != 4 or inside[1] != before[2] or inside[2] != sizes[1] or shape(flat) != (before[0], before[2], before[1], before[3]):
        return None
    return y, _once(camera)


def _once(camera: Node) -> Node:
    """Matrices of frames, where they are repeated over a frame's tokens."""
    source = _source(camera)
    if name_of(source) == "repeat_interleave" and argument(source, 2, "dim") == 1 and isinstance(source.args[1], int):
        return source.args[0]
    return camera


def _rotated(node: Node) -> tuple[Node, Node, Node] | None:
    """(y, cos, sin) of y * cos + (-odd, even) * sin over pairs of channels, with tables of one row a token."""
    if name_of(node) != "add" or any(not isinstance(t, Node) or name_of(t) != "mul" for t in node.args[:2]) or node.kwargs:
        return None
    (one, cos), (turned, sin) = (t.args[:2] for t in node.args[:2])
    y = _source(one)
    if name_of(turned) not in ("flatten", "reshape") or shape(turned) != shape(y) or not isinstance(turned.args[0], Node):
        return None
    stack = turned.args[0]
    if name_of(stack) != "stack" or argument(stack, 1, "dim") not in (-1, 4) or len(stack.args[0]) != 2:
        return None
    odd, even = stack.args[0]
    if name_of(odd) != "neg" or (halves := _half(odd.args[0], 1)) is None or _half(even, 0) is not halves or _source(halves) is not y:
        return None
    length, dim = shape(y)[1], shape(y)[3]
    if any(not isinstance(t, Node) or shape(t) != (1, length, 1, dim) for t in (cos, sin)):
        return None
    return y, cos, sin


def _half(node: Node, which: int) -> Node | None:
    """What a node is the even (0) or odd (1) channels of."""
    if node.target is not operator.getitem or node.args[1] != which or name_of(pairs := node.args[0]) != "unbind" or argument(pairs, 1, "dim") not in (-1, 4):
        return None
    grouped = pairs.args[0]
    if name_of(grouped) not in ("reshape", "view", "unflatten") or shape(grouped)[-1] != 2 or len(shape(grouped)) != 5:
        return None
    return grouped.args[0]


def _normed(node: Node) -> tuple[Node, Node, float] | None:
    """(x, weight, eps) of an RMS norm over channels, computed in fp32 and rounded before the weight."""
    if name_of(node) != "mul" or len(node.args) != 2 or any(not isinstance(t, Node) for t in node.args):
        return None
    scaled, weight = _source(node.args[0]), node.args[1]
    if name_of(scaled) != "mul" or shape(weight) != shape(node)[-1:] or any(not isinstance(t, Node) for t in scaled.args[:2]):
        return None
    wide, root = scaled.args[:2]
    x, steps = _source(wide), []
    for name in ("rsqrt", "add", "mean", "pow"):
        if name_of(root) != name:
            return None
        steps.append(root)
        root = root.args[0]
    _, add, mean, power = steps
    if _source(root) is not x or power.args[1] != 2 or not isinstance(add.args[1], float) or argument(mean, 1, "dim") not in (-1, 3, [-1]) \
            or not argument(mean, 2, "keepdim"):  # fmt: skip
        return None
    if value(wide).dtype not in (torch.float32, torch.float64) or value(node.args[0]).dtype != value(x).dtype:
        return None
    return x, weight, add.args[1]

"""Values that a graph computes from constants alone: lengths, cumulative lengths, masks made of ``arange``.

::

    lens = torch.tensor([5, 5]);  cu = torch.cat([lens.new_zeros(1), lens]).cumsum(0)        # [0, 5, 10]

A value is known if no input of the graph has a part in it, but for its dtype and, where they are constant, its sizes.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .graph import name_of, shape, value

LIMIT = 1 << 24  # most elements of a tensor that is computed while compiling
_PLAIN = {"tensor", "arange", "ones", "zeros", "full", "cat", "stack", "cumsum", "getitem", "unsqueeze", "squeeze", "view", "reshape",
          "expand", "repeat", "repeat_interleave", "flatten", "transpose", "to", "int", "long", "bool", "type", "add", "sub", "mul",
          "floordiv", "neg", "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not", "and_", "or_", "invert",
          "tril", "triu", "clone", "contiguous", "pad", "_to_copy", "as_tensor"}
_OF_META = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # of their first operand


def constant(node) -> torch.Tensor | int | float | list | None:
    """The value of a node, computed on the CPU, or None if it is not known while compiling. Anything else is handed back."""
    if not isinstance(node, Node):
        return node
    try:
        return _compute(node, {})
    except _Unknown:
        return None


class _Unknown(Exception):
    pass


def _compute(node: Node, known: dict[Node, object]):
    if node in known:
        return known[node]
    name = name_of(node)
    if node.op not in ("call_function", "call_method") or name not in _PLAIN | _OF_META:
        raise _Unknown
    sizes = shape(node)
    if sizes is not None and (not all(isinstance(d, int) for d in sizes) or math.prod(sizes) > LIMIT):
        raise _Unknown
    first = node.args[0] if node.args else None
    stands = {first: _of_meta(first)} if name in _OF_META and isinstance(first, Node) else {}
    args, kwargs = map_arg((node.args, {k: v for k, v in node.kwargs.items() if k != "device"}),
                           lambda n: stands[n] if n in stands else _compute(n, known))
    # A device among the operands (x.to("cuda")) says where, and not what.
    args = tuple(a for a in args if not isinstance(a, torch.device) and not (name == "to" and isinstance(a, str)))
    if any(isinstance(a, torch.SymInt) for a in torch.utils._pytree.tree_leaves((args, kwargs))):
        raise _Unknown
    try:
        known[node] = getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise _Unknown from None
    return known[node]


def _of_meta(node: Node) -> torch.Tensor:
    v, sizes = value(node), shape(node)
    if sizes is None:
        raise _Unknown
    fixed = all(isinstance(d, int) for d in sizes)
    if fixed and math.prod(sizes) > LIMIT:
        raise _Unknown
    return torch.zeros(sizes if fixed else (0,), dtype=v.dtype)

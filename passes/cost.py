"""Floating-point operations and bytes of a graph, from shapes: what the report calls saved.

Counts products (linear, convolution, matrix product, attention) as two operations a multiply-add, and for the same
operators the bytes of what they read and write. Everything else is left out of both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from li_compile.kernels import density
from li_compile.kernels.plan import CURRENT
from li_compile.patterns.graph import (CONV, LINEAR, MATMUL, REGION, SDPA, argument, calls, hint, name_of, subscripts, value)


def _size(x) -> int:
    """Elements of a tensor; symbolic sizes by their hint."""
    return math.prod(_dims(x))


def nbytes(x) -> int:
    """Bytes of a tensor; symbolic sizes by their hint."""
    return _size(x) * x.element_size()


def _dims(x) -> list[int]:
    return [hint(s) for s in x.shape]


def _operations(node: Node) -> int | None:
    out = value(node)
    if node.target is torch.ops.li.sparse_prefill.default:
        q, keys, _, roles, height, width, tile, block, prefill, _, _, _, heads = node.args
        return _sparse(node, [_dims(value(k))[2] for k in keys], roles, height, width, tile, block, prefill, prefill, heads)
    if not isinstance(out, torch.Tensor):
        return None
    if calls(node, LINEAR) or node.target is torch.ops.li.linear_gelu.default:
        return 2 * _size(out) * _dims(value(node.args[0]))[-1]
    if calls(node, CONV):
        weight = _dims(value(node.args[1]))
        return 2 * _size(out) * math.prod(weight[1:])
    if calls(node, MATMUL) or name_of(node) in ("addmm", "baddbmm"):
        left = node.args[1] if name_of(node) in ("addmm", "baddbmm") else node.args[0]
        return 2 * _size(out) * _dims(value(left))[-1]
    if name_of(node) == "einsum" and len(node.args) == 3:
        (a, b), _ = subscripts(node.args[0])
        dims = dict(zip(a, _dims(value(node.args[1])))) | dict(zip(b, _dims(value(node.args[2]))))
        return 2 * math.prod(dims.values())
    if calls(node, SDPA):
        q, k = _dims(value(node.args[0])), _dims(value(argument(node, 1, "key")))
        return 4 * q[0] * q[1] * q[2] * k[2] * q[3]
    if node.target is torch.ops.li.dense_attention.default:
        q = _dims(value(node.args[0]))
        return 4 * math.prod(q) * sum(_dims(value(k))[2] for k in node.args[1])
    if node.target is torch.ops.li.sparse_attention.default:
        q, keys, _, roles, height, width, tile, block, topk, prefill, _, _, _, heads = node.args
        return _sparse(node, [_dims(value(k))[2] for k in keys], roles, height, width, tile, block, topk, prefill, heads)
    if node.target is torch.ops.li.sparse_decode.default:
        q, _, _, _, _, _, _, lengths, roles, height, width, tile, block, topk, _, _, _, heads = node.args
        lengths = [*lengths, _dims(value(q))[2]]
        return _sparse(node, lengths, [*roles, CURRENT], height, width, tile, block, topk, 1.0, heads)
    return None


def _sparse(node: Node, lengths, roles, height, width, tile, block, topk, prefill, heads) -> int:
    out = value(node)
    batch, heads_, n, dim = _dims(out if isinstance(out, torch.Tensor) else out[0])
    more = [node.kwargs.get(name, default) for name, default in (("protected", 0), ("in_place", False))]
    ratio = density(lengths, roles, height, width, tuple(tile), block, topk, prefill, tuple(heads), *more).ratio
    return int(4 * batch * heads_ * n * dim * sum(lengths) * ratio)


def cost_of(node: Node) -> tuple[int, int]:
    """(operations, bytes) of one operator; (0, 0) for what is no product."""
    count = _operations(node)
    return (0, 0) if count is None else (count, sum(map(nbytes, _tensors(node))))


def _tensors(node: Node) -> list[torch.Tensor]:
    """What an operator writes, then what it reads."""
    written = value(node)
    written = written[:1] if isinstance(written, (tuple, list)) else [written]  # of sparse_prefill: what it moves is no part of the product
    return [x for x in (*written, *map(value, node.all_input_nodes)) if isinstance(x, torch.Tensor)]


@dataclasses.dataclass(frozen=True)
class Product:
    """A node that multiplies matrices: operations and bytes of one run, dtype of its operands, and how often it runs."""

    node: Node
    operations: int
    bytes: int
    dtype: torch.dtype
    runs: int


def products(module: GraphModule, runs: int = 1) -> Iterator[Product]:
    """Every product of a graph whose nodes carry example values, and of the regions that it calls."""
    called: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.target is REGION:
            called[node.args[0].target] = called.get(node.args[0].target, 0) + runs
        elif _operations(node) is not None:
            yield Product(node, *cost_of(node), _tensors(node)[-1].dtype, runs)
    for name, times in called.items():
        yield from products(getattr(module, name), times)


def cost(module: GraphModule) -> tuple[int, int]:
    """(operations, bytes) of one run of a graph whose nodes carry example values; regions count once a call."""
    every = list(products(module))
    return sum(p.runs * p.operations for p in every), sum(p.runs * p.bytes for p in every)

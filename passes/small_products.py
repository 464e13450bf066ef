"""Small matrices applied to many vectors, exact: written out as products and sums, which compilers fuse.

Before::                                                  After::

    y = einsum("bcij,bncpkj->bncpki", camera, x)              y = (camera[:, None, :, None, None] * x[..., None, :]).sum(-1)

A camera's 4 x 4 matrix, or a rotation's 2 x 2, over the channels of every token and head keeps a matrix unit idle and moves every
value through memory once more: on an H100 a tenth of HY-WorldPlay's denoising step. Written out it is done where the values are made or read.
The arithmetic is that of the product: operands in its dtype, sums in fp32 where that is half precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from li_compile.patterns.graph import MATMUL, calls, letters_of, name_of, shape, subgraphs, subscripts, value

from .record import Record

MOST = 8  # terms of a sum, and rows of the smaller operand; Inductor writes sums of as many out
HALF = (torch.float16, torch.bfloat16)


class Product(NamedTuple):
    """Operands, a letter for each of their dimensions, and for each of the result's; ``summed`` is the one that is summed over."""

    operands: tuple[Node, Node]
    letters: tuple[list[str], list[str]]
    out: list[str]
    summed: str


def small_products(module: GraphModule) -> Record:
    """Rewrite a graph and its regions, in place. Counts the products that are gone."""
    record = Record("small_products")
    for graph_module in (module, *subgraphs(module).values()):
        for node in list(graph_module.graph.nodes):
            product = read(node)
            if product is None or not is_small(product):
                continue
            with graph_module.graph.inserting_before(node):
                new = written_out(graph_module.graph, product, value(node).dtype)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
            record.count += 1
    return record


def read(node: Node) -> Product | None:
    """A product of two tensors that sums over one dimension, which both have; None for anything else."""
    if node.op not in ("call_function", "call_method") or not isinstance(value(node), torch.Tensor) or not value(node).is_floating_point():
        return None
    if calls(node, MATMUL | {"__matmul__"}) or name_of(node) == "matmul":
        operands, ranks = node.args[:2], [len(shape(x) or ()) for x in node.args[:2] if isinstance(x, Node)]
        if len(node.args) != 2 or node.kwargs or len(ranks) != 2 or ranks[0] != ranks[1] or ranks[0] < 2:
            return None
        batch = [f"...{i}" for i in range(ranks[0] - 2)]
        return Product(tuple(operands), ([*batch, "x", "z"], [*batch, "z", "y"]), [*batch, "x", "y"], "z")
    if name_of(node) != "einsum" or len(node.args) != 3 or not isinstance(node.args[0], str):
        return None
    terms, result = subscripts(node.args[0])
    a, b, out = (letters_of(t, len(shape(x) or ())) if isinstance(x, Node) else None for t, x in zip((*terms, result or ""), (*node.args[1:], node)))
    if not (a and b and out) or any(len(set(x)) != len(x) for x in (a, b, out)):
        return None
    summed = (set(a) | set(b)) - set(out)
    if len(summed) != 1 or not summed <= set(a) & set(b):
        return None
    return Product(tuple(node.args[1:]), (a, b), out, *summed)


def is_small(product: Product) -> bool:
    """Whether the sums are short and one operand has few rows that the other does not have: a matrix product would keep few rows busy."""
    sizes, own = {}, []
    for x, letters in zip(product.operands, product.letters):
        if not isinstance(x, Node) or shape(x) is None or len(shape(x)) != len(letters):
            return False
        sizes |= {letter: size for letter, size in zip(letters, shape(x)) if letter not in sizes or sizes[letter] == 1}
    for letters, others in (product.letters, product.letters[::-1]):
        rows = [sizes[letter] for letter in letters if letter not in others]
        own.append(math.prod(rows) if all(isinstance(n, int) for n in rows) else MOST + 1)
    terms = sizes[product.summed]
    return isinstance(terms, int) and terms <= MOST and min(own) <= MOST


def written_out(graph: Graph, product: Product, dtype: torch.dtype) -> Node:
    order, wide, factors = [*product.out, product.summed], torch.float32 if dtype in HALF else dtype, []
    for x, letters in zip(product.operands, product.letters):
        given = value(x).dtype
        for target in (dtype, wide):  # autocast rounds what a product is given
            if given != target:
                x, given = graph.call_method("to", (x, target)), target
        at = [letters.index(letter) for letter in order if letter in letters]
        if at != sorted(at):
            x = graph.call_method("permute", (x, at))
        for i, letter in enumerate(order):
            if letter not in letters:
                x = graph.call_method("unsqueeze", (x, i))
        factors.append(x)
    total = graph.call_method("sum", (graph.call_function(torch.mul, tuple(factors)), -1))
    return total if wide == dtype else graph.call_method("to", (total, dtype))

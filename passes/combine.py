"""Writing linear combinations back into a graph, with as few operators as they need."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import sympy
import torch
from torch.fx import Graph, Node

from li_compile.patterns.graph import value
from li_compile.patterns.linear import Blocks, Linear

# Coefficients come from doubles that a scheduler rounded: what is as near to 0 or 1 as this is meant to be.
CLOSE = 1e-9
HALF = {torch.float16, torch.bfloat16}


def emit(graph: Graph, x: Linear | Blocks, symbols: Mapping[sympy.Symbol, Node], dtype: torch.dtype) -> Node:
    """Nodes that compute x, at the graph's insertion point; half precision is summed in fp32 and rounded once.

    Raises ValueError for coefficients other than sums, products and powers of numbers and symbols.
    """
    if isinstance(x, Blocks):
        return graph.call_function(torch.cat, ([emit(graph, part, symbols, dtype) for _, part in x.parts], x.dim))
    terms = [(c, node, chain) for (node, chain), c in x.terms.items() if not (c.is_number and abs(float(c)) < CLOSE)]
    wide = torch.float32 if any(value(n).dtype in HALF for _, n, _ in terms) or dtype in HALF else None
    total: Node | None = None
    for c, node, chain in sorted(terms, key=lambda term: not _is_one(term[0])):  # a term of weight 1 needs no product
        for view in chain:
            node = graph.call_method("reshape", (node, view[1])) if view[0] == "reshape" else \
                graph.call_function(torch.narrow, (node, view[1], view[2], view[3] - view[2]))
        if wide is not None and (len(terms) > 1 or not _is_one(c)):
            node = graph.call_method("to", (node, wide))
        if not _is_one(c):
            node = graph.call_function(operator.mul, (node, _number(graph, c, symbols)))
        total = node if total is None else graph.call_function(operator.add, (total, node))
    if x.constant != 0:
        total = graph.call_function(operator.add, (total, _number(graph, x.constant, symbols)))
    return graph.call_method("to", (total, dtype)) if wide is not None else total


def operations(x: Linear | Blocks) -> int:
    """Products and sums that emit would write."""
    if isinstance(x, Blocks):
        return sum(operations(part) for _, part in x.parts)
    terms = [c for c in x.terms.values() if not (c.is_number and abs(float(c)) < CLOSE)]
    return max(0, len(terms) - 1) + sum(not _is_one(c) for c in terms)


def _is_one(c: sympy.Expr) -> bool:
    return bool(c.is_number) and abs(float(c) - 1) < CLOSE


def _number(graph: Graph, c: sympy.Expr, symbols: Mapping[sympy.Symbol, Node]) -> float | Node:
    if c.is_number:
        return float(c)
    if c.is_Symbol:
        return symbols[c]
    if c.is_Pow and c.exp.is_number:
        return graph.call_function(operator.pow, (_number(graph, c.base, symbols), float(c.exp)))
    if c.is_Add or c.is_Mul:
        parts = [_number(graph, a, symbols) for a in c.args]
        join = operator.add if c.is_Add else operator.mul
        total = parts[0]
        for part in parts[1:]:
            total = graph.call_function(join, (total, part))
        return total
    raise ValueError(f"coefficient {c} is no polynomial in the numbers of the graph")

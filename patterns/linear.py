"""Linear combinations of a graph's tensors, with symbolic coefficients: what linear_read.py reads a scheduler's arithmetic as.

    x2 = x0 - 0.0625 v0 + d v1

Coefficients are sympy expressions over numbers and over graph nodes that hold few of them (a sigma, a guidance scale).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import sympy
import torch
from torch.fx import Node

from .graph import shape

# What a combination is made of: a node, seen through a chain of ("reshape", sizes) and ("slice", dim, start, stop).
Atom = tuple[Node, tuple]


@dataclasses.dataclass(frozen=True)
class Linear:
    """sum of coefficient * atom, plus a constant; of the given shape."""

    terms: dict[Atom, sympy.Expr]
    shape: tuple[int, ...]
    constant: sympy.Expr = sympy.Integer(0)

    def scaled(self, by: sympy.Expr) -> Linear:
        return Linear({a: sympy.expand(c * by) for a, c in self.terms.items()}, self.shape, self.constant * by)

    def plus(self, other: Linear, by: sympy.Expr = sympy.Integer(1)) -> Linear:
        terms = dict(self.terms)
        for atom, c in other.terms.items():
            terms[atom] = sympy.expand(terms.get(atom, 0) + c * by)
        size = torch.broadcast_shapes(self.shape, other.shape)
        return Linear({a: c for a, c in terms.items() if c != 0}, tuple(size), self.constant + other.constant * by)

    def nodes(self) -> set[Node]:
        return {node for node, _ in self.terms}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A concatenation along dim of linear combinations, each with its size there (frames that are pinned, and the rest)."""

    dim: int
    parts: tuple[tuple[int, Linear], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = list(self.parts[0][1].shape)
        first[self.dim] = sum(size for size, _ in self.parts)
        return tuple(first)

    def nodes(self) -> set[Node]:
        return set().union(*(part.nodes() for _, part in self.parts))

    def map(self, change: Callable[[Linear], Linear]) -> Blocks:
        return Blocks(self.dim, tuple((size, change(x)) for size, x in self.parts))


Value = Linear | Blocks | sympy.Expr


def each(x: Value | None, change: Callable[[Linear], Linear]) -> Value | None:
    return x.map(change) if isinstance(x, Blocks) else change(x) if isinstance(x, Linear) else None


def joined(x: Value, y: Value, join: Callable[[Linear, Linear], Linear]) -> Value | None:
    """join(x, y), part by part where either is a concatenation."""
    if isinstance(x, Linear) and isinstance(y, Linear):
        return join(x, y)
    like = x if isinstance(x, Blocks) else y
    if not isinstance(like, Blocks) or not isinstance(x, Linear | Blocks) or not isinstance(y, Linear | Blocks):
        return None
    parts, start = [], 0
    for size, _ in like.parts:
        a, b = (part_of(v, like.dim, start, start + size) for v in (x, y))
        if not isinstance(a, Linear) or not isinstance(b, Linear):
            return None
        parts.append((size, join(a, b)))
        start += size
    return Blocks(like.dim, tuple(parts))


def part_of(x: Linear | Blocks, dim: int, start: int, stop: int) -> Linear | Blocks:
    """The slice start ... stop - 1 of x along dim. Raises ValueError where it cuts a block of a concatenation."""
    if isinstance(x, Linear):
        if not all(shape_of(a) == x.shape for a in x.terms):
            raise ValueError("broadcast operands are not sliced")
        size = (*x.shape[:dim], stop - start, *x.shape[dim + 1:])
        return Linear({view(a, ("slice", dim, start, stop)): c for a, c in x.terms.items()}, size, x.constant)
    if dim != x.dim:
        return x.map(lambda part: part_of(part, dim, start, stop))
    kept, at = [], 0
    for size, part in x.parts:
        if start <= at and at + size <= stop:
            kept.append((size, part))
        elif at < stop and start < at + size:
            raise ValueError("a slice across a concatenation")
        at += size
    return kept[0][1] if len(kept) == 1 else Blocks(x.dim, tuple(kept))


def shape_of(atom: Atom) -> tuple[int, ...]:
    node, chain = atom
    size = tuple(shape(node) or ())
    for step in chain:
        size = step[1] if step[0] == "reshape" else (*size[: step[1]], step[3] - step[2], *size[step[1] + 1:])
    return size


def view(atom: Atom, step: tuple) -> Atom:
    """An atom seen through one more view; reshapes in a row are one, and one to the shape that it had is none."""
    node, chain = atom
    if step[0] == "reshape" and chain and chain[-1][0] == "reshape":
        chain = chain[:-1]
    if step[0] == "slice" and chain and chain[-1][:2] == step[:2]:
        step, chain = ("slice", step[1], chain[-1][2] + step[2], chain[-1][2] + step[3]), chain[:-1]
    if step[0] == "reshape" and shape_of((node, chain)) == step[1]:
        return node, chain
    return node, (*chain, step)

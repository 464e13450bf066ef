"""A spelling: a piece of a graph that computes what canonical PyTorch says differently, and what it says.

What is found is a fact; ``passes/respell.py`` puts the canonical form in its place, so that every matcher and pass
behind it sees one spelling.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ._compat import fake_mode_of, faking, known
from .graph import Miss, source_line, value


@dataclasses.dataclass
class Spelling:
    """nodes: what is covered, the last one the anchor; replaced: the nodes whose value ``meaning(*operands)`` is: the
    anchor, or what takes the result out of the tuple that it returns. meaning: plain PyTorch, traced symbolically."""

    pattern: str
    kind: str
    nodes: list[Node]
    replaced: list[Node]
    operands: list[Node]
    meaning: Callable
    dead: list[Node] = dataclasses.field(default_factory=list)  # what is of no use without the anchor, in graph order

    @property
    def anchor(self) -> Node:
        return self.nodes[-1]


def refuse(kind: str, node: Node, pattern: str, reason: str) -> Miss:
    return Miss(kind, node.name, f"pattern {pattern!r}: {reason}", source_line(node))


def replaced_by(node: Node, result: int | None) -> list[Node] | int:
    """The nodes that hold a call's result; the index of another one that is used, if any is."""
    if result is None:
        return [node]
    takes = [u for u in node.users if u.target is operator.getitem]
    other = [u for u in takes if u.args[1] != result and u.users]
    if other or len(takes) < len(node.users):
        return other[0].args[1] if other else -1
    return [u for u in takes if u.args[1] == result]


def disagreement(spelling: Spelling) -> str | None:
    """How the shape or dtype of the canonical form differs from that of what it replaces; None if it does not.

    Runs the canonical form on the example values (fake tensors: nothing is computed).
    """
    given = [value(n) if isinstance(n, Node) else n for n in spelling.operands]
    mode = fake_mode_of(given)
    if mode is None or not spelling.replaced:
        return None
    try:
        with faking(mode):
            made = spelling.meaning(*given)
    except Exception as error:  # whatever an operator says of shapes that do not fit
        return f"the canonical form does not take these operands ({type(error).__name__}: {str(error).splitlines()[0]})"
    for node in spelling.replaced:
        was = value(node)
        if not isinstance(was, torch.Tensor) or not isinstance(made, torch.Tensor):
            return f"it replaces {type(was).__name__} by {type(made).__name__}"
        same = len(was.shape) == len(made.shape) and all(known(a == b) for a, b in zip(was.shape, made.shape))
        if not same or was.dtype != made.dtype:
            return f"it yields {tuple(made.shape)} {made.dtype} where {tuple(was.shape)} {was.dtype} is computed"
    return None

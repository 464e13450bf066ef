"""The scheduler's arithmetic between the calls of a denoising loop: each step's state in terms of what came before.

    Euler:                      x[i+1] = x[i] + d v[i]
    clean state, noise again:   x[i+1] = (1 - s) (x[i] - sigma v[i]) + s noise
    multistep (UniPC, order 2): x[i+1] = a x[i] + b x[i-1] + c v[i] + d v[i-1] + ...
"""

from __future__ import annotations

import dataclasses
import math

import sympy
from torch.fx import Node

from .effects import VALUE_FREE
from .graph import SHAPE_ONLY, Miss, argument, descendants, name_of, shape
from .linear import Blocks, Linear
from .linear_read import Reader, number
from .loop_body import Body

FORMS = ["Euler", "first order", "clean state and fresh noise", "multistep"]
FILLED = {"full_like": 1, "full": 1, "new_full": 2, "fill": 1}


@dataclasses.dataclass
class Updates:
    """kind: one of FORMS, "" where the update is not linear or there is but one step. states: the node that holds each step's state
    (empty if it was not found). times: what the model is told of each step's noise level, falling or rising throughout,
    up to a linear map; None if unknown. symbols: the graph nodes that stand in ``times``."""

    kind: str
    states: list[Node]
    times: list[sympy.Expr] | None
    symbols: dict[sympy.Symbol, Node]


def read_updates(nodes: list[Node], outputs: list[list[Node]], body: Body | Miss) -> Updates:
    """Read the arithmetic of a loop whose step i hands on outputs[i]."""
    if isinstance(body, Miss):
        return Updates("", [], None, {})
    # Noise of a state's size is drawn anew, whatever the state is.
    steps, later = len(outputs), descendants([o for out in outputs for o in out], lambda n: name_of(n) in VALUE_FREE)
    operands = [n[:: body.calls // steps] for n in body.varying]
    states = _state([n for n in operands if any(x in later for x in n)], outputs)
    forms = [_form(states, outputs, i, later) for i in range(len(states) - 1)]
    # The first step of a multistep method is Euler's: the loop is called by the most that any step does.
    kind = max(forms, key=FORMS.index, default="") if all(forms) else ""
    reader = Reader([])
    times = next((t for n in operands if not any(x in later for x in n) and (t := _times(reader, n)) is not None), None)
    if times is None:
        times = next(([number(v) for v in n.values[:: body.calls // steps]] for n in body.numbers), None)
    if times is None and kind == "Euler":
        times = _noise_levels(states, outputs)
    return Updates(kind, list(states), times, reader.symbols)


def _state(recurrent: list[tuple[Node, ...]], outputs: list[list[Node]]) -> tuple[Node, ...]:
    """Of the operands that depend on earlier calls, the one of an output's size."""
    sizes = {str(shape(o)) for o in outputs[0]}
    return next((n for n in recurrent if str(shape(n[-1])) in sizes), recurrent[0] if len(recurrent) == 1 else ())


def _linear(value) -> Linear | None:
    """The combination itself or, of pinned frames and free ones, that of the free ones (the last block)."""
    if isinstance(value, Blocks):
        value = value.parts[-1][1]
    return value if isinstance(value, Linear) else None


def _form(states: tuple[Node, ...], outputs: list[list[Node]], i: int, later: set[Node]) -> str:
    """How state i + 1 is made of the states and outputs before it; "" if it is no linear combination of them."""
    steps = {o: k for k, out in enumerate(outputs) for o in out}
    before = {n: k for k, n in enumerate(states[: i + 1])}
    read = _linear(Reader([*steps, *before], later).read(states[i + 1]))
    if read is None or not any(n in steps for n in read.nodes()) or any(n in later and n not in steps | before for n in read.nodes()):
        return ""
    used = {steps[n] for n in read.nodes() if n in steps}
    kept = {before[n]: c for (n, _), c in read.terms.items() if n in before}
    if len(used) > 1 or any(k != i for k in kept):
        return "multistep"
    if any(n not in steps and n not in before for n in read.nodes()):
        return "clean state and fresh noise"
    whole = set(kept) == {i} and kept[i].is_number and abs(float(kept[i]) - 1) < 1e-9
    return "Euler" if whole else "first order"


def _times(reader: Reader, nodes: tuple[Node, ...]) -> list[sympy.Expr] | None:
    """A number or symbol a step, if these nodes hold one each: a tensor filled with it, a 0-d tensor, views of either."""
    found = []
    for node in nodes:
        source = _narrowest(node)
        read = _filled(reader, source)
        read = reader.read(source) if read is None else read
        if isinstance(read, Linear | Blocks):
            return None
        found.append(read)
    numbers = [float(t) for t in found if t.is_number]
    rises = [b - a for a, b in zip(numbers, numbers[1:])]
    if len(set(found)) < len(found) or numbers and not (all(r > 0 for r in rises) or all(r < 0 for r in rises)):
        return None
    return found


def _filled(reader: Reader, node: Node) -> sympy.Expr | None:
    """What a tensor is filled with: full_like(x, t), ones_like(x) * t."""
    name = name_of(node)
    if node.op not in ("call_function", "call_method"):
        return None
    if name in FILLED:
        fill = argument(node, FILLED[name], "fill_value", "value")
        return reader.read(fill) if isinstance(fill, Node) else number(fill)
    if name in ("ones", "ones_like", "new_ones"):
        return number(1)
    if name in ("mul", "multiply") and len(node.args) == 2:
        factors = [number(x) if isinstance(x, (int, float)) else _filled(reader, x) for x in node.args]
        return None if None in factors else factors[0] * factors[1]
    return None


def _narrowest(node: Node) -> Node:
    """What a time is an expanded view of: a node of one element, or one that is no view."""
    while (shape(node) is None or math.prod(shape(node)) != 1) and node.op.startswith("call") and \
            name_of(node) in SHAPE_ONLY and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _noise_levels(states: tuple[Node, ...], outputs: list[list[Node]]) -> list[sympy.Expr] | None:
    """Of Euler's method, the noise level of each step up to a constant: the sum of the steps so far."""
    levels = [sympy.Integer(0)]
    for i in range(len(states) - 1):
        read = _linear(Reader([*outputs[i], states[i]]).read(states[i + 1]))
        steps = [c for (n, _), c in read.terms.items() if n in outputs[i]]
        if not all(c.is_number for c in steps):
            return None
        levels.append(levels[-1] + sum(steps))
    return levels if len({float(x) for x in levels}) == len(levels) else None

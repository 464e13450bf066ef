"""Reading a scheduler's arithmetic: nodes of a graph as linear combinations (linear.py) of others.

    x1 = x0 + v0 * -0.0625; x2 = (x1.float() + v1 * d).to(x1.dtype)     ->   x2 = x0 - 0.0625 v0 + d v1

Casts count as the identity: a combination says what is computed, not in which precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import sympy
from torch.fx import Node

from .graph import CAT, argument, calls, cat_operands, name_of, shape
from .linear import Blocks, Linear, Value, each, joined, part_of, shape_of, view

SMALL = 16  # a tensor with at most 1 / SMALL of the elements that it multiplies is a coefficient

_SAME = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy", "clone", "contiguous", "detach", "alias"}
_RESHAPES = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
_SCALAR = {"exp": sympy.exp, "log": sympy.log, "sqrt": sympy.sqrt, "rsqrt": lambda x: 1 / sympy.sqrt(x),
           "expm1": lambda x: sympy.exp(x) - 1, "reciprocal": lambda x: 1 / x, "square": lambda x: x**2}
_NAMES = {"__add__": "add", "__radd__": "add", "__sub__": "sub", "__rsub__": "rsub", "__mul__": "mul", "multiply": "mul",
          "subtract": "sub", "truediv": "div", "divide": "div", "true_divide": "div", "negative": "neg"}


class Reader:
    """Reads nodes as combinations of the atoms given and of whatever is no sum and no multiple.

    atoms: nodes that are not read any further (what a model call hands on). depends: nodes that may not be taken for
    coefficients, however few elements they have.
    """

    def __init__(self, atoms: Iterable[Node], depends: Iterable[Node] = ()) -> None:
        self.atoms, self.depends = set(atoms), set(depends)
        self.symbols: dict[sympy.Symbol, Node] = {}
        self._known: dict[Node, Value] = {}

    def read(self, node: Node) -> Value:
        """The value of a node; a number for what has one element, a Linear or Blocks for a tensor."""
        todo = [node]
        while todo:  # without recursion: chains of many steps are deep
            node = todo[-1]
            if node in self._known:
                todo.pop()
                continue
            open_ = [n for n in self._operands(node) if n not in self._known]
            if open_:
                todo += open_
                continue
            self._known[node] = self._value(node)
            todo.pop()
        return self._known[node]

    def understands(self, node: Node) -> bool:
        """Whether a node is read by what it does; all others are atoms."""
        return node.op in ("call_function", "call_method") and node not in self.atoms and (
            _op(node) in _RULES or calls(node, CAT) or _op(node) in _SCALAR)

    def _operands(self, node: Node) -> list[Node]:
        return node.all_input_nodes if self.understands(node) else []

    def _value(self, node: Node) -> Value:
        found = None
        if self._operands(node):
            try:
                found = self._scalar(node) if self._is_small(node) else _RULES.get(_op(node), _concatenated)(self, node)
            except (TypeError, ValueError, AttributeError, IndexError):  # operands of a kind that the rule does not know
                found = None
        elif (number := _literal(node)) is not None:
            found = number
        if found is not None:
            return found
        return self._symbol(node) if self._is_small(node) else Linear({(node, ()): sympy.Integer(1)}, self._shape(node))

    def _shape(self, node: Node) -> tuple[int, ...]:
        s = shape(node)
        return tuple(s) if s is not None and all(isinstance(d, int) for d in s) else ()

    def _is_small(self, node: Node) -> bool:
        s = shape(node)
        if node in self.atoms or node in self.depends:
            return False
        return s is None or (all(isinstance(d, int) for d in s) and math.prod(s) == 1)

    def _symbol(self, node: Node) -> sympy.Symbol:
        symbol = sympy.Symbol(node.name)
        self.symbols[symbol] = node
        return symbol

    def _scalar(self, node: Node) -> sympy.Expr | None:
        op, args = _op(node), node.args
        get = lambda x: self._known[x] if isinstance(x, Node) else number(x)
        if op in _SAME | _RESHAPES:
            return _expression(get(args[0]))
        if op == "getitem" or op in ("select", "unbind"):
            return _literal_item(node)
        if op in _SCALAR:
            return _SCALAR[op](_expression(get(args[0])))
        if op == "neg":
            return -_expression(get(args[0]))
        if op == "pow":
            return _expression(get(args[0])) ** _expression(get(args[1]))
        if op in ("add", "sub", "mul", "div", "rsub") and set(node.kwargs) <= {"alpha"}:
            a, b = _expression(get(args[0])), _expression(get(args[1])) * number(node.kwargs.get("alpha", 1))
            return {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b, "rsub": b - a}[op]
        return None

    def operand(self, x: object) -> Value:
        """An operand of a tensor operator; a tensor with few elements is a coefficient, by its node."""
        if not isinstance(x, Node):
            return number(x)
        return self._known[x]

    def coefficient(self, x: object, like: tuple[int, ...]) -> sympy.Expr | None:
        """An operand as a coefficient of a tensor of shape ``like``; None if it is a tensor of that kind itself."""
        found = self.operand(x)
        if not isinstance(found, Linear | Blocks):
            return found
        independent = isinstance(found, Linear) and not {x, *found.nodes()} & (self.atoms | self.depends)
        few = bool(found.shape) and math.prod(found.shape) * SMALL <= math.prod(like)
        return self._symbol(x) if independent and few else None


def number(x: object) -> sympy.Expr:
    """A Python number, exact to its last digit."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{x!r} is no number")
    return sympy.Integer(x) if isinstance(x, int) else sympy.Float(x, 34)


def _expression(x: Value) -> sympy.Expr:
    if isinstance(x, Linear | Blocks):
        raise TypeError("a tensor, not a number")
    return x


def _op(node: Node) -> str:
    return _NAMES.get(name_of(node), name_of(node))


def _literal(node: Node) -> sympy.Expr | None:
    """The number that a node holds, if it is written in the graph."""
    if name_of(node) in ("tensor", "scalar_tensor") and isinstance(node.args[0], (int, float)):
        return number(node.args[0])
    if name_of(node) == "full" and shape(node) is not None and math.prod(shape(node)) == 1 and \
            isinstance(argument(node, 1, "fill_value"), (int, float)):
        return number(argument(node, 1, "fill_value"))
    return None


def _literal_item(node: Node) -> sympy.Expr | None:
    """One number of a list that is written in the graph: ``torch.tensor([1.0, 0.5])[0]``, sliced or unbound before."""
    if not (name_of(node) == "getitem" and isinstance(node.args[1], int)):
        return None
    index, source, slices = node.args[1], node.args[0], []
    while name_of(source) in ("getitem", "unbind") and isinstance(source.args[0], Node):
        if name_of(source) == "getitem":
            if not isinstance(source.args[1], slice):
                return None
            slices.append(source.args[1])
        source = source.args[0]
    items = source.args[0] if name_of(source) == "tensor" and source.args else None
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, (int, float)) for i in items):
        return None
    for s in reversed(slices):
        items = items[s]
    return number(items[index])


# Rules for tensors: (reader, node) -> its value, or None where it is not understood.


def _sum(reader: Reader, node: Node, sign: int) -> Value | None:
    if not set(node.kwargs) <= {"alpha"}:
        return None
    a, b = node.args[:2]
    by = sign * number(node.kwargs.get("alpha", 1))
    x, y = reader.operand(a), reader.operand(b)
    like = _size(x, y)
    if (c := reader.coefficient(a, like)) is not None and isinstance(y, Linear | Blocks):
        return each(y, lambda part: Linear({}, part.shape, c).plus(part, by)) if c.is_number else None
    if (c := reader.coefficient(b, like)) is not None:
        return each(x, lambda part: part.plus(Linear({}, part.shape, c), by)) if c.is_number else None
    return joined(x, y, lambda one, other: one.plus(other, by))


def _product(reader: Reader, node: Node, divide: bool = False) -> Value | None:
    if node.kwargs:
        return None
    a, b = node.args[:2]
    x, y = reader.operand(a), reader.operand(b)
    like = _size(x, y)
    if isinstance(x, Linear | Blocks) and (c := reader.coefficient(b, like)) is not None:
        return each(x, lambda part: part.scaled(1 / c if divide else c))
    if not divide and isinstance(y, Linear | Blocks) and (c := reader.coefficient(a, like)) is not None:
        return each(y, lambda part: part.scaled(c))
    return None


def _lerp(reader: Reader, node: Node) -> Value | None:
    x, y = (reader.operand(n) for n in node.args[:2])
    c = reader.coefficient(node.args[2], _size(x, y))
    return None if c is None else joined(x, y, lambda a, b: a.scaled(1 - c).plus(b, c))


def _reshaped(reader: Reader, node: Node) -> Value | None:
    x, size = reader.operand(node.args[0]), shape(node)
    if not isinstance(x, Linear) or not all(isinstance(d, int) for d in size):
        return None
    return Linear({view(a, ("reshape", tuple(size))): c for a, c in x.terms.items()}, tuple(size), x.constant) \
        if all(shape_of(a) == x.shape for a in x.terms) else None


def _sliced(reader: Reader, node: Node) -> Value | None:
    x, index = reader.operand(node.args[0]), node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        index = index[: index.index(Ellipsis)] + (slice(None),) * (len(x.shape) - len(index) + 1) + index[index.index(Ellipsis) + 1:]
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return None
    for dim, i in enumerate(index):
        start, stop, _ = i.indices(x.shape[dim])
        if (start, stop) != (0, x.shape[dim]):
            x = part_of(x, dim, start, stop)
    return x


def _concatenated(reader: Reader, node: Node) -> Value | None:
    operands, dim = cat_operands(node)
    parts = [reader.operand(o) for o in operands]
    return Blocks(dim, tuple((p.shape[dim], p) for p in parts)) if all(isinstance(p, Linear) and p.shape for p in parts) else None


_RULES: dict[str, Callable[[Reader, Node], Value | None]] = {
    "add": lambda r, n: _sum(r, n, 1), "sub": lambda r, n: _sum(r, n, -1), "mul": _product,
    "rsub": lambda r, n: each(_sum(r, n, -1), lambda x: x.scaled(sympy.Integer(-1))),
    "div": lambda r, n: _product(r, n, divide=True), "neg": lambda r, n: each(r.operand(n.args[0]), lambda x: x.scaled(sympy.Integer(-1))),
    "lerp": _lerp, "getitem": _sliced,
    **dict.fromkeys(_SAME, lambda r, n: r.operand(n.args[0])), **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(("pow", "select", "unbind"), lambda r, n: None),
}


def _size(*values: Value) -> tuple[int, ...]:
    return max((v.shape for v in values if isinstance(v, Linear | Blocks)), key=math.prod, default=())

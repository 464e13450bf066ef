"""Complex products in real arithmetic, exact: rotary embeddings written with complex numbers become what compilers fuse.

Before::                                        After::

    z = view_as_complex(x)        # [..., D/2, 2]    a, b = x[..., 0], x[..., 1]
    z = z * polar(ones, angle)                       c, d = ones * angle.cos(), ones * angle.sin()
    y = view_as_real(z)                              y = stack([a * c - b * d, a * d + b * c], -1)

Inductor has no code for complex numbers and calls PyTorch's kernels, one a product, with nothing fused around them. Views, casts
and concatenations of complex values between are done to both parts.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from li_compile.patterns.effects import target, written
from li_compile.patterns.graph import name_of, subgraphs, value

from .record import Record
from .regions import drop_dead

PRODUCTS = {"mul", "multiply"}
MOVES = {"view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "clone", "expand", "chunk",
         "split", "unbind", "getitem", "select", "narrow", "cat", "concat", "stack", "repeat", "repeat_interleave", "detach"}  # fmt: skip
CASTS = {"to", "type"}
HALF = {torch.complex64: torch.float32, torch.complex128: torch.float64}
Parts = tuple[Node, Node]


def real_arithmetic(module: GraphModule) -> Record:
    """Rewrite a graph and its regions, in place. Counts the complex products that are gone."""
    record = Record("real_arithmetic")
    for graph_module in (module, *subgraphs(module).values()):
        changing, made = written(graph_module.graph), _Made(graph_module.graph)
        for node in list(graph_module.graph.nodes):
            if name_of(node) == "view_as_real" and node.op.startswith("call") and _has_product(node.args[0]) \
                    and not any(target(n) in changing for n in _tree(node.args[0])):  # fmt: skip
                with graph_module.graph.inserting_before(node):
                    new = graph_module.graph.call_function(torch.stack, (list(made.parts(node.args[0])), -1))
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
        record.count += len(made.products)
        drop_dead(graph_module)
    return record


def _is_complex(node) -> bool:
    v = value(node) if isinstance(node, Node) else None
    v = v[0] if isinstance(v, (tuple, list)) and v else v
    return isinstance(v, torch.Tensor) and v.dtype in HALF


def _follows(node: Node) -> bool:
    """Whether both parts of a complex value are found from those of its operands."""
    if not node.op.startswith("call") or not node.args:
        return False
    name, complex_ = name_of(node), [x for x in node.all_input_nodes if _is_complex(x)]
    if name in PRODUCTS:
        return len(node.args) == 2 and bool(complex_) and all(isinstance(x, Node) and isinstance(value(x), torch.Tensor) for x in node.args)
    if name in CASTS:
        return bool(complex_) and value(node).dtype in HALF and set(node.kwargs) <= {"dtype"} and len(node.args) <= 2 \
            and value(node).device == value(complex_[0]).device
    return name in MOVES and bool(complex_) and not node.kwargs.keys() - {"dim", "dims", "axis", "repeats"}


def _tree(node: Node) -> list[Node]:
    """A complex value and those that it is made of, as far as they are followed."""
    found, todo = [], [node]
    while todo:
        n = todo.pop()
        if n not in found:
            found.append(n)
            todo += [x for x in n.all_input_nodes if _is_complex(x)] if _follows(n) else []
    return found


def _has_product(node: Node) -> bool:
    return any(name_of(n) in PRODUCTS and _follows(n) for n in _tree(node))


class _Made:
    """Both parts of the complex values of a graph, written into it as they are asked for."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.graph, self.known, self.products = graph, {}, []

    def parts(self, node: Node) -> Parts:
        if node not in self.known:
            for operand in node.all_input_nodes if _follows(node) else ():
                if _is_complex(operand):
                    self.parts(operand)
            with self.graph.inserting_after(node):
                anchor = self.graph.call_function(torch.empty, (0,))
            with self.graph.inserting_before(anchor):
                self.known[node] = self._make(node)
            self.graph.erase_node(anchor)
        return self.known[node]

    def _make(self, node: Node) -> Parts:
        function, method, name = self.graph.call_function, self.graph.call_method, name_of(node)
        if not _follows(node):
            if node.op.startswith("call") and name == "view_as_complex":
                return tuple(method("select", (node.args[0], -1, i)) for i in (0, 1))
            if node.op.startswith("call") and name == "polar" and len(node.args) == 2:
                size, angle = node.args
                return tuple(function(torch.mul, (size, method(f, (angle,)))) for f in ("cos", "sin"))
            return function(torch.real, (node,)), function(torch.imag, (node,))
        if name in PRODUCTS:
            self.products.append(node)
            return self._product(*node.args)
        if name in CASTS:
            return tuple(method("to", (x, HALF[value(node).dtype])) for x in self.known[node.args[0]])
        part = lambda i: map_arg((node.args, node.kwargs), lambda n: self.known[n][i] if n in self.known else n)
        same = {"view": "reshape"}.get(name, node.target)  # a part is every other number: no view of it has another shape
        return tuple(self.graph.create_node(node.op, same if node.op == "call_method" else torch.reshape if same == "reshape" else same, *part(i))
                     for i in (0, 1))

    def _product(self, one: Node, other: Node) -> Parts:
        function = self.graph.call_function
        times = lambda x, y: function(torch.mul, (x, y))
        if one not in self.known or other not in self.known:  # with a real number
            (a, b), r = (self.known[one], other) if one in self.known else (self.known[other], one)
            return times(a, r), times(b, r)
        (a, b), (c, d) = self.known[one], self.known[other]
        return function(torch.sub, (times(a, c), times(b, d))), function(torch.add, (times(a, d), times(b, c)))

"""Vocabulary for reading a canonical graph: shapes, spellings of the few operators that matter, where a node came from.

A canonical graph is a Dynamo graph (or the ATen graph of ``torch.export``) whose nodes carry ``meta["example_value"]``
(or ``meta["val"]``). Nothing here changes a graph.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ._compat import hint, known  # noqa: F401  (part of the vocabulary)

aten = torch.ops.aten

CAT = {torch.cat, torch.concat, torch.concatenate, aten.cat.default}
SDPA = {torch._C._nn.scaled_dot_product_attention, F.scaled_dot_product_attention,
        aten.scaled_dot_product_attention.default}
LINEAR = {torch._C._nn.linear, F.linear, aten.linear.default}
CONV = {torch.conv1d, torch.conv2d, torch.conv3d, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        F.conv1d, F.conv2d, F.conv3d, aten.convolution.default}
MATMUL = {torch.matmul, torch.bmm, aten.matmul.default, aten.bmm.default, "matmul", "bmm"}
REGION = torch.ops.higher_order.invoke_subgraph

# Unary operators that move or retype values without mixing them: what may stand between two things that belong together.
FAMILIES = str(pathlib.Path(__file__).parent / "families")
SHAPE_ONLY = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "clone",
    "movedim", "swapaxes", "expand", "to", "float", "half", "bfloat16", "type", "type_as", "chunk", "split", "unbind",
    "getitem", "detach", "_to_copy", "_unsafe_view", "select", "slice", "t", "alias", "mT",
}


@dataclasses.dataclass(frozen=True)
class Miss:
    """Why something that looked like a pattern is none, or cannot be rewritten: shown to the user."""

    pattern: str
    node: str
    reason: str
    where: str = ""


def value(node: Node):
    """The example value of a node (a fake tensor, a number or a tuple of them), or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def shape(node: Node) -> tuple | None:
    v = value(node)
    return tuple(v.shape) if isinstance(v, torch.Tensor) else None


def name_of(node: Node) -> str:
    """Short name of the operator that a node calls, the same for torch functions, methods and ATen overloads."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target))


def calls(node: Node, targets: set) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def argument(node: Node, position: int, *names: str, default=None):
    """An argument by position or by any of its names."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[n] for n in names if n in node.kwargs), default)


def subscripts(equation: str) -> tuple[list[str], str | None]:
    """Of an einsum's operands and of its result, None where that is implicit."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    return left.split(","), right if arrow else None


def letters_of(term: str, rank: int) -> list[str] | None:
    """A letter or, within an ellipsis, a number counted from its end, for each dimension of an einsum's operand; None if they are not so many."""
    if "..." not in term:
        return list(term) if len(term) == rank else None
    ahead, behind = term.split("...")
    count = rank - len(ahead) - len(behind)
    return None if count < 0 else [*ahead, *(f"...{count - i}" for i in range(count)), *behind]


def cat_operands(node: Node) -> tuple[list[Node], int] | None:
    """Operands and dimension (not negative) of a concatenation, or None if the node is none."""
    if not calls(node, CAT):
        return None
    operands, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", "axis", default=0)
    rank = len(shape(node) or ())
    if not isinstance(operands, (list, tuple)) or not rank:
        return None
    return list(operands), dim % rank


def through_shapes(node: Node) -> Node:
    """Walk back over operators that only move values."""
    while node.op in ("call_function", "call_method") and name_of(node) in SHAPE_ONLY and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def ancestors(roots: list[Node], stop=lambda node: False) -> Iterator[Node]:
    """Every node that the roots depend on, the roots included; nothing behind a node for which stop(node)."""
    seen, todo = set(), list(roots)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            todo.extend(node.all_input_nodes)


def descendants(roots: list[Node], stop=lambda node: False) -> set[Node]:
    """Every node that depends on the roots; none for which stop(node), and nothing behind it."""
    seen, todo = set(), list(roots)
    while todo:
        node = todo.pop()
        for user in node.users:
            if user not in seen and not stop(user):
                seen.add(user)
                todo.append(user)
    return seen


def subgraphs(module: GraphModule) -> dict[str, GraphModule]:
    """Attribute name -> graph module of every nested region that the graph calls."""
    return {n.target: getattr(module, n.target) for n in module.graph.nodes
            if n.op == "get_attr" and isinstance(getattr(module, str(n.target), None), GraphModule)}


def all_graphs(module: GraphModule) -> list[GraphModule]:
    """The graph, its regions and the regions of these, each before what it calls."""
    return [module, *dict.fromkeys(inner for sub in subgraphs(module).values() for inner in all_graphs(sub))]


def is_parameter(node: Node) -> bool:
    """Whether a placeholder is a module's parameter, as Dynamo marks it."""
    return node.type is torch.nn.Parameter or isinstance(value(node), torch.nn.Parameter)


def region_calls(module: GraphModule, attribute: str) -> list[Node]:
    """The calls of one nested region, in graph order."""
    return [n for n in module.graph.nodes if n.target is REGION and n.args[0].target == attribute]


def placeholders(graph: torch.fx.Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def region_operand(call: Node, sub: GraphModule, inner: Node) -> Node:
    """What a call of a region hands to one of the region's placeholders."""
    return call.args[2 + placeholders(sub.graph).index(inner)]


def source_line(node: Node) -> str:
    """The user's source line of a node as ``file:line``, or an empty string; not one of what a family put in its place."""
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    found = [f for f in re.findall(r'File "([^"]+)", line (\d+)', trace) if not f[0].startswith(FAMILIES)]
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""

"""What a node does besides computing its value: draws random numbers, writes in place, or switches a mode."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from .graph import REGION, SHAPE_ONLY, ancestors, name_of, placeholders

# In-place methods, by their names.
_IN_PLACE = {n for n in dir(torch.Tensor) if n.endswith("_") and not n.endswith("__")} - {"requires_grad_"}
RANDOM = {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "dropout", "bernoulli", "multinomial",
          "normal", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "native_dropout", "poisson", "rrelu"}
# Operators that read no more of their first operand than its shape.
VALUE_FREE = {"full_like", "zeros_like", "ones_like", "rand_like", "randn_like", "new_full", "new_zeros", "new_ones"}
WRITES = {"setitem", "iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod", "iand", "ior", "ixor", "imatmul"} | _IN_PLACE
# Operators whose result may share memory with their first operand.
ALIASES = SHAPE_ONLY - {"clone", "_to_copy"} | {"narrow", "view_as", "expand_as", "reshape_as", "broadcast_to", "ravel", "diagonal",
                                                "unfold", "as_strided", "tensor_split", "view_as_real", "view_as_complex", "real",
                                                "imag", "moveaxis", "swapdims", "getattr"}


def effects(node: Node) -> set[str]:
    """Names of the operators with an effect at a node or, where it calls a region, to be seen outside of it."""
    if node.target is REGION:
        return {e for n in _inside(node).graph.nodes for e in effects(n) if not writes_own(n)}
    return {name_of(node)} & (RANDOM | WRITES) if node.op.startswith("call") else set()


def effect(node: Node) -> str | None:
    """One of ``effects``, or None."""
    return min(effects(node), default=None)


@dataclasses.dataclass(frozen=True)
class Write:
    """What an operator writes into, and the nodes that say where in it."""

    base: Node
    place: tuple[Node, ...]


def outside_writes(node: Node) -> list[Write]:
    """The writes of an operator or a region into what its graph did not make: a cache of keys and values, say."""
    if node.target is REGION:
        sub = _inside(node)
        outer = dict(zip(placeholders(sub.graph), node.args[2:]))
        return [Write(target(outer[w.base]), tuple(outer[p] for p in ancestors(list(w.place)) if p in outer))
                for n in sub.graph.nodes for w in outside_writes(n) if w.base in outer and isinstance(outer[w.base], Node)]
    if name_of(node) not in WRITES or not node.op.startswith("call") or writes_own(node):
        return []
    place, at = [x for a in node.args[1:-1] for x in _nodes(a)], node.args[0]
    while isinstance(at, Node) and at.op.startswith("call"):  # a view: its arguments say where as well
        place += [x for a in at.args[1:] for x in _nodes(a)]
        at = at.args[0]
    return [Write(target(node), tuple(place))]


def _nodes(argument) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return found


def _inside(call: Node):
    return getattr(call.graph.owning_module, call.args[0].target)


def target(node: Node) -> Node:
    """What an operator writes into, seen through views and through other writes."""
    while node.op.startswith("call") and name_of(node) in ALIASES | WRITES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def writes_own(node: Node) -> bool:
    """Whether an operator writes into what the graph itself has made: no effect outside, if nobody else reads it."""
    return name_of(node) in WRITES and target(node).op.startswith("call")


def writers(node: Node) -> list[Node]:
    """What writes into a node's value in place, directly or through views, in graph order."""
    found, seen, todo = [], {node}, [node]
    while todo:
        alias = todo.pop()
        for user in alias.users:
            if user.op.startswith("call") and user not in seen and user.args[0] is alias and name_of(user) in ALIASES | WRITES:
                seen.add(user)
                todo.append(user)
                found += [user] if name_of(user) in WRITES else []
    order = {n: i for i, n in enumerate(node.graph.nodes)} if found else {}
    return sorted(found, key=order.get)


def is_pure(node: Node) -> bool:
    """Whether an operator gives the same value wherever it stands, as long as nobody writes into what it reads.

    Of operators that are neither PyTorch's nor ours, and of other higher-order ones, that is not known.
    """
    if node.op not in ("call_function", "call_method") or effects(node) or switches_mode(node) or node.kwargs.get("inplace"):
        return False
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        overload = node.target.default if isinstance(node.target, torch._ops.OpOverloadPacket) and "default" in node.target.overloads() else node.target
        return isinstance(overload, torch._ops.OpOverload) and overload.namespace in ("aten", "prims", "li") and not overload._schema.is_mutable
    return node.target is REGION or not isinstance(node.target, torch._ops.HigherOrderOperator)


def written(graph: torch.fx.Graph) -> set[Node]:
    """What is written in place somewhere in a graph, by itself, through views or by a region."""
    found = {w.base for n in graph.nodes for w in outside_writes(n)}
    return found | {target(n) for n in graph.nodes if n.op.startswith("call") and name_of(n) in WRITES}


def switches_mode(node: Node) -> bool:
    """Whether a node enters or leaves autocast: what stands between such a pair depends on it without an edge."""
    return node.op == "call_function" and name_of(node) in ("_enter_autocast", "_exit_autocast")


def modes(graph) -> dict[Node, tuple[Node, ...]]:
    """Node -> the ``_enter_autocast`` nodes that are open where it stands, outermost first."""
    found, open_ = {}, []
    for node in graph.nodes:
        if name_of(node) == "_exit_autocast" and node.args[0] in open_:
            open_.remove(node.args[0])
        found[node] = tuple(open_)
        if name_of(node) == "_enter_autocast":
            open_.append(node)
    return found


def mode_texts(graph) -> dict[Node, str]:
    """Node -> what autocast is where it stands, as text: equal where ``modes`` come to the same."""
    return {n: repr([(e.args, e.kwargs) for e in open_]) for n, open_ in modes(graph).items()}

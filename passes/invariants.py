"""Invariant code motion, exact: what is computed from the same values is computed once.

Before, in every layer and step::                        After::

    cos = table.cos(); sin = table.sin()                 cos = table.cos()                     # once
    x1 = invoke_subgraph(block, x0, camera, w0)          c = camera @ intrinsics               # once
      in block: c = (camera @ intrinsics).to(bf16)       x1 = invoke_subgraph(block, x0, c, w0)

In a graph, equal nodes are merged (common subexpressions), which is also what takes work out of an unrolled loop over
denoising steps. Out of a region goes what several of its calls would compute from the same operands: layers of a step, the
same layer in all steps. A value that leaves its region has to be stored until the last call has read it, so it goes only if
it is small, or if it saves products worth its memory, and never if it is a mere view, cast or repetition. Nothing moves
across a switch of autocast, nor past a write into what it reads.

The calls of a sampling loop stay alike: nodes of different calls are not merged, and only what can be computed before the
first call leaves its region. What the calls have in common goes when they have become calls of one region (share_steps.py):
from a layer into the step that calls it, and from there to before the first step, within a budget of memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from li_compile.patterns import DenoisingLoop
from li_compile.patterns.effects import is_pure, mode_texts, modes, target, written
from li_compile.patterns.graph import ancestors, descendants, name_of, placeholders, region_calls, subgraphs, value
from li_compile.patterns.loop_body import Body

from .cost import cost_of, nbytes
from .record import Record
from .regions import MOVES, drop_dead, drop_unused, hand_in, outside

SMALL = 2**20  # bytes that are stored in any case
FILLS = {"zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "arange"}  # cheaper than to read
INTENSITY = 64  # operations a byte from which storing a value and reading it costs less than computing it again


@dataclasses.dataclass(frozen=True)
class Moved:
    """A value of a region that is computed outside. saved: computations less; bytes: stored, of all its different values."""

    name: str
    saved: int
    flops: int
    bytes: int

    def __str__(self) -> str:
        work = f", {self.flops / 1e9:.3f} GFLOP less" if self.flops else ""
        return f"{self.name} out of its region: {self.saved} times less{work}, {self.bytes / 1e6:.2f} MB kept"


def invariants(module: GraphModule, loop: DenoisingLoop | None = None) -> Record:
    """Merge equal nodes and move invariant work out of regions, in place. Counts the computations that are gone.

    loop: the sampling loop in the graph, None if there is none.
    """
    record = Record("invariants")
    call_of = _calls(loop)
    # The scheduler's arithmetic between the calls stays as it is written: cached steps fold it whole.
    call_of |= {n: f"alone {n.name}" for n in descendants(list(call_of)) if n not in call_of}
    first = next((n for n in module.graph.nodes if n in call_of), None)
    merged = sum(merge_equal(g.graph, call_of) for g in (module, *subgraphs(module).values()))
    moved = [m for region in subgraphs(module) for m in hoist(module, region, first)]
    merged += merge_equal(module.graph, call_of) if moved else 0
    record.count = merged + sum(m.saved for m in moved)
    record.details += [f"{merged} equal nodes merged"] if merged else []
    record.details += map(str, moved)
    return record


def _calls(loop: DenoisingLoop | None) -> dict[Node, object]:
    """Node -> the call of a loop's model to which it belongs."""
    if loop is None:
        return {}
    if isinstance(loop.body, Body):
        return {n: i for nodes in loop.body.nodes for i, n in enumerate(nodes)}
    inside = lambda anchors, out: set(anchors) | (descendants(anchors) & set(ancestors(out)))
    return {n: i for i, (anchors, out) in enumerate(zip(loop.calls, loop.outputs)) for n in inside(anchors, out)}


def merge_equal(graph: Graph, call_of: Mapping[Node, object] = MappingProxyType({})) -> int:
    """Replace nodes that compute the same of the same by the first of them; how many were replaced.

    call_of: nodes that are merged with nodes of the same mark only.
    """
    first: dict[str, Node] = {}
    numbers: dict[Node, int] = {}
    changing, around, count = written(graph), mode_texts(graph), 0
    for node in list(graph.nodes):
        numbers[node] = len(numbers)
        if not stays(node, changing):
            continue
        text = repr(map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}"))
        # The identity of what is called: two functions may share a name.
        what = node.target if node.op == "call_method" else id(node.target)
        kept = first.setdefault(f"{node.op} {what} {call_of.get(node)} {around[node]} {text}", node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            count += 1
    return count


def stays(node: Node, changing: set[Node]) -> bool:
    """Whether a node's value depends on its operands only, and nobody writes into it or into them."""
    return is_pure(node) and target(node) not in changing and not any(target(x) in changing for x in node.all_input_nodes)


def hoist(module: GraphModule, region: str, first: Node | None = None, late: Set[Node] = frozenset(),
          most: int | None = None) -> list[Moved]:
    """Move values that are the same in several calls out of one region.

    first: a node before which they must all be computed. late: nodes on whose values none may depend. most: how many
    different ones there may be of each; None: any number.
    """
    found = region_calls(module, region)
    few = lambda variety: variety < len(found) and (most is None or variety <= most)
    return _move(module, region, found, few, late, first=first) if len(found) > 1 else []


def lift(step: GraphModule, region: str, late: Set[Node], memory: float) -> list[Moved]:
    """Move out of a step's region, of a layer say, what depends on nothing that changes from step to step: one value a call, which
    ``hoist`` can then take out of the step.

    late: the step's nodes that do change. memory: bytes that the values may take; those go first that save most
    operations a byte.
    """
    found, around = region_calls(step, region), mode_texts(step.graph)
    if any(around[call] != around[next(iter(step.graph.nodes))] for call in found):
        return []  # ``hoist`` would leave them in the step
    return _move(step, region, found, lambda variety: True, late, memory=memory)


def _move(module: GraphModule, region: str, found: list[Node], few_enough: Callable[[int], bool], late: Set[Node],
          first: Node | None = None, memory: float = math.inf) -> list[Moved]:
    sub = getattr(module, region)
    operands = {p: 2 + i for i, p in enumerate(placeholders(sub.graph))}
    changing, inner, outer = written(sub.graph) | _changing_operands(module, found, operands), modes(sub.graph), mode_texts(module.graph)
    reads = {p: frozenset((p,)) for p, i in operands.items() if not any(isinstance(c.args[i], Node) and c.args[i] in late for c in found)}
    for node in sub.graph.nodes:
        if stays(node, changing) and not inner[node] and all(x in reads for x in node.all_input_nodes):
            reads[node] = frozenset().union(*(reads[x] for x in node.all_input_nodes))
    key = lambda node, call: (outer[call], *(call.args[i] for p, i in operands.items() if p in reads[node]))
    variety = {n: len({key(n, c) for c in found}) for n in reads}
    few = {n for n in reads if n not in operands and isinstance(value(n), torch.Tensor) and few_enough(variety[n])}
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    moved: dict[Node, Moved] = {}
    operations: dict[Node, int] = {}
    for node in [n for n in sub.graph.nodes if n in few and any(u not in few for u in n.users)]:
        while node in few and name_of(node) in MOVES and node.all_input_nodes:
            node = node.all_input_nodes[0]  # a view, cast or repetition is made again inside, of what is stored
        if node not in few or name_of(node) in MOVES | FILLS or node in moved:
            continue
        if first is not None and any(order[_place(module.graph, key(node, c)[1:], c, outer)] > order[first] for c in found):
            continue
        flops = sum(cost_of(n)[0] for n in _chain(node, few))
        size = nbytes(value(node))
        if size * variety[node] <= SMALL or flops >= INTENSITY * size:
            saved = len(found) - variety[node]
            moved[node], operations[node] = Moved(node.name, saved, flops * saved, size * variety[node]), flops
    moved = _within(moved, memory, operations)
    keys = {node: [key(node, c) for c in found] for node in moved}
    for node in moved:
        shared: dict[tuple, Node] = {}
        for k, call in zip(keys[node], found):
            if k not in shared:
                read = set(ancestors([node]))
                needed = [call.args[2 + i] for i, p in enumerate(placeholders(sub.graph)) if p in read]
                shared[k] = outside(module.graph, sub, node, call, {}, _place(module.graph, needed, call, outer))
                outer |= {n: outer[call] for n in module.graph.nodes if n not in outer}
        (inside,) = hand_in(sub, found, [[shared[k]] for k in keys[node]], node.name)
        node.replace_all_uses_with(inside)
    if moved:
        drop_dead(sub)
        drop_unused(module, sub, region)
    return list(moved.values())


def _within(moved: dict[Node, Moved], memory: float, operations: Mapping[Node, int]) -> dict[Node, Moved]:
    """Those that save most operations a byte, as many as fit."""
    kept = {}
    for node in sorted(moved, key=lambda n: -operations[n] / max(moved[n].bytes, 1)):
        if moved[node].bytes <= memory:
            memory -= moved[node].bytes
            kept[node] = moved[node]
    return {n: kept[n] for n in moved if n in kept}


def _place(graph: Graph, operands: Sequence, call: Node, around: Mapping[Node, str]) -> Node:
    """The node before which something of these operands is computed: as early as it can be, but under the call's autocast.

    In the midst of a loop's calls, it would stand in one of them and not in the others.
    """
    missing = {x for x in operands if isinstance(x, Node)}
    for node in graph.nodes:
        if not missing and node.op not in ("placeholder", "get_attr") and around[node] == around[call]:
            return node
        missing.discard(node)
    return call


def _changing_operands(module: GraphModule, found: list[Node], operands: dict[Node, int]) -> set[Node]:
    """Placeholders of a region that stand for something which the outer graph writes into."""
    changing = written(module.graph)
    return {p for p, i in operands.items() if any(isinstance(c.args[i], Node) and target(c.args[i]) in changing for c in found)}


def _chain(node: Node, within: set[Node]) -> set[Node]:
    """A node and everything that it depends on, within a set."""
    found, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n in within and n not in found:
            found.add(n)
            todo.extend(n.all_input_nodes)
    return found

"""Blocks that follow one another in a flat graph, N equal ones: found by structure, whatever module or code they came from.

Each operator is a letter: its name, its constants, the layout of its result, the autocast it stands under. Equal blocks are a word
that is repeated, at a distance that most of its letters have to their next occurrence::

    embed  norm linear silu linear add  norm linear silu linear add  ...  head        word of 5 letters, N times
           `--------- block 0 --------'

Where the word begins is free; it is cut where the fewest values are alive, which is between two blocks' residual streams.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from .effects import ALIASES, is_pure, mode_texts, switches_mode, target
from .graph import REGION, name_of, value
from .loop_body import Body, Nodes, leaves

CUTS = 16  # places to begin that are tried, best first


def find_repeats(graph: Graph, times: int, nodes: int) -> Body | None:
    """The repeated part of a graph that leaves the fewest operators when it is written once: of at least so many ``nodes``, at least
    so many ``times``; None if there is none. It has no effects, and each of its outputs is a tensor of its own."""
    modes = mode_texts(graph)
    given = _given(graph, times, nodes)
    order = [n for n in graph.nodes if n.op.startswith("call") and not switches_mode(n) and n not in given]
    letters = [_letter(n, modes[n]) for n in order]
    for size, first, last in _runs(letters, times, nodes):
        for start in _cuts(order, size, first, last):
            blocks = [order[i : i + size] for i in range(start, last - size + 1, size)]
            body = _body(_alike(blocks), size)
            if body is not None and body.calls >= times:
                return body
    return None


def _given(graph: Graph, times: int, nodes: int) -> set[Node]:
    """Inputs, and what is a part of one or of a value that far-apart places take parts of, such as a block's own weight of a stack,
    by its number: what a block is handed, and no part of it."""
    place, found = {n: i for i, n in enumerate(graph.nodes)}, set()
    for node in graph.nodes:
        is_view = node.op.startswith("call") and name_of(node) in ALIASES and is_pure(node)
        if not node.op.startswith("call") or is_view and all(o in found for o in node.all_input_nodes):
            found.add(node)
        parts = sorted(place[u] for u in node.users if name_of(u) in ALIASES and is_pure(u) and u.all_input_nodes == [node])
        if len(parts) >= times and sum(b - a >= nodes for a, b in zip(parts, parts[1:])) >= times - 1:
            found |= {u for u in node.users if place[u] in parts}
    return found


def _letter(node: Node, mode: str) -> object:
    """Equal for operators that do the same. What has an effect, or is no plain operator, is like no other."""
    if not is_pure(node) or node.target is REGION:
        return node
    shown = map_aggregate((node.args, node.kwargs), lambda leaf: "node" if isinstance(leaf, Node) else repr(leaf))
    return node.op, name_of(node), repr(shown), _layout(value(node)), mode


def _layout(of) -> str:
    if isinstance(of, (tuple, list)):
        return str([_layout(x) for x in of])
    if not isinstance(of, torch.Tensor):
        return type(of).__name__
    start = of.storage_offset()  # Inductor's kernels may read what is aligned in words of 16 bytes
    return str((of.shape, of.stride(), of.dtype, of.device, isinstance(start, int) and start * of.itemsize % 16))


def _runs(letters: list, times: int, nodes: int) -> list[tuple[int, int, int]]:
    """(length of the word, begin, end) of stretches in which every letter is again there one word later; most saved first."""
    places: dict[object, list[int]] = {}
    for i, letter in enumerate(letters):
        places.setdefault(letter, []).append(i)
    distances = Counter(b - a for at in places.values() if len(at) >= times for a, b in zip(at, at[1:]))
    found = []
    for size in [d for d, _ in distances.most_common(CUTS) if d >= nodes]:
        begin = None
        for i in range(len(letters) - size + 1):
            same = i < len(letters) - size and letters[i] == letters[i + size]
            if same and begin is None:
                begin = i
            elif not same and begin is not None:
                if i - begin >= (times - 1) * size:
                    found.append((size, begin, i + size))
                begin = None
    return sorted(found, key=lambda run: (run[2] - run[1]) // run[0] * -run[0] + run[0])


def _cuts(order: list[Node], size: int, first: int, last: int) -> list[int]:
    """Where to begin the first word, best first: few values alive there, then as many words as there are."""
    at = {n: i for i, n in enumerate(order)}
    middle = first + (last - first) // size // 2 * size
    window = range(max(first, middle - 2 * size), min(last, middle + 3 * size))
    ends = {i: max((at.get(u, len(order)) for u in order[i].users), default=i) for i in window}
    alive = lambda cut: sum(i < cut <= end for i, end in ends.items())
    costs = {first + offset: alive(middle + offset) for offset in range(size)}
    return sorted(costs, key=lambda start: (costs[start], -((last - start) // size), start))[:CUTS]


def _alike(blocks: list[list[Node]]) -> list[list[Node]]:
    """The blocks next to the middle one that read alike: in themselves the same places, from elsewhere the same layouts."""
    def reads(block: list[Node]) -> list:
        place = {n: i for i, n in enumerate(block)}
        return [place[x] if x in place else _layout(value(x)) for n in block for x in leaves(n) if isinstance(x, Node)]

    wanted = reads(blocks[len(blocks) // 2])
    same = [reads(block) == wanted for block in blocks]
    begin = end = len(blocks) // 2
    while begin > 0 and same[begin - 1]:
        begin -= 1
    while end < len(blocks) and same[end]:
        end += 1
    return blocks[begin:end]


def _body(blocks: list[list[Node]], size: int) -> Body | None:
    """The blocks as calls of one body; None if an output would be no tensor, or share memory with another value."""
    own = [set(block) for block in blocks]
    nodes: list[Nodes] = list(zip(*blocks))
    outputs = [n for n in nodes if any(user not in mine for node, mine in zip(n, own) for user in node.users)]
    held = [target(n[1]) for n in outputs]
    if len(set(held)) < len(held) or not all(h in own[1] for h in held) or not all(isinstance(value(n[0]), torch.Tensor) for n in outputs):
        return None
    shared: dict[Node, None] = {}
    varying: dict[Nodes, None] = {}
    for place in nodes:
        for operands in zip(*([x for x in leaves(n) if isinstance(x, Node)] for n in place)):
            if operands[0] in own[0]:
                continue
            one = len(set(operands)) == 1 or all(o.op == "get_attr" and o.target == operands[0].target for o in operands)
            if one:
                shared[operands[0]] = None
            else:
                varying[operands] = None
    return Body(nodes, outputs, list(shared), list(varying), []) if outputs else None

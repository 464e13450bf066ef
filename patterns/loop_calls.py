"""Where a model is called again and again: runs of equal pieces among the operators that read weights.

The anchors of a graph (linear layers, convolutions, attention, products with a parameter, nested regions), in order::

    embed | patch q k v out mlp final | patch q k v out mlp final | patch q k v out mlp final | decode
            '------- piece 0 -------'   '------- piece 1 -------'   '------- piece 2 -------'

Each anchor has a label, equal for corresponding anchors of two calls: what it does, with which weight, in which shape.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import numpy as np
from torch.fx import GraphModule, Node

from .graph import (CONV, LINEAR, MATMUL, REGION, SDPA, calls, is_parameter, name_of, placeholders, shape, subgraphs,
                    through_shapes)

MOST = 16  # runs that are looked at: beyond, a graph repeats itself in too many ways to be a sampling loop


def find_runs(module: GraphModule) -> Iterator[tuple[list[list[Node]], list[Node]]]:
    """Lists of two and more equal pieces of a graph's anchors, the run that covers most anchors first; each with the piece like
    them that stands before it and was left out, if any.

    The last run is given with its phase from either end, and again without its first and its last piece: what stands
    before a loop (an encoding of the context by the same model) may look like one call more.
    """
    weights = {name: region_weights(sub) for name, sub in subgraphs(module).items()}
    labelled = [(n, label) for n in module.graph.nodes if (label := _label(n, weights)) is not None]
    anchors, seen = [n for n, _ in labelled], set()
    for start, period, count in _periodic([label for _, label in labelled])[:MOST]:
        for first, pieces in ((start, count), (start + period, count - 1), (start, count - 1)):
            if pieces >= 2 and (first, period, pieces) not in seen:
                seen.add((first, period, pieces))
                yield [anchors[first + i * period:first + (i + 1) * period] for i in range(pieces)], anchors[start:first]


def region_weights(sub: GraphModule) -> list[int]:
    """Positions of a region's placeholders that are read as weights."""
    weights = set()
    for node in sub.graph.nodes:
        if (weight := weight_of(node)) is not None:
            weights.add(weight)
        elif node.target is REGION:
            inner = region_weights(getattr(sub, node.args[0].target))
            weights |= {through_shapes(node.args[2 + i]) for i in inner if isinstance(node.args[2 + i], Node)}
    return [i for i, p in enumerate(placeholders(sub.graph)) if p in weights]


def weight_of(node: Node) -> Node | None:
    """The weight that an operator reads, or None if it reads none."""
    if calls(node, LINEAR | CONV):
        return through_shapes(node.args[1])
    if calls(node, MATMUL) or node.target is operator.matmul or name_of(node) == "einsum":
        operands = [through_shapes(a) for a in node.all_input_nodes]
        return next((o for o in operands if o.op == "get_attr" or is_parameter(o)), None)
    return None


def _label(node: Node, weights: dict[str, list[int]]) -> tuple | None:
    """What an anchor is, up to its position in the loop; None for all other nodes."""
    if (weight := weight_of(node)) is not None:
        return name_of(node), weight.target if weight.op == "get_attr" else weight.name, str(shape(node))
    if calls(node, SDPA):
        return "attention", str(shape(node.args[0])), str(shape(node.args[1]))
    if node.target is REGION:
        operands = node.args[2:]
        names = tuple(through_shapes(operands[i]).name for i in weights[node.args[0].target])
        return ("region", names, len(operands))
    return None


def _periodic(labels: list[tuple]) -> list[tuple[int, int, int]]:
    """(start, period, count) of runs of count >= 2 equal pieces, by anchors covered, then by number of pieces."""
    names: dict[tuple, int] = {}
    ids = np.array([names.setdefault(label, len(names)) for label in labels], dtype=np.int64)
    found = []
    for period in range(1, len(ids) // 2 + 1):
        same = np.concatenate(([0], ids[:-period] == ids[period:], [0])).astype(np.int8)
        edges = np.flatnonzero(np.diff(same))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist()):
            count, rest = divmod(end - begin, period)
            if count:
                found += [(begin + shift, period, count + 1) for shift in {rest, 0}]
    # From the end first: what stands before the loop is more often like it than what stands behind.
    return sorted(found, key=lambda run: (-run[1] * run[2], run[1], -run[0]))

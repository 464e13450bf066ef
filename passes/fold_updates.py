"""Folded updates: a chain of a scheduler's updates becomes the one linear combination that it computes.

Before (what cached steps leave)::             After::

    x1 = x0 + v0 * d0                              x3 = x0 + v0 * (d0 + d1 + d2)
    x2 = x1 + v0 * d1
    x3 = x2 + v0 * d2

Exact but for rounding. Only tensors that something else than the scheduler reads are written; what nothing reads any
more is left to be removed.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from li_compile.patterns.graph import ancestors, descendants, value
from li_compile.patterns.linear import Blocks, Linear
from li_compile.patterns.linear_read import Reader

from .combine import emit, operations
from .record import Record


def fold_updates(module: GraphModule, outputs: list[Node]) -> Record:
    """Fold, in place, whatever is computed from a sampling loop's ``outputs`` by sums and multiples. Counts combinations."""
    record, taken = Record("fold_updates"), set(outputs)
    later = descendants(outputs)
    reader = Reader(taken, later)
    for node in list(module.graph.nodes):
        if node not in later or not reader.understands(node) or all(reader.understands(u) for u in node.users):
            continue
        x = reader.read(node)
        if not isinstance(x, Linear | Blocks):
            continue
        leaves = x.nodes()
        chain = {n for n in ancestors([node], lambda n: n in leaves) if n in later and n not in leaves}
        if operations(x) >= len(chain):
            continue
        try:
            with module.graph.inserting_before(node):
                new = emit(module.graph, x, reader.symbols, value(node).dtype)
        except ValueError:
            continue
        new.meta["example_value"] = value(node)
        node.replace_all_uses_with(new)
        reader.atoms.add(new)  # what follows is read from here
        record.count += 1
    if record.count:
        record.details.append(f"{record.count} chains of updates, each one combination now")
    return record

"""Equal rows once, exact: what is computed row by row of a value that is repeated over tokens is computed before.

Before::                                                After::

    t = vec[:, :, None].expand(1, 4, 12, 128)               s = silu(vec)                     # 4 rows instead of 48
          .reshape(1, 48, 128)                              m = linear(s, w, b)
    s = silu(t)                                             a, b = m.chunk(2, -1)
    m = linear(s, w, b)                                     a2 = a.repeat_interleave(12, dim=1)
    a, b = m.chunk(2, -1)                                   x2 = x * (1 + a2)
    x2 = x * (1 + a)

The repetition, however it is spelt, moves behind every operator that is row-wise (passes/rows.py) to where its values meet
those of single tokens; tensors of zeros or ones that only such values are written into shrink with them. Tokens that take
one of a few values in runs (context at time 0, new tokens at time t) are repeated in runs. A repetition that enters a
nested region moves into it first.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.fx import Graph, GraphModule, Node

from li_compile.patterns.effects import target, written
from li_compile.patterns.graph import REGION, argument, cat_operands, name_of, placeholders, region_calls, shape, subgraphs, value

from .cost import cost_of
from .record import Record
from .regions import drop_dead
from .rows import resizable, resized, row_dim, same

CONSTANT = {"zeros", "ones", "full"}
MOST = 8  # runs of different lengths; more are no longer a few values


@dataclasses.dataclass(frozen=True)
class Repeat:
    """source's rows along dim, each so many times in a row: one number for all, or one a row. Sizes may be symbols."""

    source: Node
    dim: int
    times: int | tuple[int, ...]

    @property
    def rows(self):
        return shape(self.source)[self.dim]

    @property
    def kind(self) -> tuple[str, str]:
        """Equal for repetitions that give values which can be computed together."""
        return str(self.rows), str(self.times)


def equal_rows(module: GraphModule) -> Record:
    """Move repetitions behind row-wise operators, in place. Counts the products that run on fewer rows."""
    record = Record("equal_rows")
    _lift_all(module.graph, record, 1)  # first, so that regions are handed repetitions and not views of them
    for region, sub in subgraphs(module).items():
        _into_region(module, region, sub)
        _lift_all(sub.graph, record, len(region_calls(module, region)))
    drop_dead(module)
    return record


def _lift_all(graph: Graph, record: Record, uses: int) -> None:
    changing = written(graph)  # what is written in place is not the value that was computed
    found = [(n, r) for n in graph.nodes if (r := read_repeat(n)) is not None and target(n) not in changing and target(r.source) not in changing]
    for kind in dict.fromkeys(r.kind for _, r in found):
        _lift(graph, {n: r for n, r in found if r.kind == kind}, changing, record, uses)
    drop_dead(graph.owning_module)


def read_repeat(node: Node) -> Repeat | None:
    """A repetition of rows under any of its spellings, or None: repeat_interleave, a reshape of an expansion, a
    concatenation of expansions of one row each or of repetitions."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = name_of(node)
    if name == "repeat_interleave":
        times, dim, x = argument(node, 1, "repeats"), argument(node, 2, "dim"), node.args[0]
        if not isinstance(times, int) or times < 2 or dim is None or not _sized(x):
            return None
        return Repeat(x, dim % len(shape(x)), times)
    if name in ("reshape", "view", "flatten"):
        return _expanded(node)
    if cat_operands(node) is not None:
        return _runs(node) or _joined(node)
    return None


def _joined(node: Node) -> Repeat | None:
    """cat([a.repeat_interleave(n, d), b.repeat_interleave(n, d)], d): the rows of both, each as often."""
    operands, dim = cat_operands(node)
    read = [read_repeat(x) if isinstance(x, Node) and name_of(x) == "repeat_interleave" else None for x in operands]
    if len(read) < 2 or any(r is None or r.dim != dim or r.times != read[0].times for r in read):
        return None
    with node.graph.inserting_before(node):
        source = node.graph.call_function(torch.cat, ([r.source for r in read], dim))
    source.meta["example_value"] = torch.cat([value(r.source) for r in read], dim)
    return Repeat(source, dim, read[0].times)


def _sized(node) -> bool:
    return isinstance(node, Node) and shape(node) is not None


def _static(node) -> bool:
    return _sized(node) and all(isinstance(s, int) for s in shape(node))


def _expanded(node: Node) -> Repeat | None:
    """x[..., :, None, ...].expand(...).reshape(...): each row of x so many times."""
    wide = node.args[0]
    if not isinstance(wide, Node) or name_of(wide) != "expand" or not _sized(wide) or not _sized(node):
        return None
    x, added = wide.args[0], []
    while isinstance(x, Node) and name_of(x) == "unsqueeze" and _sized(x):
        at = argument(x, 1, "dim")
        added.append((at + len(shape(x))) % len(shape(x)) if at < 0 else at)
        x = x.args[0]
    if not added or not _sized(x):
        return None
    # Positions of x's own dimensions in the expansion; the others were added, with a size of 1 before it.
    own = list(range(len(shape(x))))
    for at in reversed(added):
        own = [d + (d >= at) for d in own]
    if len(own) + len(added) != len(shape(wide)) or not all(same(shape(wide)[o], s) for o, s in zip(own, shape(x))):
        return None
    new = [d for d in range(len(shape(wide))) if d not in own]
    before = {sum(o < d for o in own) for d in new}
    times = math.prod(shape(wide)[d] for d in new)
    if len(before) != 1 or 0 in before or not isinstance(times, int) or times < 2:
        return None
    dim = before.pop() - 1
    want = [s * times if d == dim else s for d, s in enumerate(shape(x))]
    if len(want) != len(shape(node)) or not all(map(same, want, shape(node))):
        return None
    return Repeat(x, dim, times)


def _runs(node: Node) -> Repeat | None:
    """cat([a.expand(n), b.expand(m)]) along a dimension of which a and b have one row each."""
    operands, dim = cat_operands(node)
    if not 2 <= len(operands) <= MOST or not all(_static(x) for x in operands):
        return None
    pieces = []
    for x in operands:
        if name_of(x) != "expand" or not _static(x.args[0]) or len(shape(x.args[0])) != len(shape(x)):
            return None
        small = x.args[0]
        if shape(small)[dim] != 1 or any(a != b for i, (a, b) in enumerate(zip(shape(small), shape(x))) if i != dim):
            return None
        pieces.append(small)
    times = tuple(shape(x)[dim] for x in operands)
    if max(times) < 2:
        return None
    with node.graph.inserting_before(node):
        source = node.graph.call_function(torch.cat, (pieces, dim))
    source.meta["example_value"] = torch.cat([value(p) for p in pieces], dim)
    return Repeat(source, dim, times)


def _repeated(graph: Graph, x: Node, dim: int, times: int | tuple[int, ...], after: Node) -> Node:
    """x with its rows repeated, as new nodes after a node."""

    def add(kind, *args, **kwargs):
        nonlocal after
        with graph.inserting_after(after):
            after = getattr(graph, kind)(*args, **kwargs)
        return after

    if isinstance(times, int):
        return add("call_function", torch.repeat_interleave, (x, times), {"dim": dim})
    runs = []
    for i, n in enumerate(times):
        row = add("call_function", torch.narrow, (x, dim, i, 1))
        runs.append(add("call_method", "expand", (row, [n if d == dim else -1 for d in range(len(shape(x)))])))
    return add("call_function", torch.cat, (runs, dim))


def _lift(graph: Graph, repeats: dict[Node, Repeat], changing: set[Node], record: Record, uses: int) -> None:
    """Move repetitions, each row of all of them as often as its fellows, behind what is row-wise."""
    one, some = next(iter(repeats.items()))
    times, number, tokens = some.times, some.rows, shape(one)[some.dim]
    known = isinstance(number, int)
    rows = {node: r.dim for node, r in repeats.items()}  # nodes whose rows along a dimension are equal in runs
    for node in list(graph.nodes):
        if node not in rows and target(node) not in changing and any(x in rows for x in node.all_input_nodes):
            _take_constant(graph, node, rows, tokens)
            if (dim := row_dim(node, rows)) is not None and (known or resizable(node, dim)):
                rows[node] = dim
    lifted = [n for n in graph.nodes if n in rows and n not in repeats]
    if all(name_of(n) in MERE and not any(u.target is REGION for u in n.users) for n in lifted):
        return  # a repetition moved behind views helps nobody
    work = [n for n in lifted if cost_of(n)[0]]
    ends = [(n, [u for u in n.users if u not in rows]) for n in lifted if isinstance(value(n), torch.Tensor)]
    for node, r in repeats.items():
        for user in [u for u in node.users if u in rows]:
            user.replace_input_with(node, r.source)
    left = None
    for node in lifted:
        if name_of(node) in CONSTANT and not known:  # of as many rows as there are, which only the graph knows
            if left is None:
                with graph.inserting_after(some.source):
                    left = graph.call_method("size", (some.source, some.dim))
                left.meta["example_value"] = number
            resized(node, rows[node], left)
        else:
            resized(node, rows[node], number if known else None)
    for node, users in ends:
        if users:
            new = _repeated(graph, node, rows[node], times, node)
            new.meta["example_value"] = value(node)
            for user in users:
                user.replace_input_with(node, new)
    for node in lifted:
        fewer = lambda v, dim=rows[node]: v.new_empty([number if d == dim else s for d, s in enumerate(v.shape)])
        old = value(node)
        node.meta["example_value"] = fewer(old) if isinstance(old, torch.Tensor) else tuple(map(fewer, old))
    for node in work:
        record.count += uses
        record.details.append(f"{node.name}: {number} rows for {tokens}, {uses} calls")


def _take_constant(graph: Graph, node: Node, rows: dict[Node, int], tokens: int) -> None:
    """Where a value with few rows is written into a tensor of one number, or a part of one, a tensor of that number for those rows."""
    if name_of(node) in ("select_scatter", "slice_scatter") and node.args[1] in rows and node.args[0] not in rows:
        if (own := _constant(graph, node.args[0], node, rows, tokens)) is not None:
            node.replace_input_with(node.args[0], own)


def _constant(graph: Graph, x: Node, before: Node, rows: dict[Node, int], tokens: int) -> Node | None:
    """A copy of a constant with rows to shrink, as others may use it as it is; None if it is no constant."""
    if x.op != "call_function" or not _sized(x):
        return None
    if name_of(x) in CONSTANT:
        dims = [i for i, s in enumerate(shape(x)) if same(s, tokens)]
        packed = isinstance(x.args[0], (tuple, list, Node))  # a node: another tensor's size
        if len(dims) != 1 or not packed or any(not isinstance(s, int) for i, s in enumerate(shape(x)) if i != dims[0]):
            return None
        inner, dim = None, dims[0]
    elif name_of(x) in ("narrow", "select"):
        inner = _constant(graph, x.args[0], before, rows, tokens)
        if inner is None or (dim := row_dim(x, {x.args[0]: rows[inner]})) is None:
            return None
    else:
        return None
    with graph.inserting_before(before):
        own = graph.node_copy(x, lambda n: inner)
    own.meta["example_value"] = value(x)
    rows[own] = dim
    return own


MERE = {"reshape", "view", "flatten", "unsqueeze", "expand", "transpose", "permute", "getitem", "select", "narrow", "chunk", "split", "unbind",
        "to", "type_as", "float", "contiguous", "repeat_interleave"}  # fmt: skip


def _into_region(module: GraphModule, region: str, sub: GraphModule) -> None:
    """Hand the unrepeated value to a region where all of its calls hand it the same repetition."""
    found = region_calls(module, region)
    for i, inner in enumerate(placeholders(sub.graph)):
        repeats = [read_repeat(c.args[2 + i]) if isinstance(c.args[2 + i], Node) else None for c in found]
        if not repeats or any(r is None or (r.dim, r.kind) != (repeats[0].dim, repeats[0].kind) for r in repeats):
            continue
        users = list(inner.users)
        inner.meta["example_value"], whole = value(repeats[0].source), value(inner)
        new = _repeated(sub.graph, inner, repeats[0].dim, repeats[0].times, placeholders(sub.graph)[-1])
        new.meta["example_value"] = whole
        for user in users:
            user.replace_input_with(inner, new)
        for call, r in zip(found, repeats):
            call.args = tuple(r.source if j == 2 + i else a for j, a in enumerate(call.args))

"""Equal rows once, exact: a row-wise chain on a value that is repeated over tokens runs before the repetition.

Before::                                             After::

    t = vec.repeat_interleave(192, dim=1)                s = silu(vec)
    s = silu(t)            # [1, 768, 128]               m = linear(s, w, b)    # 4 rows instead of 768
    m = linear(s, w, b)    # [1, 768, 1536]              a, b = m.chunk(2, -1)
    a, b = m.chunk(2, -1)                                a2 = a.repeat_interleave(192, dim=1); ...

Where the repeated value enters a nested region, the repetition is moved into the region first.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from li_compile.patterns.graph import (LINEAR, argument, calls, name_of, placeholders, region_calls, shape, subgraphs)

from .record import Record

POINTWISE = {"silu", "gelu", "relu", "sigmoid", "tanh", "exp", "neg", "float", "half", "bfloat16", "to", "type_as",
             "softplus", "contiguous"}
SCALAR = {"mul", "add", "sub", "truediv", "div"}


def equal_rows(module: GraphModule) -> Record:
    """Move repetitions behind row-wise operators, in place. Counts the Linear layers that run on fewer rows."""
    record = Record("equal_rows")
    for region, sub in subgraphs(module).items():
        _into_region(module, region, sub)
    for region, graph_module in {"": module, **subgraphs(module)}.items():
        uses = len(region_calls(module, region)) if region else 1
        todo = [n for n in graph_module.graph.nodes if _repeat(n)]
        while todo:
            node = todo.pop()
            todo += _sink(graph_module.graph, node, record, uses)
    return record


def _repeat(node: Node) -> tuple[Node, int, int] | None:
    """x, times, dim of a repetition of each row of x along dim, or None."""
    if node.op not in ("call_function", "call_method") or name_of(node) != "repeat_interleave":
        return None
    times, dim, rank = argument(node, 1, "repeats"), argument(node, 2, "dim"), len(shape(node) or ())
    if not isinstance(times, int) or times < 2 or dim is None or not rank:
        return None
    return node.args[0], times, dim % rank


def _new_repeat(graph: Graph, x: Node, times: int, dim: int, like: Node) -> Node:
    with graph.inserting_after(x):
        node = graph.call_function(torch.repeat_interleave, (x, times), {"dim": dim})
    node.meta = dict(like.meta)
    return node


def _row_wise(node: Node, source: Node, dim: int) -> bool:
    """Whether a user of a value computes each of its rows along dim by itself (and keeps dim where it is)."""
    name = name_of(node)
    if node.op not in ("call_function", "call_method") or not node.args or node.args[0] is not source or \
            sum(a is source for a in node.all_input_nodes) != 1:
        return name in SCALAR and len(node.args) == 2 and isinstance(node.args[0], (int, float)) and node.args[1] is source
    last = len(shape(source)) - 1
    if name in POINTWISE:
        return len(node.all_input_nodes) == 1
    if name in SCALAR:
        return isinstance(node.args[1], (int, float))
    if calls(node, LINEAR):
        return dim != last
    if name in ("chunk", "split"):
        return argument(node, 2, "dim", default=0) % (last + 1) != dim and all(
            u.target is operator.getitem for u in node.users)
    return False


def _sink(graph: Graph, node: Node, record: Record, uses: int) -> list[Node]:
    """Move one repetition behind its row-wise users; returns the new repetitions."""
    x, times, dim = _repeat(node)
    made = []
    for user in list(node.users):
        if not _row_wise(user, node, dim):
            continue
        if calls(user, LINEAR):
            record.count += uses
            record.details.append(f"{user.name}: rows / {times}, {uses} calls")
        rank_shape = shape(node)
        user.replace_input_with(node, x)
        values = list(user.users) if name_of(user) in ("chunk", "split") else [user]
        for v in values:
            v.meta.pop("val", None)
            later = list(v.users)
            new = _new_repeat(graph, v, times, dim, v)
            new.meta["example_value"] = v.meta.get("example_value")
            for u in later:
                u.replace_input_with(v, new)
            if (s := v.meta.get("example_value")) is not None and isinstance(s, torch.Tensor):
                v.meta["example_value"] = s.narrow(dim, 0, s.shape[dim] // times) if rank_shape else s
            made.append(new)
    if not node.users:
        graph.erase_node(node)
    return made


def _into_region(module: GraphModule, region: str, sub: GraphModule) -> None:
    """Hand the unrepeated value to a region where all of its calls hand it the same repetition."""
    found = region_calls(module, region)
    for i, inner in enumerate(placeholders(sub.graph)):
        repeats = [_repeat(c.args[2 + i]) if isinstance(c.args[2 + i], Node) else None for c in found]
        if not repeats or any(r is None or r[1:] != repeats[0][1:] for r in repeats):
            continue
        _, times, dim = repeats[0]
        example = inner.meta.get("example_value")
        new = _new_repeat(sub.graph, inner, times, dim, inner)
        for user in list(inner.users):
            if user is not new:
                user.replace_input_with(inner, new)
        if isinstance(example, torch.Tensor):
            inner.meta["example_value"] = example.narrow(dim, 0, example.shape[dim] // times)
        for call, (x, _, _) in zip(found, repeats):
            args = list(call.args)
            args[2 + i] = x
            call.args = tuple(args)

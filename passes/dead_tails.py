"""Dead tails, exact: a call of a region computes only what is read of it.

Before::                                              After::

    x1, k1, v1 = invoke_subgraph(block, x0)               x1, k1, v1 = invoke_subgraph(block, x0)
    x2, k2, v2 = invoke_subgraph(block, x1)               k2, v2 = invoke_subgraph(block_tail, x1)
    return k1, v1, k2, v2                                 return k1, v1, k2, v2

The context encoding of an autoregressive model keeps each block's keys and values, and the last block's attention and MLP
lead nowhere. In a flat graph that is dead code like any other; a region hides it.
"""

from __future__ import annotations

import copy
import operator

from torch.fx import GraphModule, Node

from li_compile.patterns.graph import region_calls, subgraphs

from .cost import cost
from .record import Record
from .regions import drop_dead, drop_unused, retarget


def dead_tails(module: GraphModule) -> Record:
    """Give calls whose outputs are not all read a region without the rest, in place. Counts those calls."""
    record = Record("dead_tails")
    for region, sub in list(subgraphs(module).items()):
        by_use: dict[tuple[int, ...], list[Node]] = {}
        for call in region_calls(module, region):
            if (read := _read(call)) is not None:
                by_use.setdefault(read, []).append(call)
        output = sub.graph.output_node()
        for read, calls in by_use.items():
            if len(read) == len(output.args[0]):
                continue
            part = _part(sub, read)
            saved = cost(sub)[0] - cost(part)[0]
            if not saved:
                continue  # what is left out is moved or added at most, and a region more costs compile time
            name = f"{region}_tail_{'_'.join(map(str, read))}"
            module.add_submodule(name, part)
            for call in calls:
                _only(module, call, name, read)
            drop_unused(module, part, name)
            record.count += len(calls)
            record.details.append(f"{len(calls)} x outputs {', '.join(map(str, read))} of {len(output.args[0])}, {saved / 1e9:.2f} GFLOP less each")
    return record


def _read(call: Node) -> tuple[int, ...] | None:
    """Numbers of the outputs that are read; None if it cannot be told, or if there are none."""
    if not call.users or any(u.target is not operator.getitem or not isinstance(u.args[1], int) for u in call.users):
        return None
    return tuple(sorted({u.args[1] for u in call.users if u.users})) or None


def _part(sub: GraphModule, read: tuple[int, ...]) -> GraphModule:
    part = copy.deepcopy(sub)
    output = part.graph.output_node()
    output.args = (tuple(output.args[0][i] for i in read),)
    drop_dead(part)
    return part


def _only(module: GraphModule, call: Node, name: str, read: tuple[int, ...]) -> None:
    retarget(module, call, name)
    for user in list(call.users):
        if user.args[1] in read:
            user.args = (call, read.index(user.args[1]))
        else:
            module.graph.erase_node(user)
    call.meta.pop("example_value", None)

"""Cached steps, approximate: the model is not called at some of the steps, and earlier outputs stand in for its output.

Before::                                   After (hold, all steps between the first and the last skipped)::

    v0 = model(x0, 1000); x1 = x0 + v0*d0      v0 = model(x0, 1000); x1 = x0 + v0*d0
    v1 = model(x1, 900);  x2 = x1 + v1*d1                            x2 = x1 + v0*d1
    v2 = model(x2, 750);  x3 = x2 + v2*d2                            x3 = x2 + v0*d2
    v3 = model(x3, 500);  x4 = x3 + v3*d3      v3 = model(x3, 500);  x4 = x3 + v3*d3

Paper eq. 5-8. The last step is always computed; below three steps there is nothing to skip. With guidance, where the
model is called twice a step, each output is predicted from its own earlier ones. When to run this variant is decided
once a chunk, outside the graph; ``fold_updates`` then makes one update of those that are left in a row.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from li_compile.patterns import DenoisingLoop, Miss
from li_compile.patterns.graph import REGION, value
from li_compile.patterns.linear import Linear
from li_compile.patterns.loop_body import Body

from .combine import emit
from .predictors import NOW, Skipping
from .record import Record, Refused


def cached_steps(module: GraphModule, loop: DenoisingLoop, skipping: Skipping) -> Record:
    """Rewrite the loop in place. Counts the steps that are no longer computed; raises Refused if there is none to skip."""
    record = Record("cached_steps")
    if not skipping.skip:
        raise Refused(Miss("cached steps", loop.calls[0][0].name, too_few(loop.steps, 3)))
    if isinstance(loop.body, Body) and loop.body.writes and not all(n.target is REGION for c in loop.calls for n in c):
        raise Refused(Miss("cached steps", loop.calls[0][0].name, "the model writes into its inputs, and its calls could not "
                           "become regions (share_steps says why)"))
    predictor = Predictions(module, loop, skipping)
    for step in skipping.skip:
        for j, node in enumerate(loop.outputs[step]):
            node.replace_all_uses_with(predictor.output(step, j))
        _drop(module, loop.calls[step])
        record.count += 1
    how = skipping.predictor.name
    record.details.append(f"{loop.steps} steps, {len(skipping.computed)} computed ({loop.form}, {how})")
    if how != "hold" and loop.updates.times is None:
        record.misses.append(Miss("cached steps", loop.calls[0][0].name, "the times of the steps were not found; they "
                                  "count as evenly spaced"))
    return record


def _drop(module: GraphModule, calls: list[Node]) -> None:
    """Erase the calls of regions that nothing reads any more: they may write, and would be kept for that."""
    for call in calls:
        if call.target is REGION and not any(u.users for u in call.users):
            for user in list(call.users):
                module.graph.erase_node(user)
            module.graph.erase_node(call)


def too_few(steps: int, least: int) -> str:
    """Why a loop has no step to skip."""
    return f"{steps} denoising steps, reuse needs at least {least}: the first and the last are always computed"


class Predictions:
    """Writes into a graph what a predictor puts in the place of a step's outputs."""

    def __init__(self, module: GraphModule, loop: DenoisingLoop, skipping: Skipping) -> None:
        self.graph, self.loop, self.skipping = module.graph, loop, skipping
        self.earlier = {(step, j): node for node in module.graph.find_nodes(op="placeholder")
                        if (where := node.meta.get("li_earlier")) is not None for step, j in (where,)}

    def output(self, step: int, j: int) -> Node:
        """The prediction of output j of a step: a node, of that output's shape and dtype."""
        like = self.loop.outputs[step][j]
        weights = self.skipping.weights(step, self.loop.updates.times)
        terms = {(self._source(*source, j), ()): c for source, c in weights.items()}
        if len(terms) == 1 and next(iter(terms.values())) == 1:
            return next(iter(terms))[0]
        read = {self.loop.updates.symbols[s] for c in terms.values() for s in c.free_symbols} | {n for n, _ in terms}
        with self.graph.inserting_after(next(n for n in reversed(list(self.graph.nodes)) if n in read)):
            anchor = self.graph.call_function(torch.empty, ((0,),))  # marks the place; nothing reads it
        with self.graph.inserting_before(anchor):
            new = emit(self.graph, Linear(terms, ()), self.loop.updates.symbols, value(like).dtype)
        self.graph.erase_node(anchor)
        new.meta["example_value"] = value(like)
        return new

    def _source(self, chunk: int, step: int, j: int) -> Node:
        return self.loop.outputs[step][j] if chunk == NOW else self.earlier[step, j]


def add_earlier(module: GraphModule, loop: DenoisingLoop, skipping: Skipping) -> list[tuple[int, int]]:
    """Give a graph an input for each output of an earlier chunk that its predictor reads; returns their (step, output)."""
    wanted = [(step, j) for step in skipping.remembered() for j in range(len(loop.outputs[0]))]
    last = list(module.graph.find_nodes(op="placeholder"))[-1]
    with module.graph.inserting_after(last):
        for step, j in reversed(wanted):
            node = module.graph.placeholder(f"li_earlier_{step}_{j}")
            node.meta = {"example_value": value(loop.outputs[step][j]), "li_earlier": (step, j)}
    return wanted


def watch_steps(module: GraphModule, loop: DenoisingLoop, skipping: Skipping, *, drift: bool, keep: bool) -> Record:
    """Let a graph return more than its own results, named in ``meta["li_extra"]`` of its output node.

    drift: how far its last step's output is from what would have stood in for it, as a number of no dimensions:
    sum |computed - predicted| / sum |computed|, the largest of its outputs. keep: the outputs of all steps that later
    chunks read.
    """
    graph, last, extra = module.graph, loop.steps - 1, {}
    output = graph.output_node()
    if drift:
        predictor = Predictions(module, loop, skipping)
        predicted = [predictor.output(last, j) for j in range(len(loop.outputs[last]))]
        with graph.inserting_before(output):
            far = [_relative_l1(graph, v, p) for v, p in zip(loop.outputs[last], predicted)]
            extra["drift"] = far[0] if len(far) == 1 else graph.call_method("amax", (graph.call_function(torch.stack, (far,)),))
    if keep:
        extra |= {(step, j): node for step in skipping.remembered() for j, node in enumerate(loop.outputs[step])}
    output.args = ((*output.args[0], *extra.values()),)
    output.meta["li_extra"] = tuple(extra)
    return Record("watch_steps", 1, [f"also returns {', '.join(map(str, extra))}"])


def _relative_l1(graph: Graph, computed: Node, predicted: Node) -> Node:
    call = graph.call_method
    a, b = (call("to", (n, torch.float32)) for n in (computed, predicted))
    difference = call("sum", (call("abs", (call("sub", (a, b)),)),))
    return call("div", (difference, call("sum", (call("abs", (a,)),))))

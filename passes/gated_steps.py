"""Gated steps, approximate: one graph that computes every step or reuses some, as one of its inputs says. For export.

Before::                                   After (reuse: a bool tensor of no dimensions, the graph's last input)::

    v0 = model(x0, 1000); x1 = x0 + v0*d0      v0 = model(x0, 1000); x1 = x0 + v0*d0
    v1 = model(x1, 900);  x2 = x1 + v1*d1      v1 = cond(reuse, v0.clone(), model(x1, 900)); x2 = x1 + v1*d1
    v2 = model(x2, 750);  x3 = x2 + v2*d2      v2 = cond(reuse, v0.clone(), model(x2, 750)); x3 = x2 + v2*d2
    v3 = model(x3, 500);  x4 = x3 + v3*d3      v3 = model(x3, 500);  x4 = x3 + v3*d3

Two variants that are chosen on the host are better wherever a host is there: a condition is read back from the device
and parts CUDA graphs. Branches hold copies of the call, without nested regions, which conditions cannot hold.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from li_compile.patterns import DenoisingLoop, Miss
from li_compile.patterns.graph import REGION, placeholders, value
from li_compile.patterns.linear import Linear

from .combine import emit
from .predictors import NOW, Skipping
from .record import Record, Refused

COND = torch.ops.higher_order.cond


def gated_steps(module: GraphModule, loop: DenoisingLoop, skipping: Skipping) -> Record:
    """Rewrite the loop of a graph without nested regions in place. Counts the conditional calls of the model.

    Raises Refused if the calls are not alike, or the predictor reads what is not in the graph.
    """
    refuse = lambda reason: Refused(Miss("gated steps", loop.calls[0][0].name, reason))
    if isinstance(loop.body, Miss):
        raise Refused(loop.body)
    if loop.body.writes:
        raise refuse("the model writes into its inputs, which a condition cannot hold")
    if skipping.predictor.across:
        raise refuse(f"predictor {skipping.predictor.name!r} reads an earlier chunk, which one graph does not hold")
    if not skipping.skip:
        raise refuse(f"{loop.steps} steps, and none between the first and the last to skip")
    record, body = Record("gated_steps"), loop.body
    with module.graph.inserting_after(placeholders(module.graph)[-1]):
        reuse = module.graph.placeholder("reuse")
    reuse.meta["example_value"] = value(loop.outputs[0][0]).new_empty((), dtype=torch.bool)
    size = len(body.outputs)  # outputs of one call
    for step in skipping.skip:
        sources = skipping.weights(step, loop.updates.times)
        for branch in range(body.calls // loop.steps):
            call, first = step * (body.calls // loop.steps) + branch, branch * size
            terms = [{loop.outputs[k][first + j]: c for (chunk, k), c in sources.items() if chunk == NOW} for j in range(size)]
            _gate(module, loop, call, terms, reuse, f"li_gate_{record.count}")
            record.count += 1
    record.details.append(f"{record.count} calls computed unless reuse is true ({skipping.predictor.name})")
    return record


def inline_regions(module: GraphModule) -> None:
    """Replace every call of a nested region by the region's nodes, in place."""
    for name, sub in [(n, s) for n, s in module.named_children() if isinstance(s, GraphModule)]:
        inline_regions(sub)
        for call in [n for n in module.graph.nodes if n.target is REGION and n.args[0].target == name]:
            made = dict(zip(placeholders(sub.graph), call.args[2:]))
            with module.graph.inserting_before(call):
                for node in sub.graph.nodes:
                    if node.op == "get_attr":  # a constant of the region, which may be called like one of the graph's
                        held = getattr(sub, node.target)
                        known = next((n for n, b in module.named_buffers(recurse=False) if b is held), None)
                        if known is None:
                            module.register_buffer(known := f"{name}_{node.target}", held)
                        made[node] = module.graph.get_attr(known)
                        made[node].meta = dict(node.meta)
                    elif node.op not in ("placeholder", "output"):
                        made[node] = module.graph.node_copy(node, made.__getitem__)
            results = sub.graph.output_node().args[0]
            for user in list(call.users):
                user.replace_all_uses_with(made[results[user.args[1]]])
                module.graph.erase_node(user)
            module.graph.erase_node(call)
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op != "get_attr")
    module.delete_all_unused_submodules()
    module.recompile()


def _gate(module: GraphModule, loop: DenoisingLoop, call: int, terms: list[dict[Node, object]], reuse: Node, name: str) -> None:
    graph, body = module.graph, loop.body
    own = [n[call] for n in body.nodes]
    symbols = loop.updates.symbols
    read = dict.fromkeys([*body.shared, *(n[call] for n in body.varying), *(n for t in terms for n in t),
                          *(symbols[s] for t in terms for c in t.values() for s in c.free_symbols)])
    known = {n: value(n) for n in read if isinstance(value(n), (bool, int, float))}  # a condition takes tensors alone
    operands = [n for n in read if n not in known and not isinstance(getattr(module, str(n.target), None), GraphModule)]
    compute, predict = Graph(), Graph()
    made = known | {n: compute.placeholder(n.name) for n in operands}
    # The first call's operands stand for this one's in the copies of its nodes.
    for node in own:
        made[node] = compute.node_copy(node, made.__getitem__)
    compute.output(tuple(_own(compute, made[o[call]]) for o in body.outputs))
    given = {n: predict.placeholder(n.name) for n in operands}
    for n, p in given.items():
        p.meta["example_value"] = value(n)
    given |= known
    out = [emit(predict, Linear({(given[n], ()): c for n, c in t.items()}, ()), {s: given[symbols[s]] for s in symbols if symbols[s] in given},
                value(o[call]).dtype) for t, o in zip(terms, body.outputs)]
    predict.output(tuple(_own(predict, o) for o in out))
    for suffix, branch in (("reused", predict), ("computed", compute)):
        module.add_submodule(f"{name}_{suffix}", GraphModule({}, branch))
    order = {n: i for i, n in enumerate(graph.nodes)}
    with graph.inserting_after(max(own, key=order.__getitem__)):
        getters = [graph.get_attr(f"{name}_{suffix}") for suffix in ("computed", "reused")]
    with graph.inserting_after(getters[0]):
        node = graph.call_function(COND, (reuse, getters[1], getters[0], tuple(operands)))
    with graph.inserting_after(node):
        for k, o in reversed(list(enumerate(body.outputs))):
            item = graph.call_function(operator.getitem, (node, k))
            item.meta = dict(o[call].meta)
            o[call].replace_all_uses_with(item, delete_user_cb=lambda u: u not in own)
    for n in sorted(own, key=order.__getitem__, reverse=True):
        graph.erase_node(n)


def _own(graph: Graph, node: Node) -> Node:
    """A copy: a branch may not return its input, and both must return the same layout."""
    return graph.call_method("clone", (node,), {"memory_format": torch.contiguous_format})

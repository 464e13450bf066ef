"""Shared steps, exact: the model that a sampling loop calls N times becomes one region, compiled once and called N times.

Before::                                           After::

    k = prefill(context)                               k = invoke_subgraph("li_before", context)
    v0 = block2(block1(x0, 1000), k)                   v0 = invoke_subgraph("li_step", x0, 1000, k)
    x1 = x0 + v0 * d0                                  x1 = x0 + v0 * d0
    v1 = block2(block1(x1, 900), k)                    v1 = invoke_subgraph("li_step", x1, 900, k)
    x2 = x1 + v1 * d1                                  x2 = x1 + v1 * d1
    out = decode(x2)                                   out = invoke_subgraph("li_after", x2)

What depends on no call becomes one region too, and so does what follows the last call if it reads weights. Between the
calls the scheduler's arithmetic is left, on tensors of the state's size. Each region is compiled by itself, and all
variants of the graph share them (li_compile/regions.py).
"""

from __future__ import annotations

import copy
import math

from torch.fx import GraphModule, Node

from li_compile.patterns import DenoisingLoop, Miss
from li_compile.patterns.effects import ALIASES, RANDOM, WRITES, effect, modes, outside_writes, switches_mode, target, written
from li_compile.patterns.graph import REGION, SDPA, all_graphs, ancestors, calls, descendants, name_of, placeholders, region_calls, source_line, subgraphs
from li_compile.patterns.loop_body import Body
from li_compile.patterns.loop_calls import weight_of

from .invariants import Moved, hoist, lift, merge_equal, stays
from .outline import outline
from .record import Record, Refused
from .regions import retarget

PREFIX = "li_"
BEFORE, STEP, AFTER = PREFIX + "before", PREFIX + "step", PREFIX + "after"


def share_steps(module: GraphModule, loop: DenoisingLoop, invariant: bool = True, memory: float = math.inf) -> Record:
    """Rewrite the graph in place. Counts the calls of the shared region. Raises Refused if the calls are not alike.

    invariant: what all steps compute alike (of a condition, say) is computed before the first. What depends on the time
    alone stays: a loop over values that are all there beforehand could not be told from one over a sequence.
    memory: bytes that such values of single layers may take, one a layer.
    """
    record = Record("share_steps")
    if STEP in subgraphs(module):
        return record
    if isinstance(loop.body, Miss):
        raise Refused(loop.body)
    try:
        found = outline(module, loop.body, STEP)
        moved = _invariants(module, found, loop.branches, memory) if invariant else []
        _before(module, found)
        _after(module, found)
    except ValueError as why:
        raise _refused(loop.calls[0][0], str(why)) from None
    if (left := _left_over(module)) is not None:
        raise _refused(left, f"{name_of(left)} stands between the calls of the sampling loop and cannot run by itself: it "
                       "reads weights, writes in place (x += y for x = x + y), or is under an autocast of its own")
    record.count = len(found)
    record.details.append(f"{len(found)} calls of one region of {len(loop.body.nodes)} nodes")
    record.details += map(str, moved)
    return record


def _invariants(module: GraphModule, found: list[Node], branches: int, memory: float) -> list[Moved]:
    """Compute before the first step what is the same in all of them, of layers too."""
    step, late = getattr(module, STEP), descendants(found) | set(found)
    operands = list(zip(*(call.args[2:] for call in found)))
    fixed = {p for p, given in zip(placeholders(step.graph), operands) if not late & set(given) and len(set(given)) <= branches}
    changing, around = written(step.graph), modes(step.graph)
    for node in step.graph.nodes:
        if stays(node, changing) and not around[node] and all(n in fixed for n in node.all_input_nodes):
            fixed.add(node)
    numbered = lambda graph: {n: i for i, n in enumerate(graph.nodes)}
    before = numbered(step.graph), numbered(module.graph)
    memory /= branches  # each branch of guidance has values of its own
    late_in_step = {n for n in step.graph.nodes if n not in fixed}
    for region, sub in subgraphs(step).items():
        elsewhere = any(other is sub and region_calls(part, name) for part in all_graphs(module) if part is not step
                        for name, other in subgraphs(part).items())
        # Who else calls it hands it what it was handed before.
        own = _renamed(step, region, f"{region}_of_steps", copy.deepcopy(sub)) if elsewhere else region
        lifted = lift(step, own, late_in_step, memory)
        memory -= sum(m.bytes for m in lifted)
        if elsewhere and not lifted:
            _renamed(step, own, region, sub)
    merge_equal(step.graph, before[0])  # what two of them are computed from, once; what was there stays as it is written
    moved = hoist(module, STEP, late=late, most=branches)
    merge_equal(module.graph, before[1])
    return moved


def _renamed(step: GraphModule, old: str, new: str, sub: GraphModule) -> str:
    """Let the step call a region by another name, by which compilers know it; the name."""
    setattr(step, new, sub)
    for call in region_calls(step, old):
        retarget(step, call, new)
    step.graph.eliminate_dead_code(lambda n: n.op != "get_attr")
    delattr(step, old)
    return new


def shared_regions(module: GraphModule) -> list[str]:
    """Names of the regions that this pass made and that are still called."""
    return [name for name in subgraphs(module) if name in (BEFORE, STEP, AFTER)]


def _before(module: GraphModule, found: list[Node]) -> None:
    """Outline what depends on no call, if it reads weights."""
    behind, order = descendants(found) | set(found), {n: i for i, n in enumerate(module.graph.nodes)}
    before = [n for n in order if n.op.startswith("call") and n not in behind]
    if not any(_is_heavy(n) for n in before):
        return
    # What draws random numbers between the calls keeps its place, and so does what reads what is written there.
    changing = written(module.graph)
    late = {n for n in before if order[n] > order[found[0]] and (
        effect(n) is not None or any(target(o) in changing for o in n.all_input_nodes))}
    by_calls = {w.base for call in found for w in outside_writes(call)}
    late |= descendants(list(late)) | {n for n in before if name_of(n) in ALIASES and target(n) in by_calls}  # and its views
    # What only the scheduler's arithmetic reads is part of that: a state times a number, say.
    read: set[Node] = set()
    for node in reversed(before):
        if _is_heavy(node) or effect(node) is not None or any(u in read or u in found for u in node.users):
            read.add(node)
    _region(module, [n for n in before if n in read and n not in late], BEFORE, found[0].args[0])


def _after(module: GraphModule, found: list[Node]) -> None:
    """Outline what no call depends on, if it reads weights."""
    behind, ahead = descendants(found), set(ancestors(found))
    last = next(i for i, n in enumerate(module.graph.nodes) if n is found[-1])
    after = [n for i, n in enumerate(module.graph.nodes) if n.op.startswith("call") and n not in ahead and (
        n in behind or i > last and n.target is not REGION) and not (n.args and n.args[0] in found)]
    if any(_is_heavy(n) for n in after):
        _region(module, after, AFTER)


def _refused(node: Node, reason: str) -> Refused:
    return Refused(Miss("shared steps", node.name, reason, source_line(node)))


def _is_heavy(node: Node) -> bool:
    return weight_of(node) is not None or calls(node, SDPA) or node.target is REGION


def _region(module: GraphModule, nodes: list[Node], name: str, before: Node | None = None) -> None:
    """Outline nodes that are called once."""
    own = set(nodes)
    if not own:
        return
    outputs = [n for n in nodes if any(u not in own for u in n.users)]
    operands = dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in own)
    outline(module, Body([(n,) for n in nodes], [(n,) for n in outputs], list(operands), [], []), name, before)


def _left_over(module: GraphModule) -> Node | None:
    """A node that reads weights or depends on a mode, or that writes in place between the calls; all else runs as it stands."""
    nodes = list(module.graph.nodes)
    last = max(i for i, n in enumerate(nodes) if n.target is REGION and n.args[0].target == STEP)
    for i, node in enumerate(nodes):
        if node.op.startswith("call") and not (node.target is REGION and node.args[0].target in (BEFORE, STEP, AFTER)):
            if _is_heavy(node) or switches_mode(node) or i < last and name_of(node) in WRITES - RANDOM:
                return node
    return None

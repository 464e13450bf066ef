"""Denoising loops: a model called N times in a graph, each time on the state that the last call's output updated.

Dynamo unrolls the Python loop, so that the graph holds N copies of the model, flat or as calls of nested regions::

    v0 = model(x0, t0);  x1 = x0 + v0 * d0;  v1 = model(x1, t1);  x2 = x1 + v1 * d1;  ...

Found without any mark: the operators that read weights, in graph order, hold a run of equal pieces (loop_calls.py). What
makes it a denoising loop and not, say, a shared layer applied N times: the calls differ in something besides the state
(the time), and the state, or fresh noise in its place, also reaches the next call around the model. The calls are then
folded into one (loop_body.py), and the scheduler's arithmetic between them is read (loop_update.py).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.fx import GraphModule, Node

from .effects import ALIASES, RANDOM, VALUE_FREE, WRITES, effects, outside_writes, target
from .graph import REGION, SHAPE_ONLY, Miss, ancestors, descendants, hint, name_of, shape, source_line, value
from .loop_body import Body, find_body, same_graph
from .loop_calls import find_runs
from .loop_update import Updates, read_updates

ARITHMETIC_NAMES = {"add", "sub", "rsub", "mul", "div", "truediv", "neg", "lerp", "multiply", "divide", "subtract"}
SCALES = {"mul", "multiply", "div", "truediv", "divide", "neg"}


@dataclasses.dataclass
class DenoisingLoop:
    """calls[i]: anchors (operators with weights) of step i; outputs[i]: what leaves step i, in corresponding order.

    branches: independent calls of the model a step (2 with sequential guidance). body: the call, folded from all
    branches x steps copies of it, or a Miss that says where they differ. updates: the scheduler's arithmetic.
    """

    calls: list[list[Node]]
    outputs: list[list[Node]]
    form: str  # "unrolled" or "regions"
    branches: int
    body: Body | Miss
    updates: Updates

    @property
    def steps(self) -> int:
        return len(self.calls)


def find_loop(module: GraphModule) -> tuple[DenoisingLoop | None, list[Miss]]:
    """The denoising loop of a graph, or None with the reason.

    With classifier-free guidance the model is called twice a step: pieces that do not depend on one another are tried
    in groups of two and more.
    """
    nodes, first, best = list(module.graph.nodes), None, None
    for pieces, before in find_runs(module):
        # What follows a loop may begin as one call more (a call that only fills a cache): then the run has several phases, and
        # in the wrong one it lacks a call.
        if best is not None and (len(pieces[0]) != len(best[1][0]) or len(pieces) <= len(best[1])):
            continue
        for branches in (g for g in range(1, len(pieces) // 2 + 1) if len(pieces) % g == 0):
            steps = [sum(pieces[i:i + branches], []) for i in range(0, len(pieces), branches)]
            read = _read_loop(nodes, steps, branches, before)
            if isinstance(read, DenoisingLoop):
                best = read, pieces
                break
            first = first or read
    if best is not None:
        return best[0], []
    return None, [first or Miss("denoising loop", "graph", "no model is called more than once in this graph; compile "
                                "the whole sampling loop as one function, or call the model inside a Session's chunk")]


def _read_loop(nodes: list[Node], steps: list[list[Node]], branches: int, before: list[Node]) -> DenoisingLoop | Miss:
    """before: anchors of a call like these that is not among the steps. What it gave may be read by all, and is no time."""
    refuse = lambda reason, node: Miss("denoising loop", node.name, reason, source_line(node))
    order = {n: i for i, n in enumerate(nodes)}
    ends = [order[s[0]] for s in steps[1:]] + [len(nodes)]
    outputs = [_outputs(s, order, end) for s, end in zip(steps, ends)]
    body, own = None, set()
    for i, (step, out) in enumerate(zip(steps, outputs)):
        if not out or [(name_of(n), str(shape(n))) for n in out] != [(name_of(n), str(shape(n))) for n in outputs[0]]:
            return refuse(f"call {i} of the repeated model hands on other values than call 0", step[0])
        for node in nodes[order[step[0]]:order[step[-1]] + 1]:
            if not (found := effects(node)):
                continue
            if body is None:  # what a call writes is no matter if it is its own, or written again by the call that follows
                body = _fold(steps, outputs, branches)
                own = {n for k in body.nodes for n in k} if isinstance(body, Body) else set()
            if node not in own or found & RANDOM:
                return refuse(f"the model draws random numbers or writes in place ({', '.join(sorted(found))})", node)
    numbers, free = _value_numbers(nodes), lambda n: name_of(n) in VALUE_FREE
    for i in range(1, len(steps)):
        if not set(outputs[i - 1]) & set(ancestors(steps[i])):
            written = next((n for n in descendants(outputs[i - 1]) if name_of(n) in WRITES and order[n] < order[steps[i][0]]), None)
            return refuse(f"call {i} does not depend on call {i - 1}: a repeated model, but no loop" if written is None else
                          f"what call {i - 1} gives is written in place ({name_of(written)}); make a new state instead", steps[i][0])
        given = [*before, *(o for out in outputs[:i] for o in out)]
        fixed = [set(ancestors(s)) - descendants(given, free) - set(given) for s in steps[i - 1:i + 1]]
        known = {numbers[n] for n in fixed[0]}
        fresh = {n for n in fixed[1] if numbers[n] not in known}
        if not _told(fresh, steps[i], set(ancestors(steps[i])) & descendants(given), order):
            return refuse(f"call {i} differs from call {i - 1} in nothing but the state, not even a time: repeated "
                          "layers, no denoising loop", steps[i][0])
        if not _bypasses(outputs[i - 1], steps[i - 1], steps[i], fresh):
            return refuse("the state reaches the next call only through the model: repeated layers, no denoising loop",
                          steps[i][0])
    form = "regions" if any(n.target is REGION for s in steps for n in s) else "unrolled"
    body = body or _fold(steps, outputs, branches)
    if isinstance(body, Body) and (why := _rewritten(body, body.calls // len(steps), nodes, numbers)) is not None:
        return refuse(*why)
    if isinstance(body, Body) and (data := _data(body, outputs, numbers)) is not None:
        return refuse(f"the calls read different data, each as much as a state ({data.name}): a loop over a sequence, no "
                      "denoising loop", data)
    return DenoisingLoop(steps, outputs, form, branches, body, read_updates(nodes, outputs, body))


def _fold(steps: list[list[Node]], outputs: list[list[Node]], branches: int) -> Body | Miss:
    """The body of one call: of all branches alike or, where these differ, of a step with all of its branches."""
    if branches > 1 and all(len(o) % branches == 0 for o in outputs):
        size, each = len(steps[0]) // branches, len(outputs[0]) // branches
        calls = [s[i:i + size] for s in steps for i in range(0, len(s), size)]
        out = [o[i:i + each] for o in outputs for i in range(0, len(o), each)]
        if isinstance(body := find_body(calls, out), Body):
            return body
    return find_body(steps, outputs)


def _data(body: Body, outputs: list[list[Node]], numbers: dict[Node, int]) -> Node | None:
    """An operand that differs from step to step, is no state, and is too large for a time."""
    later, branches = descendants([o for out in outputs for o in out]), body.calls // len(outputs)
    state = max(_elements(o) or 0 for o in outputs[0])
    for nodes in body.varying:
        for mine in (nodes[b::branches] for b in range(branches)):
            same = len({numbers[n] for n in mine}) == 1 or any(n in later or name_of(n) in {*VALUE_FREE, "full"} for n in mine)
            if not same and 2 * (_elements(mine[-1]) or 0) > state:
                return mine[-1]
    return None


def _rewritten(body: Body, branches: int, nodes: list[Node], numbers: dict[Node, int]) -> tuple[str, Node] | None:
    """Why a call's writes into inputs (a cache of keys and values) are not made again by the last call, with the node.

    branches: calls a step in the body. They are if all steps write in the same places of the same tensors and, until the last has, nobody else reads these.
    """
    inside, bases = {n for k in body.nodes for n in k}, set()
    for corresponding in body.nodes:
        for mine in (corresponding[b::branches] for b in range(branches)):
            writes = [[(w.base, [numbers[p] for p in w.place]) for w in outside_writes(n)] for n in mine]
            if any(w != writes[0] for w in writes):
                return f"the calls write into different places ({name_of(mine[0])})", mine[0]
            bases |= {base for base, _ in writes[0]}
    if not bases:
        return None
    order = {n: i for i, n in enumerate(nodes)}
    first, last = min(map(order.get, inside)), max(map(order.get, inside))
    for node in nodes[first:last]:
        if node not in inside and any(target(n) in bases for n in node.all_input_nodes) and name_of(node) not in ALIASES:
            return f"what the calls write into is read between them ({name_of(node)})", node
    return None


def _outputs(anchors: list[Node], order: dict[Node, int], end: int) -> list[Node]:
    """Nodes computed by one step (its anchors, what lies between them, reshapes behind them) that are used elsewhere."""
    behind, before = descendants(anchors), set(ancestors(anchors))
    inside = set(anchors) | (behind & before)
    for node in sorted((n for n in behind - inside if order[n] < order[anchors[-1]] and name_of(n) in WRITES), key=order.get):
        if target(node) in before:  # no edge leads from here to who reads what it wrote
            inside |= {node} | (behind & set(ancestors([node])))
    grown = True
    while grown:
        grown = False
        for node in sorted(behind - inside, key=order.get):
            if order[node] < end and name_of(node) in SHAPE_ONLY and _sources(node) == 1 \
                    and any(x in inside for x in node.all_input_nodes):
                inside.add(node)
                grown = True
    return sorted((n for n in inside if any(u not in inside for u in n.users)), key=order.get)


def _sources(node: Node) -> int:
    """How many values a node reads; sizes do not count."""
    return sum(not isinstance(value(x), (int, torch.SymInt)) for x in node.all_input_nodes)


def _value_numbers(nodes: list[Node]) -> dict[Node, int]:
    """Numbers that are equal for nodes which compute the same from the same, as two steps do with what is invariant."""
    numbers, seen, regions = {}, {}, []
    for node in nodes:
        unique = node.op == "placeholder" or name_of(node) in RANDOM
        args = (shape(node), *node.args[1:]) if name_of(node) in VALUE_FREE else node.args
        if node.op == "get_attr":
            key = f"attribute {_attribute(node, regions)}"
        elif node.target is REGION:
            key = repr(("region", torch.fx.map_arg((args[0], args[2:]), numbers.get)))
        else:
            key = node.name if unique else repr((name_of(node), torch.fx.map_arg((args, node.kwargs), numbers.get)))
        numbers[node] = seen.setdefault(key, len(seen))
    return numbers


def _attribute(node: Node, regions: list[tuple[str, GraphModule]]) -> str:
    """The name of an attribute; of regions that compute the same, the name of the first."""
    found = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(found, GraphModule):
        return str(node.target)
    for name, region in regions:
        if name == node.target or same_graph(region, found):
            return name
    regions.append((str(node.target), found))
    return str(node.target)


def _bypasses(outputs: list[Node], before: list[Node], after: list[Node], fresh: set[Node]) -> bool:
    """Whether the state that ``before`` starts from also reaches ``after`` on a way around ``before``.

    The update x' = x + v * d joins the model's output with the state: some node between the two steps reads both what
    the model gave and a tensor that the model read too and that is neither a weight nor the model's own work. Fresh
    noise of the state's size, joined in its place, counts as well (a model that predicts the clean state).
    """
    joined = descendants(outputs, lambda n: name_of(n) in VALUE_FREE) & set(ancestors(after))
    inner = set(before) | (descendants(before) & set(ancestors(outputs)))
    read = {n for n in ancestors([x for b in before for x in b.all_input_nodes]) if n not in inner}
    for node in joined:
        for operand in node.all_input_nodes:
            if (operand in read or operand in fresh or _unscaled(operand) in read) and operand not in joined and operand not in outputs \
                    and _is_state(operand, outputs):
                return True
    return False


def _told(fresh: set[Node], step: list[Node], later: set[Node], order: dict[Node, int]) -> bool:
    """Whether the model itself reads something fresh, and not only the arithmetic between two calls (later: what depends on
    the last call) that makes the next state."""
    update = {n for n in later - descendants(step) - set(step) if name_of(n) in ARITHMETIC_NAMES | SHAPE_ONLY}
    told: set[Node] = set()
    inside = {*ancestors(step)}
    for node in sorted(fresh, key=order.get, reverse=True):
        if node in step or any(u in told or u not in fresh and u not in update for u in node.users if u in inside):
            told.add(node)
    return bool(told)


def _unscaled(node: Node) -> Node:
    """x of a node that is x times a number, as in x' = a x + b v."""
    while node.op.startswith("call") and name_of(node) in SCALES and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def _is_state(node: Node, outputs: list[Node]) -> bool:
    """A latent: as many elements as an output of the model (layout may differ)."""
    return _elements(node) is not None and _elements(node) in {_elements(o) for o in outputs}


def _elements(node: Node) -> int | None:
    """Elements of a tensor; of dynamic sizes, as it was traced."""
    sizes = [hint(d) for d in shape(node) or ()]
    return math.prod(sizes) if sizes and None not in sizes else None

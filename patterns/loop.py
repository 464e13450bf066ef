"""Denoising loops: a model called N times in a graph, each time on the state that the last call's output updated.

Dynamo unrolls the Python loop, so that the graph holds N copies of the model, flat or as calls of nested regions::

    v0 = model(x0, t0);  x1 = x0 + v0 * d0;  v1 = model(x1, t1);  x2 = x1 + v1 * d1;  ...

Found without any mark: the operators that read weights, in graph order, end in a run of equal pieces. What makes it a
denoising loop and not, say, a shared layer applied N times: the calls differ in something besides the state (the time),
and the state, or fresh noise in its place, also reaches the next call around the model.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from .graph import (CONV, LINEAR, REGION, SDPA, SHAPE_ONLY, Miss, ancestors, calls, descendants, name_of,
                    placeholders, shape, source_line, subgraphs, through_shapes)

RANDOM = {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "dropout", "bernoulli", "multinomial",
          "normal", "normal_", "uniform_", "native_dropout"}
# Operators that read no more of their first operand than its shape.
VALUE_FREE = {"full_like", "zeros_like", "ones_like", "rand_like", "randn_like", "new_full", "new_zeros", "new_ones"}
WRITES = {"setitem", "copy_", "index_copy_", "scatter_", "index_put_", "add_", "mul_", "fill_", "zero_"}


@dataclasses.dataclass
class DenoisingLoop:
    """calls[i]: anchors (operators with weights) of step i; outputs[i]: what leaves step i, in corresponding order."""

    calls: list[list[Node]]
    outputs: list[list[Node]]
    form: str  # "unrolled" or "regions"

    @property
    def steps(self) -> int:
        return len(self.calls)


def region_weights(sub: GraphModule) -> list[int]:
    """Positions of a region's placeholders that are read as weights."""
    weights = set()
    for node in sub.graph.nodes:
        if calls(node, LINEAR | CONV):
            weights.add(through_shapes(node.args[1]))
        elif node.target is REGION:
            inner = region_weights(getattr(sub, node.args[0].target))
            weights |= {through_shapes(node.args[2 + i]) for i in inner if isinstance(node.args[2 + i], Node)}
    return [i for i, p in enumerate(placeholders(sub.graph)) if p in weights]


def _label(module: GraphModule, node: Node, weights: dict[str, list[int]]) -> tuple | None:
    """What a node is, up to its position in the loop: equal for corresponding nodes of two steps."""
    if calls(node, LINEAR | CONV):
        return name_of(node), through_shapes(node.args[1]).name, str(shape(node))
    if calls(node, SDPA):
        return "attention", str(shape(node.args[0])), str(shape(node.args[1]))
    if node.target is REGION:
        operands = node.args[2:]
        names = tuple(through_shapes(operands[i]).name for i in weights[node.args[0].target])
        return ("region", names, len(operands))
    return None


def _repeated_tail(labels: list[tuple]) -> tuple[int, int] | None:
    """(period, count) of the longest tail made of count >= 2 equal pieces; the most pieces win."""
    best = None
    for period in range(1, len(labels) // 2 + 1):
        count = 1
        while (count + 1) * period <= len(labels) and \
                labels[-(count + 1) * period:-count * period] == labels[-period:]:
            count += 1
        # A piece that is itself a run of equal pieces (blocks without weights of their own) has a smaller period.
        if count >= 2 and (best is None or period * count > best[0] * best[1]):
            best = period, count
    return best


def _outputs(anchors: list[Node], order: dict[Node, int], end: int) -> list[Node]:
    """Nodes computed by one step (its anchors, what lies between them, reshapes behind them) that are used elsewhere."""
    behind, before = descendants(anchors), set(ancestors(anchors))
    inside = set(anchors) | (behind & before)
    grown = True
    while grown:
        grown = False
        for node in sorted(behind - inside, key=order.get):
            if order[node] < end and name_of(node) in SHAPE_ONLY and len(node.all_input_nodes) == 1 \
                    and node.all_input_nodes[0] in inside:
                inside.add(node)
                grown = True
    return sorted((n for n in inside if any(u not in inside for u in n.users)), key=order.get)


def find_loop(module: GraphModule) -> tuple[DenoisingLoop | None, list[Miss]]:
    """The denoising loop of a graph, or None with the reason.

    With classifier-free guidance the model is called twice a step: pieces that do not depend on one another are tried
    in groups of two and more.
    """
    nodes = list(module.graph.nodes)
    weights = {name: region_weights(sub) for name, sub in subgraphs(module).items()}
    labelled = [(n, label) for n in nodes if (label := _label(module, n, weights)) is not None]
    tail = _repeated_tail([label for _, label in labelled])
    if tail is None:
        return None, [Miss("denoising loop", "graph", "no model is called more than once at the end of the graph; "
                           "compile the whole sampling loop as one function")]
    period, count = tail
    anchors = [node for node, _ in labelled[-period * count:]]
    first = None
    for group in (g for g in range(1, count // 2 + 1) if count % g == 0):
        size = period * group
        read = _read_loop(nodes, [anchors[i:i + size] for i in range(0, len(anchors), size)])
        if isinstance(read, DenoisingLoop):
            return read, []
        first = first or read
    return None, [first]


def _read_loop(nodes: list[Node], steps: list[list[Node]]) -> DenoisingLoop | Miss:
    refuse = lambda reason, node: Miss("denoising loop", node.name, reason, source_line(node))
    order = {n: i for i, n in enumerate(nodes)}
    ends = [order[s[0]] for s in steps[1:]] + [len(nodes)]
    outputs = [_outputs(s, order, end) for s, end in zip(steps, ends)]
    for i, (step, out) in enumerate(zip(steps, outputs)):
        if not out or [(name_of(n), str(shape(n))) for n in out] != [(name_of(n), str(shape(n))) for n in outputs[0]]:
            return refuse(f"call {i} of the repeated model hands on other values than call 0", step[0])
        for node in nodes[order[step[0]]:order[step[-1]] + 1]:
            if (effect := _effect(node)) is not None:
                return refuse(f"the model draws random numbers or writes in place ({effect})", node)
    numbers, free = _value_numbers(nodes), lambda n: name_of(n) in VALUE_FREE
    for i in range(1, len(steps)):
        if not set(outputs[i - 1]) & set(ancestors(steps[i])):
            return refuse(f"call {i} does not depend on call {i - 1}: a repeated model, but no loop", steps[i][0])
        fixed = [set(ancestors(s)) - descendants([o for out in outputs[:i] for o in out], free) for s in steps[i - 1:i + 1]]
        known = {numbers[n] for n in fixed[0]}
        fresh = {n for n in fixed[1] if numbers[n] not in known}
        if not fresh:
            return refuse(f"call {i} differs from call {i - 1} in nothing but the state, not even a time: repeated "
                          "layers, no denoising loop", steps[i][0])
        if not _bypasses(outputs[i - 1], steps[i - 1], steps[i], fresh):
            return refuse("the state reaches the next call only through the model: repeated layers, no denoising loop",
                          steps[i][0])
    form = "regions" if any(n.target is REGION for s in steps for n in s) else "unrolled"
    return DenoisingLoop(steps, outputs, form)


def _effect(node: Node) -> str | None:
    """Name of the first operator with an effect at a node or, where it calls a region, inside."""
    if node.target is REGION:
        sub = getattr(node.graph.owning_module, node.args[0].target)
        return next((e for n in sub.graph.nodes if (e := _effect(n)) is not None), None)
    return name_of(node) if name_of(node) in RANDOM | WRITES else None


def _value_numbers(nodes: list[Node]) -> dict[Node, int]:
    """Numbers that are equal for nodes which compute the same from the same, as two steps do with what is invariant."""
    numbers, seen = {}, {}
    for node in nodes:
        unique = node.op in ("placeholder", "get_attr") or name_of(node) in RANDOM
        args = (shape(node), *node.args[1:]) if name_of(node) in VALUE_FREE else node.args
        key = node.name if unique else repr((name_of(node), torch.fx.map_arg((args, node.kwargs), numbers.get)))
        numbers[node] = seen.setdefault(key, len(seen))
    return numbers


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
            if (operand in read or operand in fresh) and operand not in joined and operand not in outputs \
                    and _is_state(operand, outputs):
                return True
    return False


def _is_state(node: Node, outputs: list[Node]) -> bool:
    """A latent: as many elements as an output of the model (layout may differ)."""
    size = lambda n: torch.Size(shape(n)).numel() if shape(n) and all(isinstance(s, int) for s in shape(n)) else None
    return size(node) is not None and size(node) in {size(o) for o in outputs}

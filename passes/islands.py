"""Precision islands: products in full precision in the midst of a model in half precision, found and, if asked for, lowered.

Before::                                          After (``exact.islands="bf16"``, off unless named)::

    with autocast(enabled=False):                     h = linear(x.to(bf16), w.to(bf16), b.to(bf16)).to(float32)
        h = linear(x.float(), w, b)

Where the graph switches autocast on, the product in bf16 is under an autocast that is off: ``autocast("cuda", float32)``, how some
authors ask for full precision, would widen its operands again.

With ``exact.islands="tf32"`` the graph stays as it is, and runs with CUDA's products in TF32 (li_compile/tf32.py).

Authors put them where half precision hurt in training, and leave them where it does not: on an H100 a product in fp32 takes
more than ten times as long. Whether one matters for quality only a trained model shows, so none is touched by default.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from li_compile.patterns import Miss
from li_compile.patterns.effects import switches_mode
from li_compile.patterns.graph import LINEAR, MATMUL, SDPA, calls, name_of, region_calls, source_line, subgraphs, value

from .cost import cost_of
from .record import Record

HALF = {torch.bfloat16, torch.float16}


def find_islands(module: GraphModule) -> list[tuple[Node, int]]:
    """Products in fp32 and how often each is called, if the graph computes others, or attention, in half precision."""
    found, half = [], False
    for region, graph_module in {"": module, **subgraphs(module)}.items():
        for node in graph_module.graph.nodes:
            v = value(node)
            if node.op.startswith("call") and isinstance(v, torch.Tensor) and (_is_product(node) or calls(node, SDPA)):
                half |= v.dtype in HALF
                if v.dtype == torch.float32 and _is_product(node):
                    found.append((node, len(region_calls(module, region)) if region else 1))
    return found if half else []


def describe(module: GraphModule) -> str | None:
    """The islands of a graph in words, None if there are none."""
    found = find_islands(module)
    if not found:
        return None
    flops = sum(cost_of(n)[0] * times for n, times in found)
    worst = max(found, key=lambda f: cost_of(f[0])[0] * f[1])[0]
    return f"{sum(times for _, times in found)} products in fp32, {flops / 1e9:.3f} GFLOP (exact.islands keeps or lowers them); the largest: " \
           f"{worst.name} {source_line(worst)}".rstrip()


def lower_islands(module: GraphModule, dtype: torch.dtype = torch.bfloat16) -> Record:
    """Compute the islands of a graph in half precision, in place. Approximate. Counts the products."""
    record = Record("islands")
    switched = any(switches_mode(n) for part in (module, *subgraphs(module).values()) for n in part.graph.nodes)
    for node, times in find_islands(module):
        graph = node.graph
        with graph.inserting_before(node):
            entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, (value(node).device.type, dtype, False, None)) if switched else None
            cast = lambda n: graph.call_method("to", (n, dtype)) if isinstance(value(n), torch.Tensor) else n
            args, kwargs = map_arg((node.args, node.kwargs), cast)
        node.args, node.kwargs = args, kwargs
        with graph.inserting_after(node):
            back = graph.call_method("to", (node, torch.float32))
            if switched:
                graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
        back.meta = dict(node.meta)
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
        node.meta = {k: v for k, v in node.meta.items() if k != "example_value"} | {"example_value": value(back).to(dtype)}
        record.count += times
    if record.count:
        record.details.append(f"{record.count} products in {str(dtype).removeprefix('torch.')}")
    return record


def islands_in_tf32(module: GraphModule) -> Record:
    """Count the islands of a graph that the switch reaches: those on CUDA. Changes nothing; whoever runs the graph throws the switch."""
    record = Record("islands")
    for node, times in find_islands(module):
        device = value(node).device.type
        if device == "cuda":
            record.count += times
        else:
            record.misses.append(Miss("islands", node.name, f"{device} has no TF32; this product stays in fp32", source_line(node)))
    if record.count:
        record.details.append(f"{record.count} products in TF32, by a switch while this graph runs")
    return record


def _is_product(node: Node) -> bool:
    return calls(node, LINEAR | MATMUL) or node.target is operator.matmul or name_of(node) in ("addmm", "baddbmm")

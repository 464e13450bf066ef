"""GELU in its tanh form applied by the linear layer before it, exact.

Before::                                                  After::

    y = linear(x, weight, bias)                                o = li.linear_gelu(x, weight, bias)
    o = gelu(y, approximate="tanh")

The sums are not rounded in between, which they are in the model. Where there is no such product, as on a CPU, nothing changes: a compiler
fuses the activation better there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from li_compile.kernels.linear_gelu import LEAST_ROWS, why_no_epilogue
from li_compile.patterns import Miss
from li_compile.patterns.graph import LINEAR, argument, calls, hint, region_calls, source_line, subgraphs, value

from .record import Record
from .regions import drop_dead

GELU = {F.gelu, torch._C._nn.gelu, torch.ops.aten.gelu.default}


def linear_gelu(module: GraphModule, anywhere: bool = False) -> Record:
    """Rewrite a graph and its regions, in place. anywhere: also where there is no such product. Counts the layers that run."""
    record = Record("linear_gelu")
    for region, graph_module in {"": module, **subgraphs(module)}.items():
        graph = graph_module.graph
        for node in list(graph.nodes):
            if not calls(node, GELU) or not calls(linear := argument(node, 0, "input"), LINEAR):
                continue
            if (why := _why_not(node, linear, anywhere)) is not None:
                record.misses.append(Miss("linear and GELU", node.name, f"left to PyTorch: {why}", source_line(node)))
                continue
            dtype = value(linear).dtype
            with graph.inserting_before(node):
                operands = [_cast(graph_module, argument(linear, i, n), dtype) for i, n in enumerate(("input", "weight", "bias"))]
                new = graph.call_function(torch.ops.li.linear_gelu.default, tuple(operands))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            record.count += len(region_calls(module, region)) if region else 1
        drop_dead(graph_module)
    return record


def _why_not(node: Node, linear: Node, anywhere: bool) -> str | None:
    if (argument(node, 1, "approximate") or "none") != "tanh":
        return "it is the exact GELU, and the product's is the tanh approximation"
    if len(linear.users) > 1:
        return "what the linear layer gives is used elsewhere too"
    if argument(linear, 2, "bias") is None:
        return "the linear layer has no bias"
    if value(node).dtype != value(linear).dtype:
        return f"it is computed in {value(node).dtype}, and the linear layer in {value(linear).dtype}"
    rows = math.prod(hint(n) or 0 for n in value(linear).shape[:-1])
    if not anywhere and rows < LEAST_ROWS:
        return f"{rows} rows, and it is for {LEAST_ROWS} and more"
    return None if anywhere else why_no_epilogue(value(linear))


def _cast(module: GraphModule, x: Node, dtype: torch.dtype) -> Node:
    """What autocast does to an operand of the linear layer, written out."""
    if value(x).dtype == dtype:
        return x
    cast = module.graph.call_method("to", (x, dtype))
    cast.meta = {k: v for k, v in x.meta.items() if k in ("stack_trace", "nn_module_stack")}
    return cast

"""Shapes for a changed graph: run it on fake tensors and store every node's result as its example value."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Interpreter, Node

from li_compile.patterns.graph import REGION, subgraphs

from .regions import drop_dead


class _Propagate(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.regions: dict[tuple, object] = {}

    def run_node(self, n: Node):
        result = super().run_node(n)
        n.meta["example_value"] = result
        n.meta.pop("val", None)
        return result

    def call_function(self, target, args, kwargs):
        if target is REGION:  # walk the region itself, so that its nodes get shapes too; once, as all calls are alike
            key = (args[0], str([_layout(x) for x in args[2:]]))  # as text: symbolic sizes cannot be hashed
            if key not in self.regions:
                self.regions[key] = _Propagate(args[0]).run(*args[2:])
            return self.regions[key]
        return super().call_function(target, args, kwargs)


def _layout(x) -> tuple:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else (x,)


def propagate(module: GraphModule, inputs: Sequence, mode) -> None:
    """Set ``example_value`` on all nodes of a graph and its regions.

    inputs: fake tensors of ``mode`` (a FakeTensorMode) and ints or SymInts, one a placeholder. Raises whatever an
    operator says of shapes that do not fit: a rewrite that broke the graph is found here.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        _Propagate(module).run(*inputs)


def tidy(module: GraphModule) -> None:
    """Remove dead nodes and regions that are no longer called; check and recompile the graph."""
    for graph_module in (module, *subgraphs(module).values()):
        drop_dead(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
    called = set(subgraphs(module))
    for name, child in list(module.named_children()):
        if isinstance(child, GraphModule) and name not in called:
            delattr(module, name)

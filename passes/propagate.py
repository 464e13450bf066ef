"""Shapes for a changed graph: run it on fake tensors and store every node's result as its example value."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Interpreter, Node

from li_compile.patterns.graph import REGION


class _Propagate(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.regions: dict[tuple, object] = {}
        self.mapped = 0  # torch.func.vmap's that are open: what is inside them (how block masks are made) keeps its values

    def run_node(self, n: Node):
        name = getattr(n.target, "__name__", "")
        self.mapped += name == "_vmap_increment_nesting"
        inside = self.mapped > 0
        self.mapped -= name == "_vmap_decrement_nesting"
        if inside:
            return n.meta.get("example_value")
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
    from li_compile.patterns.effects import effect
    from li_compile.patterns.graph import name_of, subgraphs

    kept = ("placeholder", "output")
    for graph_module in (module, *subgraphs(module).values()):
        for node in reversed(list(graph_module.graph.nodes)):
            if not node.users and node.op not in kept and effect(node) is None \
                    and not name_of(node).endswith("autocast") and not name_of(node).startswith("_vmap_"):
                graph_module.graph.erase_node(node)
        graph_module.graph.lint()
        graph_module.recompile()
    called = set(subgraphs(module))
    for name, child in list(module.named_children()):
        if isinstance(child, GraphModule) and name not in called:
            delattr(module, name)

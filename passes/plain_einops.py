"""Calls of einops that a graph holds whole, in the views that they are.

Before::                                                After::

    y = einops.repeat(x, "(B T) C->B (T H W) C", H=4, W=6)   y = x.reshape(1, 9, 256).unsqueeze(2) ... .expand(...).reshape(1, 216, 256)

Which versions of PyTorch and einops let Dynamo look into einops, and which leave its functions as they are, is no matter of theirs alone:
einops 0.8.2 compares torch's version as text and takes 2.11 for older than 2.8. No pass could see through such a call.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

from li_compile.patterns._compat import expression
from li_compile.patterns.graph import subgraphs, value


def plain_einops(module: GraphModule) -> None:
    """Replace the calls in a graph and its regions, in place. One whose sizes cannot be written down stays."""
    for graph_module in (module, *subgraphs(module).values()):
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function" and str(getattr(node.target, "__module__", "")).partition(".")[0] == "einops":
                with graph_module.graph.inserting_before(node):
                    new = _Recorded(graph_module.graph).read(node)
                if new is not None:
                    node.replace_all_uses_with(new)
                    graph_module.graph.erase_node(node)


class _Unreadable(Exception):
    pass


class _Recorded(TorchFunctionMode):
    """Writes into a graph what is called of PyTorch with values that are known there."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph, self.made, self.known = graph, [], []  # known: (value, node); values are kept, so that none takes another's place

    def read(self, call: Node) -> Node | None:
        for x in call.all_input_nodes:
            self.known.append((value(x), x))
        given = map_arg((call.args, call.kwargs), value)
        try:
            with self:
                out = call.target(*given[0], **given[1])
            return self.node(out)
        except _Unreadable:
            for node in reversed(self.made):
                self.graph.erase_node(node)
            return None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not isinstance(out, torch.Tensor) or name == "__get__" or any(out is v for v, _ in self.known):
            return out
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        args, kwargs = self.written(args, x, name), self.written(kwargs, x, name)
        method = getattr(torch.Tensor, name, None) is func
        node = self.graph.call_method(name, args, kwargs) if method else self.graph.call_function(func, args, kwargs)
        node.meta["example_value"] = out
        self.made.append(node)
        self.known.append((out, node))
        return out

    def node(self, x: torch.Tensor) -> Node:
        found = next((n for v, n in self.known if v is x), None)
        if found is None:
            raise _Unreadable
        return found

    def written(self, given, x: torch.Tensor | None, name: str):
        """Arguments with nodes for tensors, and for sizes that are not known: those of ``x``, or what is left to be inferred."""
        if isinstance(given, torch.Tensor):
            return self.node(given)
        if isinstance(given, dict):
            return {key: self.written(v, x, name) for key, v in given.items()}
        if not isinstance(given, (tuple, list)):
            if isinstance(given, torch.SymInt):
                raise _Unreadable
            return given
        if not any(isinstance(v, torch.SymInt) for v in given):
            return type(given)(self.written(v, x, name) for v in given)
        if name == "expand":  # what is a size of x before it is the same after it
            return type(given)(-1 if isinstance(v, torch.SymInt) else v for v in given)
        if name not in ("reshape", "view") or x is None:
            raise _Unreadable
        return type(given)(self.sizes(list(given), x))

    def sizes(self, sizes: list, x: torch.Tensor) -> list:
        free = [i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
        for i in free[1:]:
            dim = next((d for d, size in enumerate(x.shape) if isinstance(size, torch.SymInt) and expression(size) == expression(sizes[i])), None)
            if dim is None:
                raise _Unreadable
            node = self.graph.call_method("size", (self.node(x), dim))
            node.meta["example_value"] = x.shape[dim]
            self.made.append(node)
            sizes[i] = node
        sizes[free[0]] = -1
        return sizes

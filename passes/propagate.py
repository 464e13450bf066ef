"""Shapes for a changed graph: run it on fake tensors and store every node's result as its example value.

After each pass most of a graph is as it was. A node whose operator and operands are those of the last run keeps its
result, and a node that is run again keeps its old result if the new one looks alike, so that what follows it is not run
either: of 54 blocks only those are that the pass touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from li_compile.patterns._compat import faking
from li_compile.patterns.graph import REGION, all_graphs, name_of, subgraphs

from .regions import drop_dead

LAST = "li_last_run"
SYMBOL = re.compile(r"\b[su]\d+\b")
# Methods that change the shape of what they are given: results that were kept would be changed twice.
RESHAPING = {"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "resize_", "resize_as_", "set_", "as_strided_"}


class _Propagate(Interpreter):
    def __init__(self, module: GraphModule, mode) -> None:
        super().__init__(module)
        self.mode = mode
        self.regions: dict[tuple, object] = {}
        self.keeps = not any(name_of(n) in RESHAPING for n in module.graph.nodes if n.op in ("call_function", "call_method"))
        self.mapped = 0  # torch.func.vmap's that are open: what is inside them (how block masks are made) keeps its values

    def run_node(self, n: Node):
        name = getattr(n.target, "__name__", "")
        self.mapped += name == "_vmap_increment_nesting"
        inside = self.mapped > 0
        self.mapped -= name == "_vmap_decrement_nesting"
        if inside:
            return n.meta.get("example_value")
        if n.op not in ("call_function", "call_method") or n.target is REGION or not self.keeps:
            result = super().run_node(n)
        else:
            # With the mode: what is made of numbers alone would otherwise stay in the mode that the graph was traced in.
            now = (self.mode, n.target, *self.fetch_args_kwargs_from_env(n), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
            before, result = n.meta.get(LAST, (None, None))
            if before is None or not _same(before, now):
                result = _kept(result, super().run_node(n))
            if isinstance(result, (torch.Tensor, tuple, list)):  # others, such as entering autocast, are done for their effect
                n.meta[LAST] = now, result
        n.meta["example_value"] = result
        n.meta.pop("val", None)
        return result

    def call_function(self, target, args, kwargs):
        if target is REGION:  # walk the region itself, so that its nodes get shapes too; once, as all calls are alike
            text, own = _renamed([layout(x) for x in args[2:]])
            key = (args[0], text)
            if key not in self.regions or not _fits(*self.regions[key], own):
                self.regions[key] = _Propagate(args[0], self.mode).run(*args[2:]), own
            return self.regions[key][0]
        return super().call_function(target, args, kwargs)


def _renamed(layouts) -> tuple[str, list[str]]:
    """Layouts as text, symbols of sizes numbered as they come (each block's cache has its own), and what those are."""
    text = str(layouts)
    names = list(dict.fromkeys(SYMBOL.findall(text)))
    return SYMBOL.sub(lambda found: f"size {names.index(found[0])}", text), names


def _fits(result, names: list[str], own: list[str]) -> bool:
    """Whether what a region gave for sizes of some names is what it gives for others: their names do not occur in it."""
    return names == own or not set(names) & set(SYMBOL.findall(str([layout(x) for x in tree_leaves(result)])))


def _same(a, b) -> bool:
    """Whether two operands are one: fake tensors and symbolic numbers by identity, all else by value."""
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, slice):
        return isinstance(b, slice) and _same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return a is b
    return a is b or (type(a) is type(b) and a == b)


def _kept(old, new):
    """old where it stands for the same as new, tensor by tensor; else new."""
    if isinstance(new, (tuple, list)) and type(old) is type(new) and len(old) == len(new):
        kept = [_kept(a, b) for a, b in zip(old, new)]
        return kept if isinstance(new, list) else tuple(kept) if type(new) is tuple else new
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return new
    whose = [getattr(x, "fake_mode", None) for x in (old, new)]  # one of two modes must not meet the other's tensors
    numbers = (*new.shape, *new.stride(), new.storage_offset())
    alike = whose[0] is whose[1] and all(isinstance(n, int) for n in numbers) and old.storage_offset() == new.storage_offset()
    return old if alike and layout(old) == layout(new) else new


def layout(x) -> tuple:
    """Shape, strides, dtype and device of a tensor; anything else as it is."""
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else (x,)


def propagate(module: GraphModule, inputs: Sequence, mode) -> None:
    """Set ``example_value`` on all nodes of a graph and its regions.

    inputs: fake tensors of ``mode`` (a FakeTensorMode) and ints or SymInts, one a placeholder. Raises whatever an
    operator says of shapes that do not fit: a rewrite that broke the graph is found here.
    """
    with faking(mode):
        _Propagate(module, mode).run(*inputs)


def tidy(module: GraphModule) -> None:
    """Remove dead nodes and regions that are no longer called; check and recompile the graph."""
    for graph_module in all_graphs(module):
        drop_dead(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
    called = set(subgraphs(module))
    for name, child in list(module.named_children()):
        if isinstance(child, GraphModule) and name not in called:
            delattr(module, name)

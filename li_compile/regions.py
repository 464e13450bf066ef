"""Lowering of a graph whose sampling loop became regions: each is compiled once, whatever variant calls it, and how often.

The graph around them, the scheduler's arithmetic on tensors of the state's size, runs as it stands.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from li_compile import _compat
from li_compile.passes.gated_steps import inline_regions
from li_compile.passes.regions import hand_in_sizes
from li_compile.passes.repeated_blocks import PREFIX
from li_compile.passes.share_steps import shared_regions
from li_compile.patterns.graph import REGION, region_calls, subgraphs, value

Lower = Callable[[GraphModule, Sequence[Any]], Callable]


class CompiledRegion(torch.nn.Module):
    """A compiled region in the place of its graph."""

    def __init__(self, name: str, run: Callable) -> None:
        super().__init__()
        self.name, self.run = name, run

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def lower_regions(module: GraphModule, inputs: Sequence[Any], lower: Lower, done: dict[str, Callable]) -> Callable:
    """Compile a graph by its shared regions, or as a whole if it has none.

    module: as ``pipeline.build`` gives it, with shapes on its nodes. inputs: its inputs, real or fake. done: regions of
    this graph's other variants that are compiled already, by name; those compiled here are added.
    """
    names = shared_regions(module)
    if not names:
        hand_in_sizes(module)
        return _lower(module, inputs, lower)
    outer = copy.deepcopy(module)
    hand_in_sizes(outer)
    for name in names:
        if name not in done:
            region = copy.deepcopy(getattr(outer, name))  # of which compiling may change what another region calls too
            region.meta |= module.meta
            done[name] = _lower(region, [value(x) for x in region_calls(outer, name)[0].args[2:]], lower)
        delattr(outer, name)
        outer.add_submodule(name, CompiledRegion(name, done[name]))
    for node in list(outer.graph.nodes):
        if node.target is REGION:
            with outer.graph.inserting_before(node):
                node.replace_all_uses_with(outer.graph.call_module(node.args[0].target, node.args[2:]))
            outer.graph.erase_node(node)
    outer.graph.eliminate_dead_code(is_impure_node=lambda n: n.op != "get_attr")
    outer.recompile()
    return outer


def _lower(module: GraphModule, inputs: Sequence[Any], lower: Lower) -> Callable:
    """Compile a graph; where that fails with our regions of repeated blocks in it, without: Inductor changes strides between its own
    passes, and then refuses a region whose calls were alike before."""
    if not any(name.startswith(PREFIX) for name in subgraphs(module)):
        return lower(_compat.as_traced(module), inputs)
    flat = copy.deepcopy(module)
    try:
        return lower(_compat.as_traced(module), inputs)
    except Exception as error:
        warnings.warn(f"Inductor cannot compile repeated blocks as regions here ({type(error).__name__}: {str(error).splitlines()[0]}); they "
                      "are compiled one by one, which takes longer (exact.repeated_blocks=False says so from the start)", stacklevel=2)
        inline_regions(flat)
        return lower(_compat.as_traced(flat), inputs)

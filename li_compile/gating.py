"""A sampling function as one exportable module that takes, beside its inputs, whether to reuse steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from li_compile.config import Config
from li_compile.errors import ExportError
from li_compile.passes.gated_steps import gated_steps, inline_regions
from li_compile.passes.propagate import tidy
from li_compile.passes.record import Refused
from li_compile.patterns import find_loop
from li_compile.patterns.graph import placeholders, value
from li_compile.pipeline import canonical
from li_compile.reuse import skipping


class GatedChunk(torch.nn.Module):
    """``forward(reuse, *args, **kwargs)``: what the original computes of args; with reuse true, steps are skipped.

    reuse: a bool tensor of no dimensions. A plain module of ATen operators and ``torch.cond``, to be exported as any other.
    """

    def __init__(self, program: torch.export.ExportedProgram, graph: GraphModule) -> None:
        super().__init__()
        self.graph_module, self._spec = graph, program.call_spec
        self._names: list[str | None] = []
        for spec in program.graph_signature.input_specs:
            user = spec.kind is torch.export.graph_signature.InputKind.USER_INPUT
            self._names.append(None if user else spec.target.replace(".", "_"))
            if not user:
                tensor = {**program.state_dict, **program.constants}[spec.target]
                self.register_buffer(self._names[-1], tensor.detach())

    def forward(self, reuse: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = iter(pytree.tree_leaves((args, kwargs)))
        inputs = [next(given) if name is None else getattr(self, name) for name in self._names]
        return pytree.tree_unflatten(self.graph_module(*inputs, reuse), self._spec.out_spec)


def gated(fn: Callable[..., Any] | torch.nn.Module, *args: Any, config: Config | None = None, **kwargs: Any) -> GatedChunk:
    """Trace a sampling function with these inputs and make reuse of its steps an input (``torch.cond``).

    fn: a module or a function of tensors that holds the whole sampling loop. config: its ``cache`` part says which steps
    are skipped and what stands in; gate, threshold and guard are for whoever calls.

    For export, where one graph has to do both. Where Python calls, compile with the backend instead: two variants chosen
    on the host cost no condition on the device.

    Raises ExportError: torch.export cannot trace fn, or there is no loop in it whose steps can be skipped.
    """
    module = fn if isinstance(fn, torch.nn.Module) else _AsModule(fn)
    try:
        program = torch.export.export(module, args, kwargs, strict=True)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace {getattr(fn, '__name__', type(fn).__name__)}: {error}") from error
    # Without regions first: two calls of one region with other operands are then compared node by node.
    fakes = [value(p) for p in placeholders(program.graph)]
    graph = canonical(program.graph_module, fakes)
    inline_regions(graph)
    loop, misses = find_loop(graph)
    if loop is None:
        raise ExportError(f"no denoising loop was found: {misses[0].reason} ({misses[0].node} {misses[0].where})")
    try:
        gated_steps(graph, loop, skipping(loop.steps, Config() if config is None else config))
    except Refused as why:
        raise ExportError(f"steps cannot be skipped: {why.miss.reason} ({why.miss.node} {why.miss.where})") from None
    tidy(graph)
    return GatedChunk(program, graph)


class _AsModule(torch.nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        for i, cell in enumerate(getattr(fn, "__closure__", None) or ()):
            if isinstance(cell.cell_contents, torch.nn.Module):
                self.add_module(f"closure_{i}", cell.cell_contents)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

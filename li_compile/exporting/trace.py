"""A function or module as one ATen graph with ``torch.export``, and what is known of its inputs and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from li_compile import _compat
from li_compile.config import Config
from li_compile.errors import ExportError
from li_compile.patterns.graph import placeholders, value
from li_compile.pipeline import Facts, canonical, constant_lengths, match


@dataclasses.dataclass
class Traced:
    """One way in which a model is called. weights: placeholder -> name of a weight; tensors: these by name. inputs: names of
    the other placeholders, in order. tree_in, tree_out: pytree specs of (args, kwargs) and of the result."""

    facts: Facts
    fakes: list[Any]
    weights: dict[str, str]
    tensors: dict[str, torch.Tensor]
    inputs: list[str]
    tree_in: pytree.TreeSpec
    tree_out: pytree.TreeSpec


def trace(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], config: Config) -> Traced:
    """Trace and match. The number of context frames becomes a dynamic size, if it is one at all: where the user did not mark
    it (``torch._dynamo.mark_dynamic``), a first trace finds it. Raises ExportError where torch.export cannot trace."""
    leaves = pytree.tree_leaves((args, kwargs))
    marked = [_compat.marked_dims(x) if config.context.enabled else [] for x in leaves]  # else all sizes are constants
    traced = _trace(model, args, kwargs, marked, config)
    lengths = constant_lengths(traced.facts)
    if any(marked) or not lengths or not config.context.enabled or traced.facts.context is not None:
        return traced
    marked = [[d for d, size in enumerate(x.shape) if size in lengths] if isinstance(x, torch.Tensor) else [] for x in leaves]
    return _trace(model, args, kwargs, marked, config)


def _trace(model, args: tuple, kwargs: dict, marked: list[list[int]], config: Config) -> Traced:
    module = model if isinstance(model, torch.nn.Module) else AsModule(model)
    auto = iter({d: torch.export.Dim.AUTO for d in dims} for dims in marked)
    sizes = torch.export.ShapesCollection()
    # Copies of one tensor each: an input given twice would become one, and marks of the user's are not torch.export's.
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().view_as(x), (args, kwargs))
    for leaf in pytree.tree_leaves((args, kwargs)):
        if (dims := next(auto)):
            sizes[leaf] = dims
    try:
        with torch.no_grad(), _compat.spelled_out(module, kwargs):
            dynamic = sizes.dynamic_shapes(module, args, kwargs) if any(marked) else None
            program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=True)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace {_name(model)}: {error}") from error
    _numbers(program)
    kind = torch.export.graph_signature.InputKind
    for node, spec in zip(placeholders(program.graph), program.graph_signature.input_specs):
        node.type = torch.nn.Parameter if spec.kind is kind.PARAMETER else node.type
    fakes = [value(p) for p in placeholders(program.graph)]
    facts = match(canonical(program.graph_module, fakes, config), config)
    weights, tensors, inputs = {}, {}, []
    for node, spec in zip(placeholders(facts.module.graph), program.graph_signature.input_specs):
        if spec.kind is kind.USER_INPUT:
            inputs.append(node.name)
            continue
        if spec.kind not in (kind.PARAMETER, kind.BUFFER, kind.CONSTANT_TENSOR):
            raise ExportError(f"{_name(model)} holds {spec.target} ({spec.kind.name.lower()}), which is no tensor and cannot be exported")
        weights[node.name] = spec.target
        tensors[spec.target] = {**program.state_dict, **program.constants}[spec.target].detach()
    spec = program.call_spec
    return Traced(facts, fakes, weights, tensors, inputs, spec.in_spec, spec.out_spec)


def _numbers(program: torch.export.ExportedProgram) -> None:
    """Numbers that torch.export lifted out of writes, as constants of the trace or of a nested region, become numbers again, as in Dynamo's
    graphs."""
    aten, kind = torch.ops.aten, torch.export.graph_signature.InputKind
    lifted = {s.arg.name: program.constants[s.target] for s in program.graph_signature.input_specs if s.kind is kind.CONSTANT_TENSOR}
    for module in (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)):
        whole = module is program.graph_module
        for node in module.graph.find_nodes(op="call_function", target=aten.fill_.Tensor):
            given = node.args[1]
            held = given.args[0] if given.target is aten.lift_fresh_copy.default else given
            number = lifted.get(held.name) if whole else getattr(module, held.target) if held.op == "get_attr" else None
            if number is not None and number.dim() == 0:
                node.target, node.args = aten.fill_.Scalar, (node.args[0], number.item())
                for unread in (given, held):
                    if unread.op != "placeholder" and not unread.users:
                        module.graph.erase_node(unread)
        module.recompile()


class AsModule(torch.nn.Module):
    """A function with the modules that it closes over, so that their weights are found."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        for i, cell in enumerate(getattr(fn, "__closure__", None) or ()):
            if isinstance(cell.cell_contents, torch.nn.Module):
                self.add_module(f"closure_{i}", cell.cell_contents)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def _name(model) -> str:
    return getattr(model, "__name__", type(model).__name__)

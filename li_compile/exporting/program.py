"""From a rewritten graph to an exported program: functional, with its weights as inputs or as constants.

Weights as inputs, so that all variants share one file of them. What the graph writes to, a buffer or a tensor that it was given, becomes
a result as well (``Argument.cache``): nothing is mutated, and the runner hands the result back in at the next call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node

from li_compile.errors import ExportError
from li_compile.exporting import branches
from li_compile.exporting.trace import Traced
from li_compile.exporting.variants import Variant
from li_compile.patterns.graph import placeholders, value

FRAMES, EARLIER, REUSE = "context.frames", "earlier.{}.{}", "reuse"
HELD = "held_"


@dataclasses.dataclass(frozen=True)
class Argument:
    """One input of a program, in order. name: of a weight, or of an input; cache: its new value is a result."""

    name: str
    weight: bool = False
    cache: bool = False


@dataclasses.dataclass
class Program:
    """exported: flat tensors in and out, in the order of arguments; results first, then the caches' new values. fixed: buffer of the
    program -> the weight that it is."""

    exported: ExportedProgram
    arguments: list[Argument]
    results: int
    fixed: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def caches(self) -> list[str]:
        return [a.name for a in self.arguments if a.cache]


def make_program(traced: Traced, variant: Variant) -> Program:
    """Export a variant with its weights as inputs. Raises ExportError where torch.export refuses the graph."""
    graph = variant.graph
    nodes = [p for p in placeholders(graph.graph)]
    arguments = [Argument(traced.weights.get(p.name) or _name_of(p, traced), p.name in traced.weights) for p in nodes]
    example = [traced.tensors[a.name] if a.weight else example_of(value(p)) for a, p in zip(arguments, nodes)]
    output = graph.graph.output_node()
    output.args = (tuple(output.args[0]),)
    graph.recompile()
    exported = _export(graph, example)
    written = {s.target: i for i, s in enumerate(exported.graph_signature.output_specs)
               if s.kind in (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION)}
    results = len(exported.graph_signature.output_specs) - len(written)
    if written:
        names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        if (own := sorted(set(written) - set(names))):
            raise ExportError(f"the graph writes to {', '.join(own)}, which it holds itself; give it as an input or a buffer")
        arguments = [dataclasses.replace(a, cache=n in written) for a, n in zip(arguments, names)]
        functional = bound(exported, {})
        outputs = functional.graph.output_node()
        flat = list(outputs.args[0])
        # Results first, then the caches in the order of the arguments.
        outputs.args = ((*flat[len(written):], *(flat[written[n]] for n in names if n in written)),)
        functional.recompile()
        exported = _export(functional, example)
    return Program(exported, arguments, results)


def bound(exported: ExportedProgram, values: Mapping[str, torch.Tensor]) -> GraphModule:
    """The graph of a program with the inputs of these names, and all of its constants, held as buffers."""
    new, made, fixed = torch.fx.Graph(), {}, {}
    held = {**exported.state_dict, **exported.constants}
    specs = {s.arg.name: s for s in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        tensor = None if spec is None else values.get(node.name) if spec.kind is InputKind.USER_INPUT else held[spec.target]
        if tensor is None:
            made[node] = new.node_copy(node, made.__getitem__)
            continue
        name = HELD + node.name
        fixed[name] = tensor
        made[node] = new.get_attr(name)
        made[node].meta = dict(node.meta)
    nested = {n.target: getattr(exported.graph_module, n.target) for n in new.nodes if n.op == "get_attr" and n.target not in fixed}
    return torch.fx.GraphModule(fixed | nested, new)


def bind_weights(program: Program, tensors: Mapping[str, torch.Tensor]) -> Program:
    """The same program with its weights as constants; caches stay inputs."""
    names = [s.arg.name for s in program.exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    fixed = {n: a.name for n, a in zip(names, program.arguments) if a.weight and not a.cache}
    module = bound(program.exported, {n: tensors[name] for n, name in fixed.items()})
    nodes = placeholders(module.graph)
    left = [a for n, a in zip(names, program.arguments) if n not in fixed]
    for node, argument in zip(nodes, left):  # targets name their inputs after these
        node.target = node.name = _plain(argument.name)
    module.recompile()
    return Program(_export(module, [example_of(value(p)) for p in nodes]), left, program.results,
                   {HELD + n: name for n, name in fixed.items()})


def _export(graph: GraphModule, example: Sequence[Any]) -> ExportedProgram:
    """With operators that mutate only where one has to be undone: that costs a second trace."""
    for node in graph.graph.nodes:  # where each node was traced from is most of what a saved program holds
        node.meta = {k: v for k, v in node.meta.items() if k in ("example_value", "val", "li_earlier", "li_extra")}
    try:
        with torch.no_grad():
            exported = torch.export.export(graph, tuple(example), strict=False)
            if branches.in_branches(exported.graph_module):
                branches.lift(lifted := bound(exported, {}))
                exported = torch.export.export(lifted, tuple(example), strict=False)
            mutable = any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in exported.graph.nodes)
            return exported.run_decompositions({}) if mutable else exported
    except Exception as error:
        raise ExportError(f"torch.export refuses a rewritten graph: {type(error).__name__}: {error}") from error


def _name_of(node: Node, traced: Traced) -> str:
    if node.name in traced.inputs:
        return node.name
    if "li_earlier" in node.meta:
        return EARLIER.format(*node.meta["li_earlier"])
    return REUSE if node.name == "reuse" else FRAMES


def example_of(fake: Any) -> Any:
    if not isinstance(fake, torch.Tensor):
        return fake
    real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    return real.zero_()


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


__all__ = ["EARLIER", "FRAMES", "REUSE", "Argument", "Program", "bind_weights", "bound", "example_of", "make_program"]

"""TensorRT engines, through Torch-TensorRT: one engine a variant, or engines with PyTorch segments between them.

Which TensorRT, is which distribution is installed: ``torch-tensorrt-rtx`` (TensorRT-RTX, the extra ``[tensorrt-rtx]``) or ``torch-tensorrt`` (the extra
``[tensorrt]``). Engines hold their own weights, and run only with the version of TensorRT that built them.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch.fx import GraphModule, Node

from li_compile import _compat
from li_compile.errors import BackendUnavailable, ExportError
from li_compile.exporting import branches
from li_compile.exporting.manifest import VariantEntry
from li_compile.exporting.program import Program, bound, example_of
from li_compile.patterns.binding import bind
from li_compile.patterns.graph import placeholders, value

PACKAGES = ("torch-tensorrt-rtx", "torch-tensorrt", "tensorrt-rtx", "tensorrt")
TIED = ("tensorrt-rtx", "tensorrt")
FIXED = True
HOLDS_WEIGHTS = True


def installed() -> dict[str, str]:
    """Distribution -> version, of those that provide torch_tensorrt."""
    found = {}
    for name in PACKAGES[:2]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def unavailable() -> str | None:
    found = installed()
    if not found or importlib.util.find_spec("torch_tensorrt") is None:
        return ("TensorRT export needs Torch-TensorRT: pip install 'li_compile[tensorrt-rtx]' (TensorRT-RTX) or 'li_compile[tensorrt]' (TensorRT for "
                "data-centre GPUs); one of the two, never both")
    if len(found) > 1:
        return f"{' and '.join(found)} are both installed, and both are the module torch_tensorrt: pip uninstall one, and reinstall the other"
    (name, version), = found.items()
    minor = ".".join(torch.__version__.split(".")[:2])
    if version.split(".")[:2] != minor.split("."):
        return f"{name} {version} is not for torch {torch.__version__}: pip install '{name}=={minor}.*'"
    if not torch.cuda.is_available():
        return ("building TensorRT engines needs an NVIDIA driver, and PyTorch finds none; li_compile.export_report and the other targets do not need "
                "one")
    return None


def write(program: Program, folder: pathlib.Path, name: str, aliases: dict[str, str], note: Callable[[str], None]) -> dict[str, Any]:
    torch_tensorrt = _imported()
    from li_compile.exporting.targets import tensorrt_plugin
    from li_compile.exporting.targets.tensorrt_cond import register_cond

    register_cond()
    if any(n.target is tensorrt_plugin.OPERATOR for m in program.exported.graph_module.modules() if isinstance(m, GraphModule) for n in m.graph.nodes):
        tensorrt_plugin.register_plugin()
    exported, dropped, constants = _tensors_alone(program.exported)
    _respell(exported.graph_module)
    names = exported.graph_signature.user_inputs
    fakes = [value(n) for n in exported.graph.nodes if n.op == "placeholder" and n.name in names]
    if (numbers := [n for n, f in zip(names, fakes) if not isinstance(f, torch.Tensor)]):
        raise ExportError(f"inputs {', '.join(map(str, numbers))} are numbers, which an engine does not take; give tensors, or close over them")
    note(f"{name}: engines")
    try:
        graph = torch_tensorrt.dynamo.compile(
            exported, arg_inputs=[torch_tensorrt.Input(tuple(f.shape), dtype=f.dtype) for f in fakes], device=torch.device("cuda:0"),
            **_compat.tensorrt_settings(torch_tensorrt.__version__))
    except Exception as error:
        raise ExportError(f"Torch-TensorRT cannot build {name}: {type(error).__name__}: {error}") from error
    parts = _segments(graph, folder, name)
    for i in dropped:
        parts["inputs"].insert(i, None)
    for i in constants:
        parts["outputs"].insert(i, None)
    return parts | {"constants": {str(i): constant for i, constant in constants.items()}}


def _tensors_alone(exported: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, list[int], dict[int, Any]]:
    """A program without what an engine neither takes nor gives: inputs that are constants, which nothing reads, by their positions; and results
    that are no tensors, with these by theirs."""
    module = bound(exported, {})
    output = next(n for n in module.graph.nodes if n.op == "output")
    constants = {i: r for i, r in enumerate(output.args[0]) if not isinstance(r, Node)}
    dropped = [i for i, n in enumerate(placeholders(module.graph)) if not n.users and not isinstance(value(n), torch.Tensor)]
    if not constants and not dropped:
        return exported, [], {}
    output.args = (tuple(r for r in output.args[0] if isinstance(r, Node)),)
    for node in [n for i, n in enumerate(placeholders(module.graph)) if i in dropped]:
        module.graph.erase_node(node)
    module.recompile()
    with torch.no_grad():
        return torch.export.export(module, tuple(example_of(value(n)) for n in placeholders(module.graph)), strict=False), dropped, constants


def _respell(module: GraphModule) -> None:
    """In place, what Torch-TensorRT 2.11 cannot take as it is. Views become reshapes: they were traced with the memory layout that PyTorch's
    attention gives its result, and are traced again with attention written out, whose result lies differently. Writes into a part of a tensor
    become concatenations: of its own, by scattering, the rank is not known. What Torch-TensorRT's passes do for a graph and not for a
    condition's branches is done here for these: RMSNorm would stay CUDA's own operator, and of attention as one layer (2.14) no engine is built."""
    branches.hoist(module)
    aten = torch.ops.aten
    for owner in (m for m in module.modules() if isinstance(m, GraphModule)):
        graph = owner.graph
        for node in list(graph.nodes):
            if node.target is aten.view.default:
                node.target = aten.reshape.default
            elif owner is not module and node.target in WRITTEN_OUT:
                with graph.inserting_before(node):
                    made = WRITTEN_OUT[node.target](lambda target, *args, **kwargs: graph.call_function(target, args, kwargs), node)
                if made is not node:
                    _replace(node, made)
            elif node.target in (aten.slice_scatter.default, aten.select_scatter.default):
                arguments, _ = bind(node)
                x, part, dim = arguments["input" if "input" in arguments else "self"], arguments["src"], arguments["dim"]
                size = value(x).shape[dim]
                if node.target is aten.select_scatter.default:
                    start, step = arguments["index"] % size, 1
                    end = start + 1
                else:
                    start, end, step = slice(arguments["start"], arguments["end"], arguments["step"]).indices(size)
                if step != 1:
                    continue
                with graph.inserting_before(node):
                    if node.target is aten.select_scatter.default:
                        part = graph.call_function(aten.unsqueeze.default, (part, dim))
                    around = [graph.call_function(aten.slice.Tensor, (x, dim, *ends)) if ends[0] < ends[1] else None for ends in ((0, start), (end, size))]
                    made = graph.call_function(aten.cat.default, ([n for n in (around[0], part, around[1]) if n is not None], dim))
                _replace(node, made)
        owner.recompile()


def _norm_written_out(call: Callable[..., Node], node: Node) -> Node:
    """RMSNorm in other operators, in fp32 for half precision, as PyTorch computes it."""
    aten, (given, _), dtype = torch.ops.aten, bind(node), value(node).dtype
    wide = torch.promote_types(dtype, torch.float32)
    eps = torch.finfo(wide).eps if given["eps"] is None else given["eps"]
    x = call(aten._to_copy.default, given["input"], dtype=wide)
    mean = call(aten.mean.dim, call(aten.mul.Tensor, x, x), [-1 - i for i in range(len(given["normalized_shape"]))], True)
    made = call(aten.mul.Tensor, x, call(aten.rsqrt.default, call(aten.add.Tensor, mean, eps)))
    if given["weight"] is not None:
        made = call(aten.mul.Tensor, made, call(aten._to_copy.default, given["weight"], dtype=wide))
    return call(aten._to_copy.default, made, dtype=dtype)


def _attention_written_out(call: Callable[..., Node], node: Node) -> Node:
    """Attention in products and a softmax; where it is causal, grouped or drops out it stays. Queries that may read no key get the mean of
    all, where PyTorch gives 0."""
    aten, (given, _) = torch.ops.aten, bind(node)
    if given["is_causal"] or given["enable_gqa"] or given["dropout_p"]:
        return node
    query, mask = value(given["query"]), given["attn_mask"]
    scale = query.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    scores = call(aten.matmul.default, call(aten.mul.Tensor, given["query"], scale), call(aten.transpose.int, given["key"], -2, -1))
    if mask is not None:
        if value(mask).dtype == torch.bool:
            hidden = call(aten._to_copy.default, call(aten.logical_not.default, mask), dtype=query.dtype)
            mask = call(aten.mul.Tensor, hidden, torch.finfo(query.dtype).min / 2)
        scores = call(aten.add.Tensor, scores, mask)
    return call(aten.matmul.default, call(aten.softmax.int, scores, -1), given["value"])


def _replace(node: Node, made: Node) -> None:
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


WRITTEN_OUT = {torch.ops.aten.rms_norm.default: _norm_written_out, torch.ops.aten.scaled_dot_product_attention.default: _attention_written_out}


def _imported():
    try:
        import torch_tensorrt
    except Exception as error:  # a driver or library that is missing shows as whatever it pleases
        raise BackendUnavailable(f"torch_tensorrt is installed and cannot be imported: {type(error).__name__}: {error}. It needs an NVIDIA driver and "
                                 "the TensorRT libraries of its own version; li_compile.export_report and the other targets do not") from error
    return torch_tensorrt


def _segments(graph: GraphModule, folder: pathlib.Path, name: str) -> dict[str, Any]:
    """Write what Torch-TensorRT made. segments: in the order in which they run; inputs, outputs: values by name, handed on."""
    segments, left, alias = [], [], {}
    call = lambda n: n.op == "call_module"
    known = lambda n: alias.get(n.name, n.name)
    for node in graph.graph.nodes:
        if call(node):
            child = getattr(graph, node.target)
            users = {u.args[1]: u for u in node.users if u.op == "call_function"}
            engine = getattr(child, "serialized_engine", None)
            row: dict[str, Any] = {"inputs": [known(a) for a in node.args]}
            if engine is not None:
                file = folder / f"{name}_{len(segments)}.engine"
                file.write_bytes(engine)
                count = len(child.output_binding_names)
                row |= {"engine": file.name, "bindings": [list(child.input_binding_names), list(child.output_binding_names)]}
            else:
                file, count, ours = folder / f"{name}_{len(segments)}.pt2", *_torch_segment(child, node, folder / f"{name}_{len(segments)}.pt2")
                row |= {"program": file.name, "operators": ours}
                left += ours
            single = count == 1 and not users
            row["outputs"] = [node.name if single else f"{node.name}.{i}" for i in range(count)]
            alias |= {u.name: f"{node.name}.{i}" for i, u in users.items()}
            segments.append(row)
        elif node.op not in ("placeholder", "output") and node.name not in alias:
            raise ExportError(f"Torch-TensorRT left {node.target} outside of all segments of {name}; report this with the graph")
    results = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    inputs = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    return {"inputs": inputs, "outputs": [known(r) for r in (results if isinstance(results, (tuple, list)) else [results])], "segments": segments,
            "left_to_pytorch": sorted(set(left))}


def _torch_segment(child: GraphModule, call: Node, file: pathlib.Path) -> tuple[int, list[str]]:
    """Save a segment that runs in PyTorch: (number of its outputs, the operators in it)."""
    example = [torch.zeros(f.shape, dtype=f.dtype, device=f.device) for f in (value(p) for p in child.graph.nodes if p.op == "placeholder")]
    with torch.no_grad():
        exported = torch.export.export(child, tuple(example), strict=False)
    exported._example_inputs = None
    torch.export.save(exported, file)
    ours = sorted({str(n.target._schema.name) for n in exported.graph.nodes if isinstance(n.target, torch._ops.OpOverload)})
    return len(next(n for n in exported.graph.nodes if n.op == "output").args[0]), ours


def open_variant(folder: pathlib.Path, entry: VariantEntry, device: torch.device) -> Callable[..., Any]:
    from li_compile.engine import Engine

    parts, caches = entry.parts, {o for o, t in zip(entry.parts["outputs"], entry.outputs) if t.name.startswith("cache.")}
    opened = []
    for row in parts["segments"]:
        if "engine" in row:
            taking_turns = [b for b, out in zip(row["bindings"][1], row["outputs"]) if out in caches]
            opened.append(Engine((folder / row["engine"]).read_bytes(), *row["bindings"], taking_turns))
        else:
            opened.append(bound(torch.export.load(folder / row["program"]), {}))

    def run(*values: Any) -> list[torch.Tensor]:
        held = dict(zip(parts["inputs"], values))
        for row, segment in zip(parts["segments"], opened):
            out = segment(*(held[n] for n in row["inputs"]))
            held |= dict(zip(row["outputs"], out if isinstance(out, (tuple, list)) else [out]))
        return [parts["constants"][str(i)] if n is None else held[n] for i, n in enumerate(parts["outputs"])]

    return run

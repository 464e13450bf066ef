"""ONNX, by way of ``torch.onnx.export(dynamo=True)``: standard operators, with If for gates, or our operators in a domain of their own.

All variants read their weights from the artifact's one safetensors file, as ONNX external data.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import torch

from li_compile.errors import ArtifactError
from li_compile.exporting import weights
from li_compile.exporting.manifest import VariantEntry
from li_compile.exporting.program import Program
from li_compile.kernels.layout import laid_out

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TIED: tuple[str, ...] = ()
FIXED = True
HOLDS_WEIGHTS = False
DOMAIN = "li_compile"


def unavailable() -> str | None:
    missing = [p for p in ("onnx", "onnxscript") if importlib.util.find_spec(p) is None]
    return f"ONNX export needs {' and '.join(missing)}: pip install 'li_compile[onnx]'" if missing else None


def write(program: Program, folder: pathlib.Path, name: str, aliases: dict[str, str], note: Callable[[str], None]) -> dict[str, Any]:
    import onnx
    import onnx_ir

    made = torch.onnx.export(program.exported, dynamo=True, verbose=False, optimize=True).model
    start, header = _safetensors(folder / weights.FILE)
    for initializer in made.graph.initializers.values():
        held = program.fixed.get(initializer.name)
        held = header.get(aliases.get(held, held))
        if held is not None:
            first, last = held["data_offsets"]
            initializer.const_value = onnx_ir.ExternalTensor(weights.FILE, start + first, last - first, initializer.dtype,
                                                             shape=initializer.shape, name=initializer.name, base_dir=folder)
    file = folder / f"{name}.onnx"
    onnx_ir.save(made, file)
    onnx.checker.check_model(str(file))
    counts: dict[str, int] = {}
    for node in made.graph.all_nodes():
        kind = node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
        counts[kind] = counts.get(kind, 0) + 1
    return {"model": file.name, "inputs": [i.name for i in made.graph.inputs], "outputs": [o.name for o in made.graph.outputs],
            "operators": dict(sorted(counts.items()))}


def open_variant(folder: pathlib.Path, entry: VariantEntry, device: torch.device) -> Callable[..., Any]:
    if (ours := [o for o in entry.parts["operators"] if o.startswith(f"{DOMAIN}::")]):
        raise ArtifactError(f"{entry.parts['model']} holds {', '.join(ours)}, which ONNX Runtime does not have; run it in a runtime with an "
                            "implementation of them, or export with sparse='native'")
    try:
        import onnxruntime
    except ImportError:
        raise ArtifactError("running an ONNX artifact here needs ONNX Runtime: pip install onnxruntime") from None
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # of what it cannot fold, it would tell node by node
    session = onnxruntime.InferenceSession(str(folder / entry.parts["model"]), options, providers=[*wanted, "CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*values: Any) -> list[torch.Tensor]:
        given = [x.detach().cpu().numpy() for x in values if isinstance(x, torch.Tensor)]
        return [torch.from_numpy(x).to(device) for x in session.run(None, dict(zip(names, given)))]

    return run


def in_domain(name: str, named: dict[str, Any], results: list[tuple[torch.dtype, list[int]]]) -> Any:
    """A call of an operator of ours as a node of the domain. named: its arguments; tensors become inputs, in this order, whose names
    are the attribute "inputs". results: of each, its dtype and shape."""
    tensors, inputs, attributes = [], [], {}
    for key, given in named.items():
        of_tensors = isinstance(given, (list, tuple)) and any(isinstance(g, torch.Tensor) for g in given)
        if isinstance(given, torch.Tensor) or of_tensors:
            tensors += given if of_tensors else [given]
            inputs += [key] * (len(given) if of_tensors else 1)
        elif given is not None and given != [] and given != ():
            attributes[key] = int(given) if isinstance(given, bool) else given
    attributes["inputs"] = inputs
    kind = f"{DOMAIN}::{''.join(part.title() for part in name.split('::')[1].split('_'))}"
    if len(results) > 1:
        dtypes, shapes = zip(*results)
        return torch.onnx.ops.symbolic_multi_out(kind, tensors, attributes, dtypes=dtypes, shapes=shapes, version=1)
    (dtype, shape), = results
    return laid_out(torch.onnx.ops.symbolic(kind, tensors, attributes, dtype=dtype, shape=shape, version=1))


def _safetensors(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """(where the data begins, the header) of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))

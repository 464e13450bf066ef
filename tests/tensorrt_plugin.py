"""Registers the plugin with standard TensorRT and lets Torch-TensorRT part graphs with it; prints, as JSON, what came of it. Nothing is built.

    PYTHONPATH=FOLDER python tests/tensorrt_plugin.py     # FOLDER: of standard_tensorrt.py. Run by test_export_plugin.py.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
import types

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import driver_stand_in
import standard_tensorrt

standard_tensorrt.alone()
driver_stand_in.install()

import tensorrt as trt  # noqa: E402
import tensorrt.plugin as trtp  # noqa: E402
import torch  # noqa: E402
import torch_tensorrt  # noqa: E402
from examples.doom_world.model import ChunkSampler, WorldConfig, WorldModel  # noqa: E402
from tensorrt.plugin._lib import QDP_REGISTRY  # noqa: E402
from tensorrt.plugin._tensor import SymIntExpr  # noqa: E402
from test_export import SPARSE, Tokens  # noqa: E402
from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS  # noqa: E402
from tracing import TINY, dynamic, relative, seeded, world_inputs  # noqa: E402

import li_compile  # noqa: E402
from li_compile import Config  # noqa: E402
from li_compile.cli import doctor  # noqa: E402
from li_compile.errors import ExportError  # noqa: E402
from li_compile.exporting.targets import tensorrt_plugin  # noqa: E402
from li_compile.kernels.plugin_ptx import aot_kernel  # noqa: E402
from li_compile.patterns.graph import value  # noqa: E402

NAME, OPERATOR = tensorrt_plugin.NAME, tensorrt_plugin.OPERATOR
DECODE = TINY | {"preset": "all", "sparse.skip_layers": 0, "sparse.min_context": 4, "sparse.topk_ratio": 0.5, "context.memory_frames": 4,
                 "context.temporal_frames": 4, "context.anchor_frames": 0, "context.fov": (60, 45)}


class Parted(Exception):
    """Instead of a build."""


def parted(model, args, options: dict, **more) -> dict:
    """What an export comes to before an engine would be built: the report's rows, and the parts that Torch-TensorRT makes."""
    parts: list[dict] = []
    errors: list[list[float]] = []
    compile_ = torch_tensorrt.dynamo.compile

    def dry(*args, **kwargs):
        graph = compile_(*args, **kwargs, dryrun=True)
        parts.extend({"name": name, "operators": [str(n.target) for n in child.graph.nodes if n.op == "call_function"],
                      "plugins": [[[list(value(a).shape), str(value(a).dtype)] for a in (*n.args, n)]
                                  for n in child.graph.nodes if n.target is OPERATOR]} for name, child in graph.named_children())
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            given = [torch.randn(i.shape).to(i.dtype.to(torch.dtype)) for i in kwargs["arg_inputs"]]
            errors.append([relative(a.double(), b.double()) for a, b in zip(graph(*given), args[0].module()(*given))])
        raise Parted

    torch_tensorrt.dynamo.compile = dry
    given = {"target": "tensorrt", "sparse": "plugin", "config": Config.from_options(options)} | more
    report = li_compile.export_report(model, args, **given)
    try:
        with tempfile.TemporaryDirectory() as folder:
            li_compile.export(model, args, path=pathlib.Path(folder, "a"), strict=True, **given)
    except ExportError as error:
        if "Parted" not in str(error):
            raise
    finally:
        torch_tensorrt.dynamo.compile = compile_
    return {"operators": report.variants[0].operators, "unavailable": report.unavailable, "notes": report.notes, "parts": parts, "errors": errors}


class Constants:
    """In place of TensorRT's maker of expressions, which only a build has: numbers as they are."""

    def constant(self, number: int) -> int:
        return number


def kernel_of(tensors: list) -> dict:
    """What TensorRT would be handed for one call in a graph, (shape, dtype) by argument, and what the function that compiles it says of the
    same shapes."""
    kinds = {"torch.float16": trt.DataType.HALF, "torch.float32": trt.DataType.FLOAT, "torch.int32": trt.DataType.INT32}
    inputs = []
    for shape, dtype in tensors:
        inputs.append(trtp.TensorDesc(trtp.ShapeExprs.from_tuple(tuple(trtp.ShapeExpr() for _ in shape)), kinds[dtype]))
        inputs[-1].shape = trtp.Shape(tuple(shape))
    registered = QDP_REGISTRY[NAME]
    output = registered.register_func(*inputs)
    order = [next(j for j, e in enumerate(inputs[0].shape_expr) if e is expr) for expr in output.shape_expr]
    SymIntExpr._exprBuilder = Constants()
    try:
        name, ptx, launch, extras = registered.aot_impl_func(*inputs, (output,), 0)
    finally:
        SymIntExpr._exprBuilder = None
    want = aot_kernel(getattr(torch, tensors[0][1].split(".")[1]), {a.name: tuple(s) for a, (s, _) in zip(OPERATOR._schema.arguments, tensors)})
    number = lambda expr: expr._expr
    return {"same": (name, ptx) == (want.name, want.ptx), "output": [output.dtype.name, order], "extras": len(extras),
            "launch": [number(getattr(launch, n)) for n in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")],
            "want": [want.grid, 1, 1, want.threads, 1, 1, want.shared]}


def created() -> dict:
    """The plugin as TensorRT's own registry makes it, and what that says of its output."""
    creator = trt.get_plugin_registry().get_creator(NAME.split("::")[1], "1", "li")
    plugin = creator.create_plugin(*NAME.split("::")[::-1], trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT)
    halves = [trt.DataType.HALF] * 5 + [trt.DataType.INT32] * 5 + [trt.DataType.FLOAT]
    return {"version": creator.plugin_version, "namespace": creator.plugin_namespace, "class": type(plugin).__name__,
            "outputs": [t.name for t in plugin.get_output_data_types(halves, [4, 4, 4, 4, 4, 4, 3, 3, 1, 1, 1])]}


def converted() -> dict:
    """What Torch-TensorRT's converter adds to a network for a call: names stand for tensors, as there is no network to make any."""
    import tensorrt_bindings.plugin._lib as definitions
    import torch_tensorrt.dynamo.conversion.plugins._generate_plugin_converter as plugins

    added, names = [], [a.name for a in OPERATOR._schema.arguments]

    def add_plugin(make, aot: bool):
        request = trt.QuickPluginCreationRequest.STRICT_AOT if aot else trt.QuickPluginCreationRequest.STRICT_JIT
        inputs, shapes, plugin = make(request)
        added.append({"inputs": inputs, "shapes": shapes, "class": type(plugin).__name__, "aot": aot})
        return types.SimpleNamespace(get_output=lambda i: f"output {i}")

    node = torch.fx.Graph().call_function(OPERATOR, tuple(names))
    convert = DYNAMO_CONVERTERS[node][0]
    tensor, kind = plugins.get_trt_tensor, definitions.trt.ITensor
    plugins.get_trt_tensor, definitions.trt.ITensor = (lambda context, x, name: x), str
    try:
        output = convert(types.SimpleNamespace(net=types.SimpleNamespace(add_plugin=add_plugin)), OPERATOR, tuple(names), {}, "attention")
    finally:
        plugins.get_trt_tensor, definitions.trt.ITensor = tensor, kind
    return {"added": added, "output": output, "names": names}


def main() -> dict:
    world = WorldConfig(channels=4, height=4, width=4, dim=64, heads=2, depth=1, rope_dims=(8, 12, 12), cond_dim=16, text_dim=16, registers=4)
    chunk = ChunkSampler(seeded(WorldModel, config=world), steps=3)
    half = Tokens(9, 64).half()  # two heads of 32, and a last block that is not full
    made = {"tensorrt": trt.__version__, "torch_tensorrt": torch_tensorrt.__version__, "why not": tensorrt_plugin.why_no_plugin(),
            "before": [NAME in QDP_REGISTRY, OPERATOR in DYNAMO_CONVERTERS]}
    made["prefill"] = parted(half, [torch.ones(1, 64, 9, 2, 4).half()], SPARSE)
    made["after"] = [NAME in QDP_REGISTRY, OPERATOR in DYNAMO_CONVERTERS]
    made["decode"] = parted(chunk, dynamic(world_inputs(chunk.model, 12)), DECODE)
    made["native"] = parted(half, [torch.ones(1, 64, 9, 2, 4).half()], SPARSE, sparse="auto")
    for way in ("prefill", "decode"):
        made[way]["kernels"] = [kernel_of(p[:-1]) for part in made[way]["parts"] for p in part["plugins"]]
    made["created"], made["converted"] = created(), converted()
    made["doctor"] = vars(doctor._tensorrt_plugin())
    return made


if __name__ == "__main__":
    print(json.dumps(main()))

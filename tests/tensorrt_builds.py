"""Builds TensorRT engines with the driver's stand-in and prints, as JSON, what they are made of. Run by test_export_tensorrt.py.

    python tests/tensorrt_builds.py FOLDER
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections import Counter

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import driver_stand_in

driver_stand_in.install()

import torch  # noqa: E402
import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter  # noqa: E402
from examples.doom_world.model import ChunkSampler, WorldConfig, WorldModel  # noqa: E402
from test_export import SPARSE, Tokens  # noqa: E402
from test_gated_steps import Sampler, inputs  # noqa: E402
from tracing import TINY, dynamic, seeded, world_inputs  # noqa: E402

import li_compile  # noqa: E402
from li_compile import Config  # noqa: E402
from li_compile.errors import ExportError, LightInteractionError  # noqa: E402

networks: list[dict] = []
construct = interpreter.TRTInterpreter._construct_trt_network_def


def constructed(self):
    """Note each network before it is built: layers by kind, and its inputs and outputs."""
    construct(self)
    net = self.ctx.net
    tensors = lambda count, get: {get(i).name: [list(get(i).shape), get(i).dtype.name] for i in range(count)}
    networks.append({"layers": Counter(net.get_layer(i).type.name for i in range(net.num_layers)),
                     "inputs": tensors(net.num_inputs, net.get_input), "outputs": tensors(net.num_outputs, net.get_output)})


interpreter.TRTInterpreter._construct_trt_network_def = constructed


def build(folder: pathlib.Path, model, args, options: dict, **more) -> dict:
    """An export: its variants, and the networks that were built for it."""
    networks.clear()
    report = li_compile.export(model, args, path=folder, target="tensorrt", config=Config.from_options(options), **more)
    return {"variants": [{"name": v.name, "passes": v.passes, "operators": v.operators, "caches": v.caches, "parts": v.parts} for v in report.variants],
            "networks": list(networks), "bytes": {p.name: p.stat().st_size for p in folder.iterdir()}, "notes": report.notes}


def around(folder: pathlib.Path) -> dict:
    """What stands around TensorRT's plugin, in engines: the plugin itself, which TensorRT-RTX does not take, is left to PyTorch."""
    from li_compile.exporting.targets import tensorrt_plugin

    why, register = tensorrt_plugin.why_no_plugin, tensorrt_plugin.register_plugin
    tensorrt_plugin.why_no_plugin = tensorrt_plugin.register_plugin = lambda: None
    try:
        return build(folder, Tokens(9, 64).half(), [torch.ones(1, 64, 9, 2, 4).half()], SPARSE, sparse="plugin")
    finally:
        tensorrt_plugin.why_no_plugin, tensorrt_plugin.register_plugin = why, register


def error(kind, call) -> str:
    try:
        call()
    except kind as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing was raised"


def main(folder: pathlib.Path) -> dict:
    tiny = WorldConfig(channels=4, height=4, width=4, dim=32, heads=2, depth=1, rope_dims=(4, 6, 6), cond_dim=16, text_dim=16, registers=4)
    chunk = ChunkSampler(seeded(WorldModel, config=tiny), steps=3)
    cache = {"preset": "cache", "cache.gate": "always"}
    pruned = TINY | {"preset": "all", "sparse.skip_layers": 0, "sparse.min_context": 4, "sparse.topk_ratio": 0.5, "context.memory_frames": 4,
                     "context.temporal_frames": 4, "context.anchor_frames": 0, "context.fov": (60, 45)}
    made = {
        "chunk": build(folder / "chunk", chunk, dynamic(world_inputs(chunk.model, 12)), pruned),
        "gated": build(folder / "gated", Sampler(), inputs(), cache, gates="device", strict=True),
        "gated chunk": build(folder / "gated_chunk", chunk, dynamic(world_inputs(chunk.model, 12)), pruned | {"sparse.enabled": False}, gates="device"),
        "native": build(folder / "native", Tokens(), [torch.ones(1, 16, 8, 2, 4)], SPARSE, strict=True),
        "hybrid": build(folder / "hybrid", Tokens(), [torch.ones(1, 16, 8, 2, 4)], SPARSE, sparse="segment"),
    }
    made["around"] = around(folder / "around")
    made["strict"] = error(ExportError, lambda: build(folder / "strict", Tokens(), [torch.ones(1, 16, 8, 2, 4)], SPARSE, sparse="segment", strict=True))
    made["load"] = error(LightInteractionError, lambda: li_compile.load(folder / "native"))
    made["left behind"] = sorted(p.name for p in folder.iterdir())
    return made


if __name__ == "__main__":
    print(json.dumps(main(pathlib.Path(sys.argv[1]))))

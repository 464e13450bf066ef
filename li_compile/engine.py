"""TensorRT engines run with TensorRT and PyTorch's tensors alone: no Torch-TensorRT, no compiler of ours.

    engines = open_engines("artifact")                        # of variants that are one engine each
    out, = engines["call0_keep8_full"](noise, prompt, ...)    # CUDA tensors, in the manifest's order

Which variant is right, a ``li_compile.Session`` says (``plan.indices``, ``plan.reuse``), or ``li_compile.load``, which does all of that. This file
imports nothing of the package and may be copied.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import torch


class Engine:
    """A serialized engine as a callable of CUDA tensors, on PyTorch's current stream."""

    def __init__(self, plan: bytes, inputs: Sequence[str], outputs: Sequence[str], taking_turns: Sequence[str] = ()) -> None:
        """inputs, outputs: names of the engine's tensors, in the order of arguments and results. taking_turns: outputs, such as caches that
        are handed back in, that have two buffers each, used in turn: what a call returned stays until the call after the next.

        Raises RuntimeError if TensorRT cannot load the engine: another version of it, another GPU, or no driver.
        """
        self.trt = tensorrt()
        self.engine = self.trt.Runtime(self.trt.Logger(self.trt.Logger.ERROR)).deserialize_cuda_engine(plan)
        self.context = None if self.engine is None else self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError(f"{self.trt.__name__} {self.trt.__version__} cannot load this engine: it was built by another version or for another GPU, "
                               "or there is no driver; export it again on this machine")
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._held = {name: [self._new(name), self._new(name)] for name in taking_turns}

    def _new(self, name: str) -> torch.Tensor:
        kind = getattr(torch, dict(FLOAT="float32", HALF="float16", BF16="bfloat16", INT32="int32", INT64="int64", BOOL="bool", INT8="int8",
                                   UINT8="uint8")[self.engine.get_tensor_dtype(name).name])
        return torch.empty(tuple(self.engine.get_tensor_shape(name)), dtype=kind, device="cuda")

    def __call__(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """Raises ValueError for a tensor of another shape or dtype than the engine's."""
        kept = [x.contiguous() for x in given]  # until the launch: PyTorch's allocator keeps to the stream's order after it
        for name, x in zip(self.inputs, kept, strict=True):
            shape = tuple(self.engine.get_tensor_shape(name))
            if tuple(x.shape) != shape:
                raise ValueError(f"{name} must be {list(shape)}; found {list(x.shape)}")
            self.context.set_tensor_address(name, x.data_ptr())
        out = []
        for name in self.outputs:
            turns = self._held.get(name)
            out.append(self._new(name) if turns is None else turns[0])
            if turns is not None:
                turns.reverse()
            self.context.set_tensor_address(name, out[-1].data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT could not run the engine; its log says why")
        return out


def open_engines(folder: str | pathlib.Path) -> dict[str, Engine]:
    """The engines of an artifact, by the names of its variants; each takes those of the variant's inputs that it reads (``inputs``).

    Raises ValueError if PyTorch segments stand between engines.
    """
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for variant in (v for call in manifest["calls"] for v in call["variants"]):
        parts = variant["parts"]
        if len(parts["segments"]) != 1 or "engine" not in parts["segments"][0]:
            raise ValueError(f"{variant['name']} is not one engine: PyTorch runs parts of it; open the artifact with li_compile.load")
        (segment,) = parts["segments"]
        binding = dict(zip(segment["inputs"], segment["bindings"][0])), dict(zip(segment["outputs"], segment["bindings"][1]))
        caches = [binding[1][o] for o, t in zip(parts["outputs"], variant["outputs"]) if t["name"].startswith("cache.")]
        found[variant["name"]] = Engine((folder / segment["engine"]).read_bytes(), [binding[0][n] for n in parts["inputs"] if n in binding[0]],
                                        [binding[1][n] for n in parts["outputs"] if n is not None], caches)
    return found


def tensorrt():
    """The TensorRT module that is installed. Raises ImportError if none is."""
    try:
        import tensorrt_rtx as module
    except ImportError:
        try:
            import tensorrt as module
        except ImportError:
            raise ImportError("running an engine needs TensorRT: pip install tensorrt-rtx or tensorrt, the one that built it") from None
    return module

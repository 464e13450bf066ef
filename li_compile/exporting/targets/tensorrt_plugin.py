"""``li::block_sparse_plugin`` in standard TensorRT: a quick-deployable plugin (QDP) whose kernel is compiled ahead of time.

The engine holds the kernel's PTX, so that where it runs it needs neither Python nor this package. Experimental: that it registers, what
its kernel is and that Torch-TensorRT puts it into an engine is tested; no engine with it has been built or run.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import torch

from li_compile.exporting.targets import tensorrt
from li_compile.kernels._compat import has_triton, interpreting
from li_compile.kernels.plugin_ptx import aot_kernel

OPERATOR = torch.ops.li.block_sparse_plugin.default
NAME = OPERATOR._schema.name


def why_no_plugin() -> str | None:
    """Why a plugin cannot be registered here, None if it can. Imports TensorRT, and asks for no driver."""
    found = tensorrt.installed()
    if "torch-tensorrt-rtx" in found:
        return ("TensorRT-RTX, which is installed, has no plugin layer: use sparse='native' or 'segment', or standard TensorRT in an environment of its own "
                "(pip install 'li_compile[tensorrt]')")
    if not found:
        return "a plugin needs standard TensorRT and Torch-TensorRT: pip install 'li_compile[tensorrt]'"
    if not has_triton():
        return "the plugin's kernel is compiled by Triton, which is not installed: pip install triton"
    if interpreting():
        return "Triton interprets its kernels here, and compiles none: unset TRITON_INTERPRET"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "the plugin's kernel needs a GPU of compute capability 8.0 or newer: use sparse='native'"
    try:
        trtp = _trtp()
    except Exception as error:  # a library that is missing shows as whatever it pleases
        return (f"tensorrt.plugin cannot be imported ({type(error).__name__}: {error}): reinstall the TensorRT that belongs to torch-tensorrt "
                f"{found['torch-tensorrt']}")
    if not hasattr(trtp, "aot_impl"):
        return f"this TensorRT's plugins cannot be compiled ahead of time: install the one that belongs to torch-tensorrt {found['torch-tensorrt']}"
    return None


@functools.cache
def register_plugin() -> None:
    """Make the plugin known to TensorRT, and its converter to Torch-TensorRT, once a process."""
    from torch_tensorrt.dynamo.conversion.plugins import generate_plugin_converter

    trtp = _trtp()
    describe, implement = _functions(trtp)
    trtp.register(NAME)(describe)
    trtp.aot_impl(NAME)(implement)
    generate_plugin_converter(NAME, use_aot_if_available=True)


def _trtp() -> ModuleType:
    import tensorrt.plugin

    return tensorrt.plugin


def _functions(trtp: ModuleType):
    """(what tells TensorRT the plugin's output, what hands it the kernel), with the signatures that it reads them by."""
    def describe(*inputs):
        batch, heads, length, dim = inputs[0].shape_expr
        return trtp.from_shape_expr((batch, length, heads, dim), inputs[0].dtype)

    def implement(*given):
        *inputs, outputs, tactic = given
        made = aot_kernel(_dtype(inputs[0].dtype), {n: tuple(x.shape) for n, x in zip(names, inputs)})
        extras = trtp.SymIntExprs(len(made.extras))
        for i, number in enumerate(made.extras):
            extras[i] = trtp.SymInt32(number)
        return made.name, made.ptx, trtp.KernelLaunchParams(grid_x=made.grid, block_x=made.threads, shared_mem=made.shared), extras

    names = [a.name for a in OPERATOR._schema.arguments]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    inputs = [inspect.Parameter(n, positional, annotation=trtp.TensorDesc) for n in names]
    describe.__signature__ = inspect.Signature(inputs, return_annotation=trtp.TensorDesc)
    more = [inspect.Parameter("outputs", positional, annotation=tuple[trtp.TensorDesc]), inspect.Parameter("tactic", positional, annotation=int)]
    implement.__signature__ = inspect.Signature(
        [*inputs, *more], return_annotation=tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs])
    return describe, implement


def _dtype(kind: Any) -> torch.dtype:
    """Of a ``tensorrt.DataType``."""
    names = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32}
    if kind.name not in names:
        raise ValueError(f"the plugin's kernel computes in fp16, bf16 or fp32, found {kind.name}")
    return names[kind.name]


__all__ = ["NAME", "OPERATOR", "register_plugin", "why_no_plugin"]

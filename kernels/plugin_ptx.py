"""The kernel of ``li::block_sparse_plugin`` compiled ahead of time to PTX, as a TensorRT plugin takes it: no GPU is needed, nor TensorRT.

What a plugin can be handed decides much of it. One launch: with the running maximum, not the two launches of block_sparse_triton.py. PTX, which
the driver compiles for its GPU: that for sm_80 runs on every newer one, that for sm_90a on Hopper alone. Arguments in TensorRT's order: the
inputs, then integers (none: shapes are constants), then the output. Shared memory that any GPU grants unasked, since nothing says that
TensorRT asks for more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ._compat import aot_compile, has_triton, interpreting, without_hidden, without_lines
from .block_sparse_plugin import block_size_of, two_sources
from .block_sparse_triton import DTYPES, HEAD_DIMS, Launch
from .layout import num_blocks

__all__ = ["ARGUMENTS", "SHARED", "Ptx", "aot_kernel", "launch_config", "specialised", "why_no_ptx"]

SHARED = 48 * 1024  # bytes that a program may use without cuFuncSetAttribute
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
#: The kernel's arguments: those of the operator, in its order, and the output.
ARGUMENTS = ("Q", "K", "V", "CURRENT_K", "CURRENT_V", "INDICES", "COUNTS", "TAILS", "VALID", "ROWS_TO", "SCALE", "OUT")


class Ptx(NamedTuple):
    """grid: programs, along x. threads: of a program. shared: bytes of dynamic shared memory of a program. extras: integers that follow the
    inputs and precede the output."""

    name: str
    ptx: str
    grid: int
    threads: int
    shared: int
    extras: tuple[int, ...] = ()


def why_no_ptx(dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the kernel cannot be compiled for such queries, None if it can."""
    if not has_triton():
        return "the plugin's kernel is compiled by Triton, which is not installed"
    if interpreting():
        return "Triton interprets its kernels here, and compiles none"
    if dtype not in DTYPES:
        return f"the plugin's kernel computes in fp16, bf16 or fp32, found {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the plugin's kernel takes head_dim {', '.join(map(str, HEAD_DIMS))}, found {head_dim}"
    return None if block_size % 16 == 0 else f"the plugin's kernel needs a block_size that 16 divides, found {block_size}"


def launch_config(dtype: torch.dtype, head_dim: int, block_size: int) -> Launch:
    """Tiles that stay within :data:`SHARED`, from ahead-of-time compiles; not measured. Up to head_dim 64 keys and values are double-buffered,
    for which Triton asks for five stages; at 128 that does not fit, and three programs a multiprocessor have to hide each other's waiting."""
    rows = min(block_size & -block_size, 64)  # a power of two that divides the block
    if dtype == torch.float32:
        return Launch(min(rows, 32), min(rows, 16 if head_dim == 128 else 32), 4, 2)
    return Launch(rows, min(rows, 32), 4, 2) if head_dim == 128 else Launch(rows, rows, 4, 5)


def specialised(dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], Launch, int]:
    """(the kernel's constants, its options, its grid) for arguments of ``li::block_sparse_plugin`` of these shapes, by their names. Raises
    ValueError for sizes that are not known, or don't fit together."""
    if min(size for shape in shapes.values() for size in shape) < 1:
        raise ValueError(f"sizes are constants of the kernel, and must be known; found {dict(shapes)}.")
    batch, heads, queries, dim = shapes["q"]
    size, (*_, query_blocks, pitch) = block_size_of(shapes), shapes["block_indices"]
    two, launch = two_sources(shapes), launch_config(dtype, dim, size)
    constants = {
        "HEADS": heads, "QUERIES": queries, "FIRST": shapes["k"][2], "SECOND": shapes["current_k"][2], "QUERY_BLOCKS": query_blocks, "PITCH": pitch,
        "FIRST_BLOCKS": num_blocks(shapes["k"][2], size) if two else 0, "DIM": dim, "ROWS": launch.rows, "KEYS": launch.keys, "BLOCK": size,
        "EXACT": dtype == torch.float32, "TWO": two,
    }  # fmt: skip
    return constants, launch, batch * heads * query_blocks * (size // launch.rows)


def aot_kernel(dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]], capability: int = 80) -> Ptx:
    """Compile the kernel for one call of ``li::block_sparse_plugin``.

    Args:
        dtype: of q, k and v: fp16, bf16 or fp32.
        shapes: name of an argument of the operator -> its shape; all but tails, counts, values and the scale are looked at.
        capability: 80 or 90 (as 90a).

    Raises ValueError for what :func:`why_no_ptx` names, for shapes that :func:`specialised` refuses, and where the kernel needs more than
    :data:`SHARED` (sm_90a keeps queries there too, which is too much at some sizes).
    """
    constants, launch, grid = specialised(dtype, shapes)
    dim, size = constants["DIM"], constants["BLOCK"]
    if (why := why_no_ptx(dtype, dim, size)) is not None:
        raise ValueError(why)
    from ._plugin_kernel import block_sparse_plugin_kernel as kernel

    values = dict.fromkeys(("Q", "K", "V", "CURRENT_K", "CURRENT_V", "OUT"), TYPES[dtype])
    signature = {name: values.get(name, "*fp32" if name == "SCALE" else "*i32") for name in ARGUMENTS}
    made = aot_compile(kernel, signature, constants, capability, num_warps=launch.num_warps, num_stages=launch.num_stages)
    if made.metadata.shared > SHARED:
        raise ValueError(f"the plugin's kernel needs {made.metadata.shared} bytes of shared memory for sm_{capability}, head_dim {dim} and blocks of {size}, "
                         f"and a plugin is granted {SHARED}.")  # fmt: skip
    return Ptx(made.metadata.name, without_lines(without_hidden(made, len(ARGUMENTS))), grid, made.metadata.num_warps * 32, made.metadata.shared)

"""Block-sparse attention as one portable Triton kernel, for NVIDIA GPUs from sm_80 and for Triton's interpreter.

The kernel is the usual online softmax over listed blocks: base-2 exponentials with the scale folded in, one division
at the end, fp32 accumulation. Pointers, not descriptors, so that sm_80 runs it too. The module imports without Triton;
the kernel is made when it is first needed.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch

from ._compat import has_triton, interpreting

__all__ = ["HEAD_DIMS", "Launch", "launch_config", "run", "supports"]

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = 1.4426950408889634


class Launch(NamedTuple):
    """Tile sizes (query rows, key rows) and launch options. Chosen here: ``triton.autotune`` needs a driver to import."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def launch_config(dtype: torch.dtype, head_dim: int, block_size: int, capability: int) -> Launch:
    """The tile for a dtype, head size, block size and device (80 for sm_80, 90 for sm_90).

    Taken from ahead-of-time compiles without spills and the project's H100 measurements: 128 x 64 with 8 warps is best
    at blocks of 128. The load of a block's index takes a pipeline stage of its own, so five stages buffer K and V
    threefold, four twofold. At blocks of 64 on sm_80, several small programs a multiprocessor beat deep pipelines.
    fp32 takes no tensor core here (TF32 would cost accuracy), so its tiles are small.
    """
    rows = min(block_size, 128)
    while block_size % rows:
        rows //= 2
    if dtype == torch.float32:
        return Launch(min(rows, 32), min(rows, 32), 4, 2)
    keys = min(rows, 64)
    if rows == 128:
        return Launch(rows, keys, 8, 5)
    return Launch(rows, keys, 4, 4 if capability >= 90 else 2)


def supports(q, k, v, block_indices, block_counts, kv_valid, block_size, scale) -> str | None:
    """CUDA from sm_80; head_dim 32, 64 or 128; block_size a multiple of 16; fp16, bf16 (not in the interpreter), fp32."""
    if not has_triton():
        return "Triton is not installed"
    if interpreting():
        if q.dtype == torch.bfloat16:
            return "Triton's interpreter computes bf16 wrongly"  # triton #11584, seen in 3.6 to 3.8
    elif q.device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, found {q.device.type}"
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if q.dtype not in DTYPES:
        return f"it computes in fp16, bf16 or fp32, found {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"it takes head_dim {', '.join(map(str, HEAD_DIMS))}, found {q.shape[-1]}"
    if block_size % 16:
        return f"it needs a block_size that 16 divides, found {block_size}"
    return None


def run(q, k, v, block_indices, block_counts, kv_valid, block_size: int, scale: float):
    """See :func:`li_compile.kernels.block_sparse.block_sparse_attention`. One launch, nothing read back."""
    batch, heads, length, dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    block_indices, block_counts, kv_valid = block_indices.contiguous(), block_counts.contiguous(), kv_valid.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    capability = 80 if interpreting() else 10 * torch.cuda.get_device_capability(q.device)[0]
    config = launch_config(q.dtype, dim, block_size, capability)
    # Query tiles run fastest and heads slowest: programs that run together share a head's K and V in the L2 cache.
    grid = (length // config.rows, heads, batch)
    with torch.cuda.device(q.device) if q.device.type == "cuda" else contextlib.nullcontext():
        kernel()[grid](
            q, k, v, out, lse, block_indices, block_counts, kv_valid,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, length // block_size, block_indices.shape[-1], scale * LOG2E,
            DIM=dim, ROWS=config.rows, KEYS=config.keys, BLOCK=block_size, EXACT=q.dtype == torch.float32,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


@functools.cache
def kernel():
    """The ``@triton.jit`` function; imports Triton."""
    from ._block_sparse_kernel import block_sparse_kernel

    return block_sparse_kernel



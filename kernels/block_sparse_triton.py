"""Block-sparse attention as one portable Triton kernel, for NVIDIA GPUs from sm_80 and for Triton's interpreter.

The usual pass over listed blocks: base-2 exponentials with the scale folded in, one division at the end, fp32
accumulation. Pointers, not descriptors, so that sm_80 runs it too. The module imports without Triton; the kernel is made
when it is first needed.

Two launches. The first subtracts from a row's scores the maximum of the row's first tile, and no running maximum: any
number that keeps the exponentials in range will do, as the division takes it out again, and without the running maximum
a third of the arithmetic goes (rescaling the output, comparing, and the wait for both). What overflows all the same (a
later score more than 127 above the first maximum in base 2, or 15 where weights are rounded to fp16) is not finite, and
so flagged; the second launch, with the running maximum, computes flagged query blocks again and is over at once where
there are none.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ._compat import capability, has_triton, interpreting
from .launching import launcher, on_device
from .problem import Problem
from .tuning import tuned

__all__ = ["HEAD_DIMS", "Launch", "launch_config", "redo", "run", "supports"]

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

    The measured one where there is such (tuning.py); else a rule from ahead-of-time compiles without spills: 128 x 64 with
    8 warps at blocks of 128. The load of a block's index takes a pipeline stage of its own, so five stages buffer K and V
    threefold, four twofold. At blocks of 64 on sm_80, several small programs a multiprocessor beat deep pipelines.
    fp32 takes no tensor core here (TF32 would cost accuracy), so its tiles are small.
    """
    rows = min(block_size, 128)
    while block_size % rows:
        rows //= 2
    if dtype == torch.float32:
        return Launch(min(rows, 32), min(rows, 32), 4, 2)
    measured = tuned("triton", capability, head_dim, block_size)
    if measured:
        return Launch(**measured)
    keys = min(rows, 64)
    if rows == 128:
        return Launch(rows, keys, 8, 5)
    return Launch(rows, keys, 4, 4 if capability >= 90 else 2)


def supports(problem: Problem) -> str | None:
    """CUDA from sm_80; head_dim 32, 64 or 128; block_size a multiple of 16; fp16, bf16 (not in the interpreter), fp32."""
    q = problem.q
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
    if problem.block_size % 16:
        return f"it needs a block_size that 16 divides, found {problem.block_size}"
    return None


def run(problem: Problem):
    """See :func:`li_compile.kernels.block_sparse.block_sparse_attention`. Nothing is read back."""
    q = problem.q
    out = problem.new_out()
    lse = problem.new_lse()
    if q.numel() == 0:
        return out, lse
    flags = torch.zeros(*q.shape[:2], problem.query_blocks, 1, dtype=torch.int32, device=q.device)
    _launch(problem, out, lse, flags, fixed=True)
    redo(problem, out, lse, flags)
    return out, lse


def redo(problem: Problem, out, lse, flags) -> None:
    """Compute the query blocks again whose ``flags`` (int32 ``[B, H, nq, any number]``) are set, with a running maximum."""
    _launch(problem, out, lse, flags, fixed=False)


def _launch(problem: Problem, out, lse, flags, fixed: bool) -> None:
    q, size = problem.q, problem.block_size
    heads, dim = q.shape[1], q.shape[3]
    rows_first = lambda x: x if x.stride(-1) == 1 else x.contiguous()
    q, k, v = rows_first(q), rows_first(problem.k), rows_first(problem.v)
    two = problem.current_k is not None
    k1, v1 = (rows_first(problem.current_k), rows_first(problem.current_v)) if two else (k, v)
    summary = problem.summary_k is not None
    sk, sv = (rows_first(problem.summary_k), rows_first(problem.summary_v)) if summary else (k, v)
    indices, pitch = problem.lists
    counts, valid = problem.block_counts.contiguous(), problem.kv_valid.contiguous()
    tails = counts if problem.tails is None else problem.tails.contiguous()
    config = launch_config(q.dtype, dim, size, capability(q.device))
    # Query tiles run fastest and heads slowest: programs that run together share a head's K and V in the L2 cache. The
    # second launch hardly ever has anything to do: few programs with little shared memory start and end soonest.
    tiles = counts.numel() * (size // config.rows)
    grid = (tiles if fixed else min(tiles, _multiprocessors(q.device)),)
    with on_device(q.device):
        launcher(kernel())[grid](
            q, k, v, k1, v1, sk, sv, problem.summary_bias.contiguous() if summary else lse, out, lse,
            counts if problem.rows is None else problem.rows, indices, counts, tails, valid, flags,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k1.stride()[:3], *v1.stride()[:3],
            *sk.stride()[:3], *sv.stride()[:3], *out.stride()[:3],
            heads, problem.query_blocks, tiles, pitch, problem.first_blocks, sk.shape[2] if summary else 0,
            problem.scale * LOG2E,
            DIM=dim, ROWS=config.rows, KEYS=config.keys, BLOCK=size, EXACT=q.dtype == torch.float32,
            TWO=two, TAILED=problem.tails is not None, SUMMARY=summary, MAPPED=problem.rows is not None,
            FIXED=fixed, REDO=not fixed, FLAGS_A_BLOCK=flags.shape[-1],
            num_warps=config.num_warps, num_stages=config.num_stages if fixed else 2,
        )  # fmt: skip


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def kernel():
    """The ``@triton.jit`` function; imports Triton."""
    from ._block_sparse_kernel import block_sparse_kernel

    return block_sparse_kernel

"""Block-sparse attention for Hopper, in Gluon: TMA, a producer warp and a consumer warp group for each 64 query rows.

On an H100 block-sparse attention is limited by power, not by idle units: what counts is work left out. So the softmax
goes without a running maximum, as in block_sparse_triton.py, which does the flagged rest; weights stay fp32 until they are
used; and tiles of 64 keys leave registers for that. docs/kernels.md has the measurements.

The module imports without Triton; the kernel is made when it is first needed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import block_sparse_triton
from ._compat import gluon, has_triton, interpreting
from .problem import Problem
from .tuning import tuned

__all__ = ["Launch", "launch_config", "run", "supports"]

BLOCK_SIZES = (64, 128)
HEAD_DIMS = (64, 128)
LOG2E = block_sparse_triton.LOG2E


class Launch(NamedTuple):
    """Keys a tile, buffers for K and V tiles and for queries, registers of a thread at the start and of each role."""

    keys: int
    stages: int
    queries: int
    registers: int
    consumer_registers: int
    producer_registers: int


def launch_config(head_dim: int, block_size: int, clean: bool) -> Launch:
    """The configuration for a head size and block size.

    A multiprocessor holds one program at blocks of 128 (two consumer groups) and two at blocks of 64 (one each), so that
    in either case one group's softmax runs beside another's products. The producer needs more registers where it has to
    clean V (``clean`` is false). Tiles and buffers are the measured ones where there are such (tuning.py).
    """
    deep = block_size == 128 or head_dim == 64
    buffers = tuned("hopper", 90, head_dim, block_size) or {"keys": 64, "stages": 4 if deep else 3, "queries": 2 if deep else 1}
    registers, consumer = (168, 240 if clean else 224) if block_size == 128 else (128, 232 if clean else 200)
    return Launch(**buffers, registers=registers, consumer_registers=consumer, producer_registers=24 if clean else 56)


def supports(problem: Problem) -> str | None:
    """Compute capability 9.x with a Triton that has Gluon; fp16 and bf16; head_dim 64 or 128; block_size 64 or 128."""
    q = problem.q
    if not has_triton() or gluon() is None:
        return "Triton with Gluon (3.6 or newer) is not installed"
    if interpreting():
        return "Triton's interpreter does not run Gluon"
    if q.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it needs a Hopper GPU (compute capability 9.0)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in fp16 or bf16, found {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"it takes head_dim {' or '.join(map(str, HEAD_DIMS))}, found {q.shape[-1]}"
    if problem.block_size not in BLOCK_SIZES:
        return f"it takes a block_size of {' or '.join(map(str, BLOCK_SIZES))}, found {problem.block_size}"
    return None


def run(problem: Problem):
    """See :func:`li_compile.kernels.block_sparse.block_sparse_attention`. Nothing is read back."""
    q, size = problem.q, problem.block_size
    out = problem.new_out()
    lse = problem.new_lse()
    if q.numel() == 0:
        return out, lse
    if not problem.sources:  # a descriptor of nothing is none
        return block_sparse_triton.run(problem)
    config = launch_config(q.shape[3], size, problem.clean)
    (k, v, _), (k1, v1, _) = problem.sources[0], problem.sources[-1]
    two, summary = len(problem.sources) == 2, problem.summary_k is not None
    indices, pitch = problem.lists
    counts, valid = problem.block_counts.contiguous(), problem.kv_valid.contiguous()
    tails = counts if problem.tails is None else problem.tails.contiguous()
    flags = torch.empty(*counts.shape, size // 64, dtype=torch.int32, device=q.device)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count * (1 if size == 128 else 2)
    with torch.cuda.device(q.device):
        kernel()[(min(counts.numel(), programs),)](
            _described(q, 64), *(_described(x, config.keys) for x in (k, v)), *(_described(x, config.keys) if two else None for x in (k1, v1)),
            *(_described(x, config.keys) if summary else None for x in (problem.summary_k, problem.summary_v)),
            out, lse, counts if problem.rows is None else problem.rows, indices, counts, tails, valid,
            problem.summary_bias.contiguous() if summary else lse, flags,
            problem.scale * LOG2E, q.shape[1], problem.query_blocks, counts.numel(), pitch,
            problem.first_blocks if two else 0, problem.summary_k.shape[2] if summary else 0, *out.stride()[:3],
            BLOCK=size, KEYS=config.keys, DIM=q.shape[3], STAGES=config.stages, QUERIES=config.queries,
            TWO=two, SUMMARY=summary, MAPPED=problem.rows is not None, CLEAN=problem.clean,
            CONSUMER_REGISTERS=config.consumer_registers, PRODUCER_REGISTERS=config.producer_registers,
            num_warps=4, maxnreg=config.registers,
        )  # fmt: skip
    block_sparse_triton.redo(problem, out, lse, flags)
    return out, lse


def _described(x: torch.Tensor, rows: int):
    """A TMA descriptor of ``[B, H, L, D]`` in boxes of so many rows; what TMA cannot address is copied."""
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(s == 0 or s * x.element_size() % 16 for s in x.stride()[:3]):
        x = x.contiguous()
    return gluon().descriptor(x, (1, 1, rows, x.shape[3]))


@functools.cache
def kernel():
    """The ``@gluon.jit`` function; imports Triton."""
    from ._hopper_kernel import hopper_kernel

    return hopper_kernel

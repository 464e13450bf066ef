"""The operator ``li::block_sparse_attention``: its contract, its fake, and its providers."""

from __future__ import annotations

import torch

from . import block_sparse_cpu, block_sparse_hopper, block_sparse_reference, block_sparse_triton
from .problem import Problem
from .providers import Provider, register_provider, select_provider

__all__ = ["attend", "block_sparse_attention", "expected_provider"]

NAME = "block_sparse_attention"
# In order of preference. Where Triton interprets, it takes CPU tensors too, but only when asked for by name, since the
# CPU provider comes first.
for _name, _module in (("cpu", block_sparse_cpu), ("hopper", block_sparse_hopper), ("triton", block_sparse_triton),
                       ("reference", block_sparse_reference)):  # fmt: skip
    register_provider(NAME, Provider(_name, _module.run, _module.supports))


@torch.library.custom_op(
    "li::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor block_counts, Tensor kv_valid, "
    "SymInt block_size, float scale, Tensor? tails=None, Tensor? current_k=None, Tensor? current_v=None, "
    "Tensor? summary_k=None, Tensor? summary_v=None, Tensor? summary_bias=None) -> (Tensor, Tensor)",
)
def block_sparse_attention(q, k, v, block_indices, block_counts, kv_valid, block_size, scale, tails=None, current_k=None,
                           current_v=None, summary_k=None, summary_v=None, summary_bias=None):  # fmt: skip
    """Softmax attention of each query block over the key blocks listed for it.

    Args:
        q: ``[B, H, nq * block_size, D]``, fp16, bf16 or fp32 (fp64 in the reference), in block order. Rows of the last
            query block that are padding get a value too; it means nothing.
        k, v: ``[B, H, nk * block_size, D]``, like q. Keys past ``kv_valid`` may hold anything, NaN included.
        block_indices: int32 ``[B, H, nq, pitch]``: for each query block, the key blocks it keeps, each once. Entries
            past the count are not looked at.
        block_counts: int32 ``[B, H, nq]``: how many, from 0 to pitch.
        kv_valid: int32 ``[blocks]``: true keys of each block, from 0 to block_size; the rest of the block is masked. The
            last block of k, and of current_k, need not be there as a whole: its storage may end at its last true key.
        block_size: tokens of a block.
        scale: factor on the scores, above 0.
        tails: int32 ``[B, H, nq]``: so many entries at the end of a list may be partly filled blocks; all before them
            are full, and kernels skip their mask. None: any block may be partly filled.
        current_k, current_v: ``[B, H, Lc, D]``: a second source of keys and values. Its blocks are numbered on from those
            of k, so that a history that stays and a chunk that changes need not be concatenated.
        summary_k, summary_v, summary_bias: keys and values ``[B, H, n, D]`` that stand for whole blocks (their means)
            and fp32 ``[B, H, nq, n]`` added to their scores: the logarithm of the number of tokens that they stand for,
            -inf where the block itself is kept. With them, blocks that were dropped still take part (as in PISA,
            arXiv 2602.01077, and Sol-Attn, arXiv 2607.24027).

    Returns:
        ``(out, lse)``: out like q, contiguous; lse fp32 ``[B, H, nq * block_size]``, natural logarithm. A row without
        any key has out 0 and lse -inf.

    The lists stay on the device: nothing is read back, so the call can be captured in a CUDA graph. There is no
    backward. Raises ValueError where shapes, dtypes or devices don't fit together.
    """
    return attend(Problem(q, k, v, block_indices, block_counts, kv_valid, block_size, scale, tails, current_k, current_v,
                          summary_k, summary_v, summary_bias))  # fmt: skip


@block_sparse_attention.register_fake
def _(q, k, v, block_indices, block_counts, kv_valid, block_size, scale, *more):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def attend(problem: Problem):
    """:func:`block_sparse_attention` without the dispatcher around it, for operators that are opaque already."""
    problem.check()
    provider, _ = select_provider(NAME, problem)
    return provider.run(problem)


def expected_provider(q: torch.Tensor, block_size: int) -> tuple[str, str]:
    """``(name, reason)`` of the provider that queries like these will get; q may be a fake tensor. For reports."""
    provider, reason = select_provider(NAME, Problem(q, q, q, q, q, q, block_size, 1.0))
    return provider.name, reason

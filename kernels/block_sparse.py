"""The operator ``li::block_sparse_attention``: its contract, its fake, and its providers."""

from __future__ import annotations

import torch

from . import block_sparse_cpu, block_sparse_reference, block_sparse_triton
from .providers import Provider, register_provider, select_provider

__all__ = ["attend", "block_sparse_attention"]

NAME = "block_sparse_attention"
# Each of the first two takes one kind of device. Where Triton interprets, it takes CPU tensors too, but only when asked
# for by name, since the CPU provider comes first.
for _name, _module in (("cpu", block_sparse_cpu), ("triton", block_sparse_triton), ("reference", block_sparse_reference)):
    register_provider(NAME, Provider(_name, _module.run, _module.supports))


@torch.library.custom_op(
    "li::block_sparse_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor block_counts, Tensor kv_valid, "
    "SymInt block_size, float scale) -> (Tensor, Tensor)",
)
def block_sparse_attention(q, k, v, block_indices, block_counts, kv_valid, block_size, scale):
    """Softmax attention of each query block over the key blocks listed for it.

    Args:
        q: ``[B, H, nq * block_size, D]``, fp16, bf16 or fp32 (fp64 in the reference), in block order. Rows of the last
            query block that are padding get a value too; it means nothing.
        k, v: ``[B, H, nk * block_size, D]``, like q. Keys past ``kv_valid`` may hold anything, NaN included.
        block_indices: int32 ``[B, H, nq, pitch]``: for each query block, the key blocks it keeps, ascending, each once.
            Entries past the count are not looked at.
        block_counts: int32 ``[B, H, nq]``: how many, from 0 to pitch.
        kv_valid: int32 ``[nk]``: true keys of each block, from 0 to block_size; the rest of the block is masked.
        block_size: tokens of a block.
        scale: factor on the scores, above 0.

    Returns:
        ``(out, lse)``: out like q, contiguous; lse fp32 ``[B, H, nq * block_size]``, natural logarithm. A row without
        any key has out 0 and lse -inf.

    The lists stay on the device: nothing is read back, so the call can be captured in a CUDA graph. There is no
    backward. Raises ValueError where shapes, dtypes or devices don't fit together.
    """
    return attend(q, k, v, block_indices, block_counts, kv_valid, block_size, scale)


@block_sparse_attention.register_fake
def _(q, k, v, block_indices, block_counts, kv_valid, block_size, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def attend(q, k, v, block_indices, block_counts, kv_valid, block_size: int, scale: float):
    """:func:`block_sparse_attention` without the dispatcher around it, for operators that are opaque already."""
    args = (q, k, v, block_indices, block_counts, kv_valid, block_size, scale)
    _check(*args)
    provider, _ = select_provider(NAME, *args)
    return provider.run(*args)


def _check(q, k, v, block_indices, block_counts, kv_valid, block_size, scale) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k and v must be [B, H, L, D] with the same B, H and D, and k and v of one shape; "
            f"found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if block_size < 1 or q.shape[2] % block_size or k.shape[2] % block_size:
        raise ValueError(f"Lengths must be whole blocks of {block_size}; found {q.shape[2]} queries and {k.shape[2]} keys. Pad the storage.")
    lists = (*q.shape[:2], q.shape[2] // block_size)
    if block_indices.shape[:3] != lists or block_counts.shape != lists or kv_valid.shape != (k.shape[2] // block_size,):
        raise ValueError(
            f"Expected block_indices {[*lists, 'pitch']}, block_counts {list(lists)} and kv_valid [{k.shape[2] // block_size}]; "
            f"found {list(block_indices.shape)}, {list(block_counts.shape)} and {list(kv_valid.shape)}."
        )
    if not (q.dtype == k.dtype == v.dtype) or {block_indices.dtype, block_counts.dtype, kv_valid.dtype} != {torch.int32}:
        raise ValueError(
            f"q, k and v must share a dtype and lists must be int32; found {q.dtype}, {k.dtype}, {v.dtype} "
            f"and {block_indices.dtype}, {block_counts.dtype}, {kv_valid.dtype}."
        )
    if len({x.device for x in (q, k, v, block_indices, block_counts, kv_valid)}) > 1:
        raise ValueError("All tensors must be on one device; move the lists to the device of q.")
    if not scale > 0:
        raise ValueError(f"scale must be above 0; found {scale}.")

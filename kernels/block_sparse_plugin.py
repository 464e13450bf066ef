"""The operator ``li::block_sparse_plugin``: block-sparse attention as a runtime can take it whose plugins are one kernel over tensors.

TensorRT's quick-deployable plugins hand a kernel pointers to contiguous tensors and integers: no number with a fraction, no list, nothing
that may be missing. So the scale is a tensor, and every size is one of a shape.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .block_sparse import attend
from .layout import num_blocks
from .problem import Problem

__all__ = ["NAME", "block_sparse_plugin", "block_size_of", "two_sources"]

NAME = "li::block_sparse_plugin"


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor current_k, Tensor current_v, Tensor block_indices, Tensor block_counts, Tensor tails, "
    "Tensor kv_valid, Tensor rows, Tensor scale) -> Tensor",
)
def block_sparse_plugin(q, k, v, current_k, current_v, block_indices, block_counts, tails, kv_valid, rows, scale):
    """:func:`~li_compile.kernels.block_sparse.block_sparse_attention`, of tensors alone.

    Args:
        q: ``[B, H, L, D]``, fp16, bf16 or fp32, in block order, without the padding of the last block.
        k, v: ``[B, H, blocks * block_size, D]``, like q: the first source. Where there is none, the second once more: ``kv_valid`` then has
            the length of one.
        current_k, current_v: ``[B, H, Lc, D]``: the second source, whose storage may end at its last true key.
        block_indices, block_counts, tails, kv_valid: as there; ``block_indices`` has a list of its own for each head and query block.
        rows: int32 ``[nq * block_size]``: where each query row goes in the output, -1 for padding.
        scale: fp32 ``[1]``: the factor on the scores, above 0.

    Returns:
        contiguous ``[B, L, H, D]`` of q's dtype, in the order that ``rows`` says.

    Runs as the operators do that are no plugin: by whichever provider there is. There is no backward. Raises ValueError where shapes,
    dtypes or devices don't fit together.
    """
    shapes = {name: tuple(x.shape) for name, x in (("k", k), ("current_k", current_k), ("block_indices", block_indices), ("kv_valid", kv_valid),
                                                   ("rows", rows))}  # fmt: skip
    first = (k, v) if two_sources(shapes) else (k[:, :, :0], v[:, :, :0])
    out, _ = attend(Problem(q, *first, block_indices, block_counts, kv_valid, block_size_of(shapes), scale.item(), tails, current_k, current_v,
                            rows=rows, length=q.shape[2]))  # fmt: skip
    return out.transpose(1, 2).contiguous()


@block_sparse_plugin.register_fake
def _(q, k, v, current_k, current_v, block_indices, block_counts, tails, kv_valid, rows, scale):
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim)


def block_size_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Tokens of a block, of a call whose arguments have these shapes. Raises ValueError if rows are no whole blocks."""
    rows, blocks = shapes["rows"][0], shapes["block_indices"][2]
    if not blocks or rows % blocks:
        raise ValueError(f"rows must be whole blocks, one for each of {blocks} lists; found {rows}.")
    return rows // blocks


def two_sources(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a call whose arguments have these shapes reads a first source beside the second. Raises ValueError if kv_valid fits neither."""
    size = block_size_of(shapes)
    first, second = (num_blocks(shapes[name][2], size) for name in ("k", "current_k"))
    (blocks,) = shapes["kv_valid"]
    if blocks not in (second, first + second):
        raise ValueError(f"kv_valid must have an entry for each block, {first + second}, or {second} where the second source is all; found {blocks}.")
    return blocks == first + second

"""The operator ``li::dense_attention``: attention of all queries over all segments, which are not concatenated for it.

The block-sparse kernel with every block listed. On Hopper it is ahead of cuDNN there too (docs/kernels.md: 1.03x to 1.25x at head_dim 128),
having no running maximum; elsewhere PyTorch's own attention is the better one and runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import block_sparse_hopper
from .launching import capturing
from .layout import block_valid, cached, laid_out, num_blocks
from .problem import Problem, check_alike
from .providers import Provider, register_provider, select_provider

__all__ = ["attend_densely", "dense_attention", "why_no_dense_kernel"]

NAME = "dense_attention"
BLOCK = 128
HEAD_DIM = 128  # at 64, cuDNN is level
LEAST_KEYS = 2048  # below, the first and last tiles of a query block, which overlap with nothing, are too large a share
LEAST_FLOPS = 1e11  # 0.15 ms: about what launching from Python takes


@torch.library.custom_op("li::dense_attention", mutates_args=(), schema="(Tensor q, Tensor[] k, Tensor[] v, float scale) -> Tensor")
def dense_attention(q, k, v, scale):
    """Softmax attention without a mask.

    Args:
        q: ``[B, H, Lq, D]``, any strides.
        k, v: segments ``[B, H, Ls, D]``, any strides, as many of one as of the other and of equal lengths in pairs. The longest is read where it
            lies; where there are more than two, the others are concatenated.
        scale: factor on the scores, above 0.

    Returns:
        ``[B, H, Lq, D]`` of q's dtype, in [B, Lq, H, D] memory order, as models read it.

    Raises ValueError where shapes, dtypes or devices don't fit. There is no backward.
    """
    return attend_densely(q, k, v, scale)


@dense_attention.register_fake
def _(q, k, v, scale):
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def attend_densely(q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], scale: float) -> Tensor:
    """:func:`dense_attention` without the dispatcher around it, for operators that are opaque already."""
    if not k or [x.shape for x in k] != [x.shape for x in v]:
        raise ValueError(f"k and v need the same segments, at least one; found {[tuple(x.shape) for x in k]} and {[tuple(x.shape) for x in v]}.")
    check_alike(q, (*k, *v))
    provider, _ = select_provider(NAME, q, sum(x.shape[2] for x in k))
    return provider.run(q, list(k), list(v), scale)


def why_no_dense_kernel(q: Tensor, keys: int) -> str | None:
    """Why PyTorch's attention is the better one for queries like these over so many keys; None where ours is. q may be a fake tensor."""
    if capturing():
        return "it is written in Gluon, which no compiler takes in"
    why = block_sparse_hopper.supports(Problem(q, q, q, q, q, q, BLOCK, 1.0))
    if why is not None:
        return why
    if q.shape[3] != HEAD_DIM:
        return f"ours is ahead at head_dim {HEAD_DIM}, found {q.shape[3]}"
    flops = 4 * q.numel() * keys
    if keys < LEAST_KEYS or flops < LEAST_FLOPS:
        return f"ours pays from {LEAST_KEYS} keys and {LEAST_FLOPS / 1e9:.0f} GFLOP on, found {keys} and {flops / 1e9:.0f}"
    return None


class Lists(NamedTuple):
    """All blocks of two sources for every query block, partly filled ones last: as :class:`Problem` takes them."""

    indices: Tensor
    counts: Tensor
    tails: Tensor
    valid: Tensor
    rows: Tensor


def _lists(device, batch: int, heads: int, queries: int, lengths: tuple[int, ...]) -> Lists:
    valid = torch.cat([block_valid(n, BLOCK, device) for n in lengths])
    partial = sum(n % BLOCK > 0 for n in lengths)
    shape = (batch, heads, num_blocks(queries, BLOCK))
    order = torch.argsort((valid < BLOCK).int(), stable=True).int()
    same = lambda n: torch.full(shape, n, dtype=torch.int32, device=device)
    rows = torch.arange(shape[2] * BLOCK, dtype=torch.int32, device=device)
    return Lists(order, same(len(valid)), same(partial), valid, torch.where(rows < queries, rows, -1))


def _run_hopper(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> Tensor:
    if len(k) > 2:  # order is nothing to a softmax
        longest = max(range(len(k)), key=lambda i: k[i].shape[2])
        k, v = ([x[longest], torch.cat([s for i, s in enumerate(x) if i != longest], 2)] for x in (k, v))
    lists = cached(_lists, q.device, *q.shape[:3], tuple(x.shape[2] for x in k))
    second = (k[1], v[1]) if len(k) == 2 else (None, None)
    indices = lists.indices.expand(*lists.counts.shape, -1)
    out, _ = block_sparse_hopper.run(Problem(
        q, k[0], v[0], indices, lists.counts, lists.valid, BLOCK, scale, lists.tails, *second, rows=lists.rows, length=q.shape[2],
        clean=True,  # copies past the end of a tensor read zeros
    ))  # fmt: skip
    return out


def _run_torch(q: Tensor, k: list[Tensor], v: list[Tensor], scale: float) -> Tensor:
    keys, values = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in (k, v))
    return laid_out(F.scaled_dot_product_attention(q, keys, values, scale=scale))


register_provider(NAME, Provider("hopper", _run_hopper, why_no_dense_kernel))
register_provider(NAME, Provider("torch", _run_torch, lambda q, keys: None))

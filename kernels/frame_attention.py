"""The operator ``li::frame_attention``: attention that reads only listed frames of a context, where they lie.

What remains of pruning where only cached keys and values are at hand: dropped frames were computed before, and are now
neither read nor copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .block_sparse import attend
from .layout import block_valid, num_blocks
from .plan import CONTEXT
from .problem import Problem, check_alike

__all__ = ["frame_attention"]


@torch.library.custom_op(
    "li::frame_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor[] k, Tensor[] v, int[] roles, Tensor frames, SymInt tokens, int block_size, float scale) -> Tensor",
)
def frame_attention(q, k, v, roles, frames, tokens, block_size, scale):
    """Softmax attention of all queries over all segments, of the context only over the listed frames.

    Args:
        q: ``[B, H, Lq, D]``, any strides.
        k, v: the segments in their order, each ``[B, H, Ls, D]``, any strides. Not concatenated.
        roles: one number a segment: 0 text, 1 context, 2 current; exactly one is context, of whole frames.
        frames: int64 ``[n]`` on q's device, n >= 1: frames of the context to read, ascending, each once. Not checked,
            since that would wait for the device.
        tokens: of a frame.
        block_size: of the attention kernel. The context is read in place where it divides ``tokens`` and the segment is
            contiguous; else the listed frames are copied first, with the same result.
        scale: factor on the scores, above 0.

    Returns:
        ``[B, H, Lq, D]``, contiguous, in q's dtype. There is no backward.

    Raises ValueError if segments, roles or frames don't fit; the sentence says which.
    """
    _check(q, k, v, roles, frames, tokens)
    at = list(roles).index(CONTEXT)
    others = [i for i in range(len(k)) if i != at]
    in_place = tokens % block_size == 0 and k[at].is_contiguous() and v[at].is_contiguous() and others
    if not in_place:
        entries = (frames[:, None] * tokens + torch.arange(tokens, device=frames.device)).flatten()
        pick = lambda x: torch.cat([s if i != at else s.index_select(2, entries) for i, s in enumerate(x)], 2)
        return F.scaled_dot_product_attention(q, pick(k), pick(v), scale=scale).contiguous()

    missing = num_blocks(q.shape[2], block_size) * block_size - q.shape[2]
    queries = F.pad(q, (0, 0, 0, missing)) if missing else q
    blocks = (frames[:, None] * (tokens // block_size) + torch.arange(tokens // block_size, device=frames.device)).flatten()
    past, past_lse = _over(queries, k[at], v[at], blocks, block_size, scale)
    rest_k, rest_v = (torch.cat([x[i] for i in others], 2) if len(others) > 1 else x[others[0]] for x in (k, v))
    every = torch.arange(num_blocks(rest_k.shape[2], block_size), device=q.device)
    rest, rest_lse = _over(queries, rest_k, rest_v, every, block_size, scale)
    # Two softmaxes over disjoint keys are one, weighted by their sums.
    total = torch.logaddexp(past_lse, rest_lse)
    weigh = lambda x, lse: x * (lse - total).exp().unsqueeze(-1).to(x.dtype)
    return (weigh(past, past_lse) + weigh(rest, rest_lse))[:, :, : q.shape[2]].contiguous()


@frame_attention.register_fake
def _(q, k, v, roles, frames, tokens, block_size, scale):
    return q.new_empty(q.shape)


def _over(queries, k, v, blocks, block_size, scale):
    """(out, lse) of all query blocks over the same key blocks."""
    batch, heads, padded, _ = queries.shape
    shape = (batch, heads, padded // block_size, len(blocks))
    indices = blocks.int().expand(shape).contiguous()
    counts = torch.full(shape[:3], len(blocks), dtype=torch.int32, device=k.device)
    valid = block_valid(k.shape[2], block_size, k.device)
    return attend(Problem(queries, k, v, indices, counts, valid, block_size, scale))


def _check(q, k, v, roles, frames, tokens) -> None:
    if len(k) != len(roles) or [x.shape for x in v] != [x.shape for x in k] or list(roles).count(CONTEXT) != 1:
        raise ValueError(f"k, v and roles need the same segments, one of them context (1); found {[tuple(x.shape) for x in k]}, "
                         f"{[tuple(x.shape) for x in v]} and roles {list(roles)}.")
    check_alike(q, (*k, *v))
    length = k[list(roles).index(CONTEXT)].shape[2]
    if tokens < 1 or length % tokens:
        raise ValueError(f"The context's {length} tokens are no whole frames of {tokens}.")
    if frames.dtype != torch.int64 or frames.dim() != 1 or not 1 <= len(frames) <= length // tokens or frames.device != q.device:
        raise ValueError(f"frames must be int64 [1 ... {length // tokens}] on {q.device}; found {frames.dtype} {list(frames.shape)} on {frames.device}.")

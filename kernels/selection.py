"""Which key blocks each query block keeps: scores from block means, forced blocks, exact top-k, lists on the device.

After the paper (arXiv 2605.31158, 3-D block-sparse attention; method notes C.3), with its numerical defects mended:
means divide by the true number of tokens, padding takes no part, and scores are fp32 (in bf16 they tie at the threshold
and ties fall to one region of the video).
"""

from __future__ import annotations

import functools

import torch

from ._compat import real_tensors

__all__ = ["block_means", "block_scores", "choose_blocks", "select_blocks"]


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    q_valid: torch.Tensor,
    kv_valid: torch.Tensor,
    *,
    block_size: int,
    forced: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    keep: int | tuple[int, ...],
    scale: float,
    sub_blocks: int = 1,
    pitch: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists for :func:`~li_compile.kernels.block_sparse.block_sparse_attention`.

    Args:
        q: ``[B, H, nq * block_size, D]``, k: ``[B, H, nk * block_size, D]``, in block order; padding may hold anything.
        q_valid, kv_valid: int32 ``[nq]``, ``[nk]``: true tokens of each block, at least 1.
        block_size: tokens of a block.
        forced: bool ``[nq, nk]``: blocks that are always kept, on top of the ``keep``. None: none.
        candidates: bool ``[nq, nk]``: blocks that may be chosen by score. None: all; forced ones don't count again.
        keep: how many candidates to choose, for all query blocks or one number for each; all of them if there are fewer.
        scale: the attention's factor on the scores.
        sub_blocks: 1 scores by the product of block means. 4 cuts both blocks in four and takes the log-sum-exp over
            pairs of sub-block means, which follows the softmax mass better (recall .651 to .666, kernels notes 6).
        pitch: width of the lists, if fewer than nk are known to suffice. Longer lists would be cut.

    Returns:
        ``(block_indices, block_counts)``: int32 ``[B, H, nq, pitch]``, ascending, zero past the count; int32
        ``[B, H, nq]``. Equal scores at the threshold are broken arbitrarily; the count is always exact.

    Nothing is read back to the host. Raises ValueError for sizes that don't fit.
    """
    q_means, q_real = block_means(q, q_valid, block_size, sub_blocks)
    k_means, k_real = block_means(k, kv_valid, block_size, sub_blocks)
    scores = block_scores(q_means, k_means, q_real, k_real, scale, sub_blocks)
    return choose_blocks(scores, forced=forced, candidates=candidates, keep=keep, pitch=pitch)


def block_means(x, valid, block_size: int, sub_blocks: int = 1, padding_is_zero: bool = False):
    """Means over the true tokens of each (sub-)block.

    Args:
        x: ``[B, H, n * block_size, D]``; valid: int32 ``[n]``.
        padding_is_zero: the caller vouches for it, which saves a pass over x.

    Returns:
        fp32 (fp64 for fp64) ``[B, H, n * sub_blocks, D]``, zero where a sub-block is empty; bool ``[n * sub_blocks]``,
        false there.
    """
    if block_size % sub_blocks or x.shape[2] != valid.numel() * block_size:
        raise ValueError(
            f"{sub_blocks} sub-blocks must divide the block size {block_size}, and {valid.numel()} blocks must fill the "
            f"length; found length {x.shape[2]}."
        )
    size = block_size // sub_blocks
    counts = (valid[:, None] - size * torch.arange(sub_blocks, device=x.device)).clamp(0, size).flatten()
    parts = x.unflatten(2, (-1, size))
    if not padding_is_zero:
        real = torch.arange(size, device=x.device) < counts[:, None]
        parts = torch.where(real[:, :, None], parts, torch.zeros((), dtype=x.dtype, device=x.device))
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return parts.sum(-2, dtype=accumulate) / counts.clamp(min=1)[:, None], counts > 0


def block_scores(q_means, k_means, q_real, k_real, scale: float, sub_blocks: int = 1) -> torch.Tensor:
    """Scores ``[B, H, nq, nk]`` from :func:`block_means` of queries and keys, in the means' dtype."""
    scores = (q_means * scale) @ k_means.transpose(-1, -2)
    if sub_blocks == 1:
        return scores
    scores = torch.where(q_real[:, None] & k_real, scores, float("-inf"))
    return scores.unflatten(3, (-1, sub_blocks)).unflatten(2, (-1, sub_blocks)).logsumexp((3, 5))


def choose_blocks(scores, *, forced=None, candidates=None, keep: int | tuple[int, ...], pitch: int | None = None):
    """Forced blocks and the best ``keep`` other candidates, as lists; arguments as in :func:`select_blocks`."""
    blocks = scores.shape[-1]
    most = keep if isinstance(keep, int) else max(keep, default=0)
    if most < 0 or (not isinstance(keep, int) and len(keep) != scores.shape[2]):
        raise ValueError(f"keep must be at least 0, one number or one for each of {scores.shape[2]} query blocks; found {keep}.")
    most = min(most, blocks)
    if forced is None and candidates is None and isinstance(keep, int):  # the common case, and a shorter way
        indices = scores.topk(most, -1, sorted=False).indices.sort(-1).values.int()
        return _to_pitch(indices, pitch), torch.full(scores.shape[:3], most, dtype=torch.int32, device=scores.device)

    allowed = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device) if candidates is None else candidates
    if forced is not None:
        allowed = allowed & ~forced
    best = scores.masked_fill(~allowed, float("-inf")).topk(most, -1).indices
    chosen = allowed.expand_as(scores).gather(-1, best)  # fewer candidates than keep: the surplus is none
    if not isinstance(keep, int):
        chosen = chosen & (torch.arange(most, device=scores.device) < _row_numbers(keep, scores.device)[:, None])
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, best, chosen)
    if forced is not None:
        kept |= forced
    counts = kept.sum(-1, dtype=torch.int32)
    order = torch.arange(blocks, device=scores.device)
    indices = torch.where(kept, order, blocks).sort(-1).values
    return _to_pitch(torch.where(indices == blocks, 0, indices).int(), pitch), counts


def _to_pitch(indices, pitch):
    if pitch is None or pitch == indices.shape[-1]:
        return indices.contiguous()
    if pitch < indices.shape[-1]:
        return indices[..., :pitch].contiguous()
    return torch.nn.functional.pad(indices, (0, pitch - indices.shape[-1]))


@functools.lru_cache(maxsize=64)
def _row_numbers(keep: tuple[int, ...], device) -> torch.Tensor:
    with real_tensors():  # copied to the device once, in the warm-up
        return torch.tensor(keep, dtype=torch.int32).to(device)

"""Block-sparse attention in plain PyTorch: the meaning that every other provider is tested against."""

from __future__ import annotations

import torch

__all__ = ["run", "supports"]


def supports(q, k, v, block_indices, block_counts, kv_valid, block_size, scale) -> str | None:
    """Runs whatever the contract allows, on any device."""
    return None


def run(q, k, v, block_indices, block_counts, kv_valid, block_size: int, scale: float):
    """See :func:`li_compile.kernels.block_sparse.block_sparse_attention`. Computes in fp32, or fp64 for fp64 inputs.

    One query block at a time, with its kept blocks gathered: what is not kept is never read, so poison in it cannot
    leak. Slots past the count, and keys past ``kv_valid``, are set to zero and masked. No host synchronisation.
    """
    batch, heads, length, dim = q.shape
    pitch = block_indices.shape[-1]
    compute = torch.promote_types(q.dtype, torch.float32)
    k_blocks = k.unflatten(2, (-1, block_size))
    v_blocks = v.unflatten(2, (-1, block_size))
    b = torch.arange(batch, device=q.device)[:, None, None]
    h = torch.arange(heads, device=q.device)[None, :, None]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    if pitch == 0:
        return out, lse
    for block in range(length // block_size):
        rows = slice(block * block_size, (block + 1) * block_size)
        used = torch.arange(pitch, device=q.device) < block_counts[:, :, block, None]  # [B, H, pitch]
        index = torch.where(used, block_indices[:, :, block], 0).long()
        valid = torch.where(used, kv_valid[index], 0)
        real = (torch.arange(block_size, device=q.device) < valid[..., None]).flatten(2)  # [B, H, pitch * block_size]
        keys = k_blocks[b, h, index].flatten(2, 3).to(compute).masked_fill(~real[..., None], 0)
        values = v_blocks[b, h, index].flatten(2, 3).to(compute).masked_fill(~real[..., None], 0)
        scores = (q[:, :, rows].to(compute) @ keys.transpose(-1, -2)) * scale
        scores = scores.masked_fill(~real[:, :, None], float("-inf"))
        block_lse = scores.logsumexp(-1, keepdim=True)
        weights = torch.exp(scores - block_lse.masked_fill(block_lse.isneginf(), 0))  # a row without keys: all zeros
        out[:, :, rows] = (weights @ values).to(q.dtype)
        lse[:, :, rows] = block_lse.squeeze(-1).float()
    return out, lse

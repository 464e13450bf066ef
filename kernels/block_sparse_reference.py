"""Block-sparse attention in plain PyTorch: the meaning that every other provider is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layout import num_blocks
from .problem import Problem

__all__ = ["run", "supports"]


def supports(problem: Problem) -> str | None:
    """Runs whatever the contract allows, on any device."""
    return None


def run(problem: Problem):
    """See :func:`li_compile.kernels.block_sparse.block_sparse_attention`. Computes in fp32, or fp64 for fp64 inputs.

    One query block at a time, with its kept blocks gathered: what is not kept is never read, so poison in it cannot
    leak. Slots past the count, and keys past ``kv_valid``, are set to zero and masked.
    """
    q, size, indices, counts = problem.whole_queries, problem.block_size, problem.block_indices, problem.block_counts
    batch, heads, length, _ = q.shape
    pitch = indices.shape[-1]
    compute = torch.promote_types(q.dtype, torch.float32)
    whole = lambda x: F.pad(x, (0, 0, 0, num_blocks(x.shape[2], size) * size - x.shape[2])).unflatten(2, (-1, size))
    blocks = [torch.cat([whole(x) for x in parts], 2) for parts in zip(*((k, v) for k, v, _ in problem.sources))]
    b = torch.arange(batch, device=q.device)[:, None, None]
    h = torch.arange(heads, device=q.device)[None, :, None]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
    for block in range(length // size):
        rows = slice(block * size, (block + 1) * size)
        queries = q[:, :, rows].to(compute)
        used = torch.arange(pitch, device=q.device) < counts[:, :, block, None]  # [B, H, pitch]
        keys, values, scores = [], [], []
        if pitch and blocks:
            index = torch.where(used, indices[:, :, block], 0).long()
            valid = torch.where(used, problem.kv_valid[index], 0)
            real = (torch.arange(size, device=q.device) < valid[..., None]).flatten(2)  # [B, H, pitch * size]
            keys, values = (x[b, h, index].flatten(2, 3).to(compute).masked_fill(~real[..., None], 0) for x in blocks)
            scores = ((queries @ keys.transpose(-1, -2)) * problem.scale).masked_fill(~real[:, :, None], float("-inf"))
        if problem.summary_k is not None:
            bias = problem.summary_bias[:, :, block, None]
            whole = (queries @ problem.summary_k.to(compute).transpose(-1, -2)) * problem.scale + bias
            whole = torch.where(bias.isneginf(), float("-inf"), whole)
            means = problem.summary_v.to(compute)
            scores, values = (torch.cat((scores, whole), -1), torch.cat((values, means), 2)) if len(scores) else (whole, means)
        if not len(scores):
            continue
        block_lse = scores.logsumexp(-1, keepdim=True)
        weights = torch.exp(scores - block_lse.masked_fill(block_lse.isneginf(), 0))  # a row without keys: all zeros
        out[:, :, rows] = (weights @ values).to(q.dtype)
        lse[:, :, rows] = block_lse.squeeze(-1).float()
    return problem.placed(out), lse

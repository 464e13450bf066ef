"""Block-sparse attention on the CPU: gather the kept blocks of a few query blocks, then run PyTorch's dense kernel.

Two things make this faster than dense attention at densities around 0.3 to 0.45, where a mask alone would not be:

- The kept blocks are gathered into reused memory, a few query blocks at a time (``GROUP_BYTES``). Fresh memory would
  cost as much in page faults as the gather itself; groups beyond the L2 caches lose a tenth and more; much smaller
  ones add thread barriers, of which every one may take a scheduler's slice where the machine is busy.
- Blocks that every query block keeps and that lie side by side (in decode: the current chunk) are not gathered at all:
  one dense call over a view, merged with the rest by log-sum-exp.

Measured against FlexAttention's compiled CPU kernel and against batched matmuls in benchmarks/attention.py. Batched
matmuls are as fast on an idle machine and far slower on a busy one, having more barriers.
Lists are read on the host here, which synchronises nothing: they are in host memory already.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from ._compat import cpu_flash
from .layout import num_blocks
from .problem import Problem
from .workspace import scratch

__all__ = ["run", "supports"]

GROUP_BYTES = 2**20  # of gathered K and V at a time and thread: a common size of L2
SHARED_BLOCKS = 2  # shorter runs of shared blocks are gathered like the rest
NEG_INF = float("-inf")


def supports(problem: Problem) -> str | None:
    """fp32, bf16 and fp16 CPU tensors."""
    if problem.q.device.type != "cpu":
        return f"it needs CPU tensors, found {problem.q.device.type}"
    if problem.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in fp32, bf16 or fp16, found {problem.q.dtype}"
    return None


def run(problem: Problem):
    """See :func:`li_compile.kernels.block_sparse.block_sparse_attention`."""
    q, size = problem.whole_queries.contiguous(), problem.block_size
    rows, pitch = q.shape[0] * q.shape[1] * problem.query_blocks, problem.block_indices.shape[-1]
    listed = torch.arange(pitch) < problem.block_counts.reshape(rows, 1)
    index = problem.block_indices.reshape(rows, pitch).long()
    parts = []
    for k, v, first in problem.sources:
        blocks = num_blocks(k.shape[2], size)
        here = index - first
        used = listed & (here >= 0) & (here < blocks)
        here = torch.where(used, here, 0)
        valid = problem.kv_valid[first : first + blocks]
        start, stop = _shared_run(here, used, valid, size)
        if stop - start >= SHARED_BLOCKS:
            shared = slice(start * size, (stop - 1) * size + int(valid[stop - 1]))
            parts.append(cpu_flash(q, k[:, :, shared], v[:, :, shared], problem.scale))
            used &= (here < start) | (here >= stop)
        counts = used.sum(1)
        if (width := int(counts.max()) if rows else 0) > 0:
            k, v = (F.pad(x, (0, 0, 0, blocks * size - x.shape[2])).contiguous() for x in (k, v))
            slots = torch.argsort(~used, dim=1, stable=True)[:, :width]  # close the gaps, keeping the order
            parts.append(_gathered(q, k, v, here.gather(1, slots), used.gather(1, slots), valid, size, problem.scale))
    if problem.summary_k is not None:
        parts.append(_summaries(problem))
    if not parts:
        return problem.placed(torch.zeros_like(q)), torch.full(q.shape[:3], NEG_INF)
    out, lse = parts[0]
    for more, more_lse in parts[1:]:
        total = torch.logaddexp(lse, more_lse)
        reference = total.masked_fill(total.isneginf(), 0)  # rows without any key yet: weights of 0, not NaN
        out.mul_((lse - reference).exp_().unsqueeze(-1).to(out.dtype))
        out.addcmul_(more, (more_lse - reference).exp_().unsqueeze(-1).to(out.dtype))
        lse = total
    return problem.placed(out), lse


def _shared_run(index, used, valid, block_size) -> tuple[int, int]:
    """The longest run [first, last) of blocks that every row keeps; whole ones, but for the last, which may be partial."""
    kept = torch.zeros(len(valid), dtype=torch.int64).index_add_(0, index.flatten(), used.flatten().long())
    everywhere = kept == index.shape[0]
    whole = (everywhere & (valid == block_size)).tolist()
    best, at = (0, 0), 0
    for value, group in itertools.groupby(whole):
        end = at + sum(1 for _ in group)
        if value:
            last = end + int(end < len(valid) and bool(everywhere[end]) and int(valid[end]) > 0)
            best = max(best, (at, last), key=lambda run: run[1] - run[0])
        at = end
    return best


def _summaries(problem: Problem):
    """Attention over the summaries of blocks alone: few keys, so in plain products."""
    q, k, v = (x.float() for x in (problem.q, problem.summary_k, problem.summary_v))
    bias = problem.summary_bias.repeat_interleave(problem.block_size, dim=2)
    scores = torch.where(bias.isneginf(), NEG_INF, (q * problem.scale) @ k.mT + bias)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1))
    return (weights @ v).to(problem.q.dtype), lse


def _gathered(q, k, v, index, used, kv_valid, block_size, scale):
    """Attention over listed blocks: index, used [rows, width] -> out like q, lse [B, H, L]; a row is a query block."""
    rows, width = index.shape
    dim = q.shape[-1]
    per_row = 2 * width * block_size * dim * q.element_size()
    size = max(1, min(rows, GROUP_BYTES * torch.get_num_threads() // per_row))
    if size > torch.get_num_threads():
        size -= size % torch.get_num_threads()

    valid = torch.where(used, kv_valid.long()[index], 0)
    masked = (valid < block_size).any(1)
    any_masked = bool(masked.any())
    blocks = k.shape[2] // block_size
    flat = index + (torch.arange(rows) // (q.shape[2] // block_size) * blocks)[:, None]
    queries = q.view(rows, block_size, dim)
    key_rows, value_rows = k.view(-1, block_size * dim), v.view(-1, block_size * dim)
    key_buffer = scratch("keys", (size * width, block_size * dim), q)
    value_buffer = scratch("values", (size * width, block_size * dim), q)
    out = torch.empty_like(q)
    out_rows = out.view(rows, block_size, dim)
    lse = torch.empty(rows, block_size)
    for start in range(0, rows, size):
        group = slice(start, min(start + size, rows))
        n = group.stop - start
        keys, values = key_buffer[: n * width], value_buffer[: n * width]
        ids = flat[group].reshape(-1)
        torch.index_select(key_rows, 0, ids, out=keys)
        torch.index_select(value_rows, 0, ids, out=values)
        bias = None
        if any_masked and bool(masked[group].any()):
            bias = _mask_padding(keys, values, valid[group].reshape(-1), block_size).to(q.dtype).view(1, n, 1, width * block_size)
        shape = (1, n, width * block_size, dim)
        o, l = cpu_flash(queries[group].unsqueeze(0), keys.view(shape), values.view(shape), scale, bias)
        out_rows[group] = o[0]
        lse[group] = l[0]
    if any_masked:
        empty = valid.sum(1) == 0
        if bool(empty.any()):
            out_rows[empty] = 0
            lse[empty] = NEG_INF
    return out, lse.view(q.shape[:3])


def _mask_padding(keys, values, valid, block_size):
    """Zero what lies past ``valid`` in partly filled blocks (it may be NaN) and return the bias that masks it."""
    padding = torch.arange(block_size) >= valid[:, None]
    partial = (valid < block_size).nonzero().flatten()
    for rows in (keys, values):
        blocks = rows.view(rows.shape[0], block_size, -1)
        blocks[partial] = blocks[partial].masked_fill_(padding[partial].unsqueeze(-1), 0)
    return torch.zeros(padding.shape).masked_fill_(padding, NEG_INF)

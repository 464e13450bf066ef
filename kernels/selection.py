"""The operator ``li::choose_blocks``: which key blocks each query block keeps. Two launches, lists on the device.

After the paper (arXiv 2605.31158, 3-D block-sparse attention; method notes C.3), with its numerical defects mended:
means divide by the true number of tokens, padding takes no part, and scores are fp32 (in bf16 they tie at the threshold
and ties fall to one region of the video).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._compat import capability, has_triton, interpreting
from .launching import capturing, launcher, on_device
from .providers import Provider, register_provider, select_provider

__all__ = ["Choice", "block_scores", "choose", "choose_blocks", "part_counts"]

NAME = "choose_blocks"


@dataclass(frozen=True)
class Choice:
    """What is chosen from and how; :func:`choose_blocks` has the meaning of each."""

    q_means: Tensor
    k_means: Tensor
    q_counts: Tensor
    k_counts: Tensor
    valid: Tensor
    keep: Tensor
    forced: Tensor | None
    first: int
    block_size: int
    sub_blocks: int
    scale: float
    pitch: int
    summary: bool

    @property
    def query_blocks(self) -> int:
        return self.q_means.shape[2] // self.sub_blocks

    @property
    def candidates(self) -> int:
        return self.k_means.shape[2] // self.sub_blocks


@torch.library.custom_op(
    "li::choose_blocks",
    mutates_args=(),
    schema="(Tensor q_means, Tensor k_means, Tensor q_counts, Tensor k_counts, Tensor valid, Tensor keep, Tensor? forced, "
    "int first, int block_size, int sub_blocks, float scale, int pitch, bool summary) -> (Tensor, Tensor, Tensor, Tensor)",
)
def choose_blocks(q_means, k_means, q_counts, k_counts, valid, keep, forced, first, block_size, sub_blocks, scale, pitch, summary):
    """Lists of key blocks for :func:`~li_compile.kernels.block_sparse.block_sparse_attention`.

    Blocks ``first`` to ``first + candidates - 1`` are chosen from; those before and after are kept by every query block.

    Args:
        q_means: fp32 ``[B, H, nq * sub_blocks, D]``, means over the true tokens of each part of a query block.
        k_means: fp32 ``[B, H, candidates * sub_blocks, D]``, likewise of the candidates' keys.
        q_counts, k_counts: int32, true tokens of each part; parts with none take no part.
        valid: int32 ``[total]``: true tokens of every block, to tell whole from partly filled ones. At least 1.
        keep: int32 ``[1 or H, 1 or nq]``: how many candidates to choose by score; all, if there are fewer.
        forced: bool ``[nq, candidates]`` or None: candidates that are kept on top of those.
        first: number of the first candidate.
        block_size: tokens of a whole block. sub_blocks: parts of a block. With 1, blocks are scored by the product of
            their means; with more, by the log-sum-exp over pairs of parts, which follows the softmax's mass better
            (recall .651 to .666 at 4, kernels notes 6).
        scale: the attention's factor on the scores.
        pitch: width of the lists; longer ones would overflow.
        summary: also return what :func:`block_sparse_attention` takes as ``summary_bias``.

    Returns:
        ``(block_indices, block_counts, tails, summary_bias)``: int32 ``[B, H, nq, pitch]``, whole blocks ascending and
        then partly filled ones ascending; int32 ``[B, H, nq]``; int32 ``[B, H, nq]``, how many of the list are partly
        filled; fp32 ``[B, H, nq, candidates]`` or empty. The choice is exact; of equal scores at the threshold the first
        are taken.

    Nothing is read back to the host.
    """
    return choose(Choice(q_means, k_means, q_counts, k_counts, valid, keep, forced, first, block_size, sub_blocks, scale, pitch, summary))


@choose_blocks.register_fake
def _(q_means, k_means, q_counts, k_counts, valid, keep, forced, first, block_size, sub_blocks, scale, pitch, summary):
    return _outputs(Choice(q_means, k_means, q_counts, k_counts, valid, keep, forced, first, block_size, sub_blocks, scale, pitch, summary))


def choose(choice: Choice):
    """:func:`choose_blocks` without the dispatcher around it, for operators that are opaque already."""
    heads, blocks = choice.q_means.shape[1], choice.query_blocks
    if choice.keep.dim() != 2 or choice.keep.shape[0] not in (1, heads) or choice.keep.shape[1] not in (1, blocks):
        raise ValueError(f"keep must be [1 or {heads} heads, 1 or {blocks} query blocks]; found {tuple(choice.keep.shape)}.")
    if choice.forced is not None and choice.forced.shape != (blocks, choice.candidates):
        raise ValueError(f"forced must be [{blocks}, {choice.candidates}]; found {tuple(choice.forced.shape)}.")
    if choice.valid.shape[0] < choice.first + choice.candidates:
        raise ValueError(f"valid must cover {choice.first + choice.candidates} blocks; found {choice.valid.shape[0]}.")
    provider, _ = select_provider(NAME, choice)
    return provider.run(choice)


def part_counts(valid: Tensor, block_size: int, sub_blocks: int) -> Tensor:
    """True tokens of each part of blocks with ``valid`` ones: int32 ``[n]`` -> ``[n * sub_blocks]``."""
    size = block_size // sub_blocks
    starts = size * torch.arange(sub_blocks, device=valid.device, dtype=torch.int32)
    return (valid[:, None] - starts).clamp(0, size).flatten()


def block_scores(choice: Choice) -> Tensor:
    """Scores ``[B, H, nq, candidates]``, in the means' dtype."""
    scores = (choice.q_means * choice.scale) @ choice.k_means.transpose(-1, -2)
    if choice.sub_blocks == 1:
        return scores
    real = (choice.q_counts > 0)[:, None] & (choice.k_counts > 0)
    scores = torch.where(real, scores, float("-inf"))
    return scores.unflatten(3, (-1, choice.sub_blocks)).unflatten(2, (-1, choice.sub_blocks)).logsumexp((3, 5))


def _outputs(choice: Choice):
    batch, heads = choice.q_means.shape[:2]
    empty = lambda *shape, dtype=torch.int32: torch.empty(*shape, dtype=dtype, device=choice.q_means.device)
    lists = (batch, heads, choice.query_blocks)
    bias = empty(*lists, choice.candidates, dtype=torch.float32) if choice.summary else empty(0, dtype=torch.float32)
    return empty(*lists, choice.pitch), empty(*lists), empty(*lists), bias


def _run_torch(choice: Choice):
    """In plain PyTorch: the meaning that the kernel is tested against, and what runs on the CPU."""
    device, total, candidates = choice.q_means.device, choice.valid.shape[0], choice.candidates
    scores = block_scores(choice)
    allowed = torch.ones(scores.shape[2:], dtype=torch.bool, device=device) if choice.forced is None else ~choice.forced
    order = torch.sort(scores.masked_fill(~allowed, float("-inf")), dim=-1, descending=True, stable=True).indices
    best = torch.arange(candidates, device=device) < choice.keep[..., None]  # [1 or H, 1 or nq, candidates], by rank
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=device).scatter_(-1, order, best.expand_as(scores)) & allowed
    if choice.forced is not None:
        chosen |= choice.forced
    kept = torch.ones(*scores.shape[:3], total, dtype=torch.bool, device=device)
    kept[..., choice.first : choice.first + candidates] = chosen
    partial = choice.valid < choice.block_size
    numbers = torch.where(partial, total, 0) + torch.arange(total, device=device)
    listed = torch.where(kept, numbers, 2 * total).sort(-1).values[..., : choice.pitch]
    indices = torch.where(listed == 2 * total, 0, listed % total).int()
    if choice.pitch > total:
        indices = torch.nn.functional.pad(indices, (0, choice.pitch - total))
    counts, tails = kept.sum(-1, dtype=torch.int32), (kept & partial).sum(-1, dtype=torch.int32)
    bias = torch.empty(0, device=device)
    if choice.summary:
        sizes = choice.valid[choice.first : choice.first + candidates].float().log()
        bias = torch.where(chosen, float("-inf"), sizes)
    return indices.contiguous(), counts, tails, bias


WIDEST = 4096  # candidates that a program of the kernel can hold


def _supports_triton(choice: Choice) -> str | None:
    """CUDA (or the interpreter), fp32 means, head_dim a power of two from 16 to 256, 1 to 8 sub-blocks, 4096 candidates."""
    q = choice.q_means
    if not has_triton():
        return "Triton is not installed"
    if not interpreting() and (q.device.type != "cuda" or torch.version.hip):
        return f"it needs an NVIDIA GPU, found {q.device.type}"
    if q.dtype != torch.float32:
        return f"it takes fp32 means, found {q.dtype}"
    if q.shape[-1] & (q.shape[-1] - 1) or not 16 <= q.shape[-1] <= 256:
        return f"it takes a power of two from 16 to 256 as head_dim, found {q.shape[-1]}"
    if choice.sub_blocks not in (1, 2, 4, 8):
        return f"it takes 1, 2, 4 or 8 sub-blocks, found {choice.sub_blocks}"
    around = max(choice.first, choice.valid.shape[0] - choice.first - choice.candidates)
    if max(choice.candidates, around) > WIDEST:
        return f"it holds {WIDEST} blocks, found {choice.candidates} to choose from and {around} around them"
    return None


class Launch(NamedTuple):
    """Scores: query blocks a program, candidates a product, programs that share a row's candidates, warps. Ranks: query blocks a program, warps."""

    rows: int
    chunk: int
    splits: int
    warps: int
    ranked: int
    rank_warps: int


def launch_config(sub_blocks: int, width: int, around: int, capability: int) -> Launch:
    """Compiled without spills. On Hopper products of 64 rows, which its warp groups multiply, are the faster ones (docs/kernels.md). A warp
    ranks up to 512 candidates by itself: nothing to wait for."""
    rows, splits = (64 // sub_blocks, 2) if capability == 90 and sub_blocks > 1 else (32 // sub_blocks, 4)
    return Launch(rows, 64 // sub_blocks, splits, warps=4, ranked=1, rank_warps=max(1, min(8, max(width, around) // 512)))


def _run_triton(choice: Choice):
    from ._select_kernel import rank_kernel, score_kernel

    outputs = indices, counts, tails, bias = _outputs(choice)
    batch, heads, blocks = counts.shape
    scores = torch.empty(*counts.shape, choice.candidates, dtype=torch.float32, device=counts.device)
    total = choice.valid.shape[0]
    power = lambda n: 1 << max(n - 1, 0).bit_length()
    width = max(power(choice.candidates), 16)
    around = max(power(max(choice.first, total - choice.first - choice.candidates)), 16)
    launch = launch_config(choice.sub_blocks, width, around, capability(counts.device))
    keep = choice.keep
    strides = [0 if size == 1 else stride for size, stride in zip(keep.shape, keep.stride())]
    forced = choice.forced
    if forced is not None:  # as bytes; Inductor 2.11 cannot view a constant of bools, and copies it
        forced = forced.to(torch.uint8) if capturing() else forced.contiguous().view(torch.uint8)
    with on_device(counts.device):
        launcher(score_kernel)[(-(-blocks // launch.rows), launch.splits, batch * heads)](
            choice.q_means.contiguous(), choice.k_means.contiguous(), choice.q_counts, choice.k_counts, scores, blocks, choice.candidates,
            choice.scale, DIM=choice.q_means.shape[-1], SUB=choice.sub_blocks, ROWS=launch.rows, CHUNK=launch.chunk, num_stages=2,
            num_warps=launch.warps,
        )  # fmt: skip
        launcher(rank_kernel)[(-(-blocks // launch.ranked), heads, batch)](
            scores, choice.valid, choice.valid if forced is None else forced, keep, indices, counts, tails, bias,
            heads, blocks, choice.candidates, choice.first, total, choice.pitch, *strides, ROWS=launch.ranked, WIDTH=width, AROUND=around,
            BLOCK=choice.block_size, HAS_FORCED=forced is not None, SUMMARY=choice.summary, num_stages=2, num_warps=launch.rank_warps,
        )  # fmt: skip
    return outputs


register_provider(NAME, Provider("cpu", _run_torch, lambda c: None if c.q_means.device.type == "cpu" else "it needs CPU tensors"))
register_provider(NAME, Provider("triton", _run_triton, _supports_triton))
register_provider(NAME, Provider("reference", _run_torch, lambda choice: None))

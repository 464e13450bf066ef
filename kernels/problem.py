"""One call of block-sparse attention, as every provider is given it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import num_blocks

__all__ = ["Problem", "check_alike"]


def check_alike(q: Tensor, segments) -> None:
    """Raise ValueError unless all segments of keys and values ``[B, H, any, D]`` are like q but for the length."""
    for x in segments:
        if x.dim() != 4 or x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"Every segment must share batch, heads, head_dim, dtype and device with q, {tuple(q.shape)} {q.dtype} "
                             f"{q.device}; found {tuple(x.shape)} {x.dtype} {x.device}.")  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What ``li::block_sparse_attention`` takes (its docstring has shapes and meaning), and how it is to be written.

    Attributes beyond the operator's:
        rows: int32 ``[nq * block_size]`` or None: where each query row goes in the output, -1 for padding. None: to its
            own place. With it, the storage of q may end at its last true row.
        length: rows of the output, ``nq * block_size`` without ``rows``.
        clean: the caller vouches that padding in V is finite, which saves a pass over it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_indices: Tensor
    block_counts: Tensor
    kv_valid: Tensor
    block_size: int
    scale: float
    tails: Tensor | None = None
    current_k: Tensor | None = None
    current_v: Tensor | None = None
    summary_k: Tensor | None = None
    summary_v: Tensor | None = None
    summary_bias: Tensor | None = None
    rows: Tensor | None = None
    length: int | None = None
    clean: bool = False

    @property
    def query_blocks(self) -> int:
        return num_blocks(self.q.shape[2], self.block_size)

    @property
    def first_blocks(self) -> int:
        """Blocks in k; those after are in current_k."""
        return num_blocks(self.k.shape[2], self.block_size)

    @property
    def lists(self) -> tuple[Tensor, int]:
        """The lists as kernels read them, and the distance from one to the next: 0 where all are one (expanded)."""
        indices = self.block_indices
        if indices.stride()[:3] == (0, 0, 0):
            return indices[0, 0, 0].contiguous(), 0
        return indices.contiguous(), indices.shape[-1]

    @property
    def whole_queries(self) -> Tensor:
        """q with whatever is missing of its last block, as zeros."""
        missing = self.query_blocks * self.block_size - self.q.shape[2]
        return F.pad(self.q, (0, 0, 0, missing)) if missing else self.q

    def new_lse(self) -> Tensor:
        """Memory for the log-sum-exps, fp32 ``[B, H, nq * block_size]``."""
        return self.q.new_empty(*self.q.shape[:2], self.query_blocks * self.block_size, dtype=torch.float32)

    @property
    def sources(self) -> list[tuple[Tensor, Tensor, int]]:
        """(keys, values, number of the first block) of each source that holds any."""
        both = [(self.k, self.v, 0), (self.current_k, self.current_v, self.first_blocks)]
        return [source for source in both if source[0] is not None and source[0].shape[2]]

    def new_out(self) -> Tensor:
        """Memory for the output, ``[B, H, length, D]``; with ``rows`` in [B, length, H, D] order, as models read it."""
        batch, heads, packed, dim = self.q.shape
        if self.rows is None:
            return self.q.new_empty(batch, heads, packed, dim)
        return self.q.new_empty(batch, self.length, heads, dim).transpose(1, 2)

    def placed(self, out: Tensor) -> Tensor:
        """``out`` in block order brought to where it goes, for providers that don't write it there themselves."""
        if self.rows is None:
            return out
        places = torch.where(self.rows < 0, self.rows.numel(), self.rows).argsort()[: self.length]  # padding last; nothing is read back
        return self.new_out().copy_(out.index_select(2, places))

    def check(self) -> None:
        """Raise ValueError where shapes, dtypes or devices don't fit together."""
        q, k, v, size = self.q, self.k, self.v, self.block_size
        if size < 1:
            raise ValueError(f"block_size must be at least 1; found {size}.")
        if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
            raise ValueError(
                "q, k and v must be [B, H, L, D] with the same B, H and D, and k and v of one shape; "
                f"found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
            )
        if (self.current_k is None) != (self.current_v is None):
            raise ValueError("current_k and current_v go together; give both or neither.")
        blocks = self.first_blocks
        if self.current_k is not None:
            if self.current_k.shape != self.current_v.shape or self.current_k.shape[:2] != k.shape[:2] or self.current_k.shape[3:] != k.shape[3:]:
                raise ValueError(f"current_k and current_v must be like k but for the length; found {tuple(self.current_k.shape)} "
                                 f"and {tuple(self.current_v.shape)} beside {tuple(k.shape)}.")  # fmt: skip
            blocks += num_blocks(self.current_k.shape[2], size)
        if self.rows is None and q.shape[2] % size:
            raise ValueError(f"Queries must be whole blocks of {size}; found {q.shape[2]}.")
        lists = (*q.shape[:2], self.query_blocks)
        if self.block_indices.shape[:3] != lists or self.block_counts.shape != lists or self.kv_valid.shape != (blocks,):
            raise ValueError(
                f"Expected block_indices {[*lists, 'pitch']}, block_counts {list(lists)} and kv_valid [{blocks}]; "
                f"found {list(self.block_indices.shape)}, {list(self.block_counts.shape)} and {list(self.kv_valid.shape)}."
            )
        if self.tails is not None and self.tails.shape != lists:
            raise ValueError(f"tails must be like block_counts, {list(lists)}; found {list(self.tails.shape)}.")
        summary = (self.summary_k, self.summary_v, self.summary_bias)
        if any(x is None for x in summary) != all(x is None for x in summary):
            raise ValueError("summary_k, summary_v and summary_bias go together; give all or none.")
        if self.summary_k is not None:
            means = self.summary_k.shape[2]
            if self.summary_k.shape != (*q.shape[:2], means, q.shape[3]) or self.summary_v.shape != self.summary_k.shape \
                    or self.summary_bias.shape != (*lists, means) or self.summary_bias.dtype != torch.float32:  # fmt: skip
                raise ValueError(
                    f"summary_k and summary_v must be [B, H, n, D] and summary_bias fp32 {[*lists, 'n']}; found "
                    f"{tuple(self.summary_k.shape)}, {tuple(self.summary_v.shape)} and {tuple(self.summary_bias.shape)} {self.summary_bias.dtype}."
                )
        values = [x for x in (q, k, v, self.current_k, self.current_v, self.summary_k, self.summary_v) if x is not None]
        numbers = [x for x in (self.block_indices, self.block_counts, self.kv_valid, self.tails, self.rows) if x is not None]
        if len({x.dtype for x in values}) > 1 or {x.dtype for x in numbers} != {torch.int32}:
            raise ValueError(
                f"q, k and v must share a dtype and lists must be int32; found {', '.join(str(x.dtype) for x in values)} "
                f"and {', '.join(str(x.dtype) for x in numbers)}."
            )
        if len({x.device for x in (*values, *numbers)}) > 1:
            raise ValueError("All tensors must be on one device; move the lists to the device of q.")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0; found {self.scale}.")

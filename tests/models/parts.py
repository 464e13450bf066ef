"""What the reduced models share: a block of the diffusion-transformer kind, time embedding, rotary embedding, an opaque attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM = 2, 16
DIM = HEADS * HEAD_DIM


@torch.library.custom_op("li_models::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    """Attention of [B, L, H, D] that a compiler cannot see into, as a vendor's kernel is."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2).contiguous()


@attend.register_fake
def _(q, k, v, softmax_scale=None, causal=False):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("li_models::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> Tensor:
    """Attention of packed [tokens of all samples, H, D]."""
    parts = [attend(q[None, a:b], k[None, c:d], v[None, c:d])[0]
             for (a, b), (c, d) in zip(torch.stack([cu_seqlens_q[:-1], cu_seqlens_q[1:]], 1).tolist(),
                                       torch.stack([cu_seqlens_k[:-1], cu_seqlens_k[1:]], 1).tolist())]
    return torch.cat(parts)


@varlen.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def rotary(x: Tensor, index: Tensor) -> Tensor:
    """Rotate pairs of channels of [B, L, H, D] by the position of each token, int [L]."""
    angles = index[:, None].float() * 100.0 ** (-torch.arange(HEAD_DIM // 2, device=x.device) / (HEAD_DIM // 2))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class TimeEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Sequential(nn.Linear(16, DIM), nn.SiLU(), nn.Linear(DIM, DIM))

    def forward(self, t: Tensor) -> Tensor:
        waves = t[..., None].float() * torch.exp(-math.log(1000.0) * torch.arange(8, device=t.device) / 8)
        return self.up(torch.cat([waves.cos(), waves.sin()], -1))


class Modulated(nn.Module):
    """Attention and a feed-forward, each on a normed stream that is scaled and shifted by the time. heads(x): q, k, v."""

    def __init__(self):
        super().__init__()
        self.time, self.qkv, self.out = nn.Linear(DIM, 6 * DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.feed = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(approximate="tanh"), nn.Linear(2 * DIM, DIM))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)

    def forward(self, x: Tensor, e: Tensor, mix) -> Tensor:
        """x [..., L, C]; e: time, broadcast to x; mix(q, k, v): attention over heads [..., L, H, D]."""
        shift, scale, gate, shift2, scale2, gate2 = self.time(F.silu(e)).chunk(6, -1)
        y = F.layer_norm(x, (DIM,)) * (1 + scale) + shift
        x = x + gate * self.out(mix(*self.heads(y)).flatten(-2))
        return x + gate2 * self.feed(F.layer_norm(x, (DIM,)) * (1 + scale2) + shift2)


def unpatchify(x: Tensor, frames: int, rows: int, columns: int, channels: int, patch: int) -> Tensor:
    """[B, frames * rows * columns, channels * patch * patch] as latents [B, channels, frames, H, W]."""
    x = x.unflatten(1, (frames, rows, columns)).unflatten(-1, (channels, patch, patch))
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

"""The form of LingBot and Wan2.2: no cache, all frames at once, attention packed to the valid lengths, guidance as two calls
of the model, an image pinned by mixing it in under a mask with time 0, camera rays that scale and shift every block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import DIM, Modulated, TimeEmbedding, rotary, unpatchify, varlen

CHANNELS, PATCH, ROWS, COLUMNS, FRAMES, DEPTH = 4, 2, 4, 4, 8, 2
TOKENS = ROWS * COLUMNS
TIMES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None) -> Tensor:
    """Attention of [B, L, H, D] over the first k_lens[b] keys of each sample."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if k_lens is None:
        k_lens = torch.tensor([keys] * batch, dtype=torch.int32)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    else:
        k, v = (torch.cat([u[:n] for u, n in zip(x, k_lens)]) for x in (k, v))
    q_lens = torch.tensor([queries] * batch, dtype=torch.int32)
    cu_q, cu_k = (torch.cat([n.new_zeros(1), n]).cumsum(0, dtype=torch.int32) for n in (q_lens, k_lens))
    return varlen(q.flatten(0, 1), k, v, cu_q, cu_k, queries, keys).unflatten(0, (batch, queries))


class PairedBlock(Modulated):
    def __init__(self):
        super().__init__()
        self.rays = nn.Linear(DIM, 2 * DIM)
        self.cross_q, self.cross_kv, self.cross_out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x, e, rays, text, index, lens):
        x = super().forward(x, e, lambda q, k, v: packed_attention(rotary(q, index), rotary(k, index), v, lens))
        scale, shift = self.rays(rays).chunk(2, -1)
        x = (1 + scale) * x + shift
        q, kv = self.cross_q(x).unflatten(-1, (2, -1)), self.cross_kv(text).unflatten(-1, (2, 2, -1)).unbind(2)
        return x + self.cross_out(packed_attention(q, *kv, None).flatten(-2))


class PairedWorld(nn.Module):
    def __init__(self, room: int = FRAMES * TOKENS + 5):
        """room: tokens that sequences are padded to."""
        super().__init__()
        self.room = room
        self.embed = nn.Conv3d(CHANNELS, DIM, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.time, self.rays, self.head = TimeEmbedding(), nn.Linear(6, DIM), nn.Linear(DIM, CHANNELS * PATCH * PATCH)
        self.blocks = nn.ModuleList(PairedBlock() for _ in range(DEPTH))

    def lengths(self, tokens: Tensor) -> Tensor | None:
        return torch.full((tokens.shape[0],), tokens.shape[1], dtype=torch.int32)

    def forward(self, x: Tensor, t: Tensor, rays: Tensor, text: Tensor) -> Tensor:
        """x [B, C, F, H, W], t [B, F * tokens], rays [B, F * tokens, 6], text [B, S, C]."""
        frames = x.shape[2]
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        lens, valid = self.lengths(tokens), tokens.shape[1]
        pad = lambda y: F.pad(y, (0, 0, 0, max(0, self.room - valid)))
        tokens, e, rays = pad(tokens), pad(self.time(t)), pad(self.rays(rays))
        index = torch.arange(tokens.shape[1], device=x.device) // TOKENS
        for block in self.blocks:
            tokens = block(tokens, e, rays, text, index, lens)
        return unpatchify(self.head(tokens[:, :valid]), frames, ROWS, COLUMNS, CHANNELS, PATCH)


class GuidedSampler(nn.Module):
    def __init__(self, model: PairedWorld, guidance: float = 4.0):
        super().__init__()
        self.model, self.guidance = model, guidance

    def forward(self, x: Tensor, image: Tensor, mask: Tensor, rays: Tensor, text: Tensor, blank: Tensor) -> Tensor:
        """image [B, C, F, H, W] is kept where mask [1, 1, F, 1, 1] is 0."""
        for t, following in zip(TIMES, TIMES[1:]):
            x = (1 - mask) * image + mask * x
            label = (1000 * t * mask).flatten().repeat_interleave(TOKENS)[None].expand(x.shape[0], -1)
            with_text, without = self.model(x, label, rays, text), self.model(x, label, rays, blank)
            x = x + (following - t) * (without + self.guidance * (with_text - without))
        return (1 - mask) * image + mask * x


def inputs() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=random)
    video = (1, CHANNELS, FRAMES, ROWS * PATCH, COLUMNS * PATCH)
    mask = torch.ones(1, 1, FRAMES, 1, 1)
    mask[:, :, 0] = 0
    return [draw(*video), draw(*video), mask, draw(1, FRAMES * TOKENS, 6), draw(1, 7, DIM), draw(1, 7, DIM)]

"""The form of Self-Forcing and Matrix-Game-2: chunks of frames, keys and values in a preallocated cache that every step
writes into, few steps that predict the clean latents and re-noise them, and a call at time 0 that leaves the clean chunk's
keys and values in the cache. A full cache is shifted, but for its first frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import DIM, HEAD_DIM, HEADS, Modulated, TimeEmbedding, attend, rotary, unpatchify

CHANNELS, PATCH, ROWS, COLUMNS, CHUNK, DEPTH = 4, 2, 4, 4, 4, 2
TOKENS = ROWS * COLUMNS
SIGMAS = (1.0, 0.94, 0.83, 0.62)


class RollingWorld(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv3d(CHANNELS, DIM, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.time, self.action = TimeEmbedding(), nn.Linear(3, DIM)
        self.blocks = nn.ModuleList(Modulated() for _ in range(DEPTH))
        self.head = nn.Linear(DIM, CHANNELS * PATCH * PATCH)

    def forward(self, x: Tensor, t: Tensor, action: Tensor, keys: list[Tensor], values: list[Tensor], start: int, first: int = 0) -> Tensor:
        """x [B, C, F, H, W], t [B, F], action [B, F, 3], caches [B, room, heads, D]; the chunk is frames start, start + 1, ...;
        frames from ``first`` on are attended to. Returns the velocity."""
        frames = x.shape[2]
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        e = (self.time(t) + self.action(action)).repeat_interleave(TOKENS, 1)
        index = (torch.arange(frames, device=x.device) + start).repeat_interleave(TOKENS)
        begin, stop = start * TOKENS, (start + frames) * TOKENS
        for block, k_cache, v_cache in zip(self.blocks, keys, values):
            def mix(q, k, v, k_cache=k_cache, v_cache=v_cache):
                k_cache[:, begin:stop] = rotary(k, index)
                v_cache[:, begin:stop] = v
                return attend(rotary(q, index), k_cache[:, first * TOKENS:stop], v_cache[:, first * TOKENS:stop])

            tokens = block(tokens, e, mix)
        return unpatchify(self.head(tokens), frames, ROWS, COLUMNS, CHANNELS, PATCH)


class ChunkSampler(nn.Module):
    """A whole chunk: few steps, and the call that writes the cache."""

    def __init__(self, model: RollingWorld):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor, action: Tensor, keys: list[Tensor], values: list[Tensor], start: int) -> Tensor:
        """x: noise of the first step; noise [steps - 1, ...]: of the later ones. Returns clean latents."""
        label = lambda sigma: torch.full(action.shape[:2], 1000 * sigma, device=x.device)
        for i, sigma in enumerate(SIGMAS):
            clean = x - sigma * self.model(x, label(sigma), action, keys, values, start)
            if i + 1 < len(SIGMAS):
                x = (1 - SIGMAS[i + 1]) * clean + SIGMAS[i + 1] * noise[i]
        self.model(clean, label(0.0), action, keys, values, start)
        return clean


def caches(room: int, filled: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Caches with room for so many frames, the first ones filled with numbers, the rest poisoned."""
    random = torch.Generator().manual_seed(filled)
    make = lambda: torch.full((1, room * TOKENS, HEADS, HEAD_DIM), torch.nan)
    found = [[make() for _ in range(DEPTH)] for _ in range(2)]
    for cache in (*found[0], *found[1]):
        cache[:, : filled * TOKENS] = torch.randn(1, filled * TOKENS, HEADS, HEAD_DIM, generator=random)
    return found[0], found[1]


def evict(cache: Tensor, frames: int, filled: int, sink: int = 1) -> None:
    """Make room for so many frames: what is behind the first frame moves forward, in place."""
    a, n, stop = sink * TOKENS, frames * TOKENS, filled * TOKENS
    cache[:, a: stop - n] = cache[:, a + n: stop].clone()

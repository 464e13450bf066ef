"""Tiny models with the forms of context that Doom World does not have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, COLUMNS = 2, 3
TOKENS = ROWS * COLUMNS
HEADS, HEAD_DIM = 2, 8
DIM = HEADS * HEAD_DIM
DEPTH = 2


def rotate(x: Tensor, frames: Tensor) -> Tensor:
    """Temporal RoPE of [B, L, H, D] by the index of each frame's tokens."""
    angles = (frames[:, None].float() * 0.3 ** torch.arange(HEAD_DIM // 2)).repeat_interleave(TOKENS, 0)[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)


class Remembering(nn.Module):
    """Memory as in Matrix-Game-3.0: clean latents in front of the new ones, no cache, RoPE on either part by itself.

    join: False gives latents (and time) already joined, so that only the cats after RoPE show where memory ends.
    whole: return the memory's frames too, as no such model does. pin: write the first new frame anew before anything.
    """

    def __init__(self, join: bool = True, whole: bool = False, pin: bool = False):
        super().__init__()
        self.join, self.whole, self.pin = join, whole, pin
        self.patch, self.rays = nn.Conv3d(3, DIM, 1), nn.Linear(6, DIM)
        self.time, self.keys = nn.Linear(1, DIM), nn.Linear(2, DIM)
        self.blocks, self.final = nn.ModuleList(Block() for _ in range(DEPTH)), nn.Linear(DIM, 3)

    def forward(self, x, time, memory, memory_time, rays, keys, memory_keys, index, memory_index, mask):
        if self.pin:
            x = torch.cat([x[:, :, :1], x[:, :, 1:]], 2)
        if self.join:
            x, time = torch.cat([memory, x], 2), torch.cat([memory_time, time], 1)
        frames = memory_index.shape[0]
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        actions = self.keys(torch.cat([memory_keys, keys], 1)).repeat_interleave(TOKENS, 1)
        tokens = tokens + self.rays(rays.flatten(2).transpose(1, 2)) + self.time(time[..., None]) + actions
        tokens = tokens * mask[..., None]
        m = frames * TOKENS
        for block in self.blocks:
            q, k, v = block.project(tokens)
            q, k = (torch.cat([rotate(t[:, :m], memory_index), rotate(t[:, m:], index)], 1) for t in (q, k))
            tokens = tokens + block.out(attend(q, k, v))
        out = self.final(tokens).unflatten(1, (-1, ROWS, COLUMNS)).permute(0, 4, 1, 2, 3)
        return out if self.whole else out[:, :, frames:]


WINDOW = 4  # new latents
ARGUMENTS = ("x", "time", "memory", "memory_time", "rays", "keys", "memory_keys", "index", "memory_index", "mask")
#: Argument -> dimension along which it holds memory.
HOLDS = {"memory": 2, "memory_time": 1, "rays": 2, "memory_keys": 1, "memory_index": 0, "mask": 1}


def remembering_inputs(frames: int, join: bool = True, indices=None) -> dict[str, Tensor]:
    """Inputs with so many memory frames; indices: of memory, else spread over the past."""
    random = torch.Generator().manual_seed(frames)
    draw = lambda *size: torch.randn(*size, generator=random)
    index = torch.tensor([3 * i + 1 for i in range(frames)]) if indices is None else torch.as_tensor(indices)
    x, memory = draw(1, 3, WINDOW, ROWS, COLUMNS), draw(1, 3, frames, ROWS, COLUMNS)
    time, memory_time = torch.full((1, WINDOW * TOKENS), 0.7), torch.zeros(1, frames * TOKENS)
    if not join:
        x, time = torch.cat([memory, x], 2), torch.cat([memory_time, time], 1)
    return {"x": x, "time": time, "memory": memory, "memory_time": memory_time, "rays": draw(1, 6, frames + WINDOW, ROWS, COLUMNS),
            "keys": draw(1, WINDOW, 2), "memory_keys": draw(1, frames, 2), "index": torch.arange(100, 100 + WINDOW),
            "memory_index": index, "mask": (draw(1, (frames + WINDOW) * TOKENS) > -1).float()}


def mark(inputs: dict[str, Tensor], join: bool = True) -> list[Tensor]:
    """The inputs in order, the dimensions that hold memory marked as dynamic."""
    for name, dim in (HOLDS | ({} if join else {"x": 2, "time": 1})).items():
        torch._dynamo.mark_dynamic(inputs[name], dim)
    return [inputs[name] for name in ARGUMENTS]


def keep_memory(inputs: dict[str, Tensor], kept, join: bool = True) -> list[Tensor]:
    """The inputs with only these memory frames, selected by hand."""
    frames = inputs["memory_index"].shape[0]
    by_frame = torch.as_tensor(list(kept))
    by_token = (by_frame[:, None] * TOKENS + torch.arange(TOKENS)).flatten()
    window = torch.arange(frames, frames + WINDOW)
    with_window = torch.cat([by_frame, window])
    window_tokens = torch.arange(frames * TOKENS, (frames + WINDOW) * TOKENS)
    index = {"memory": by_frame, "memory_time": by_token, "rays": with_window, "memory_keys": by_frame, "memory_index": by_frame,
             "mask": torch.cat([by_token, window_tokens])}
    if not join:
        index |= {"x": with_window, "time": torch.cat([by_token, window_tokens])}
    dims = HOLDS | {"x": 2, "time": 1}
    return [inputs[n].index_select(dims[n], index[n]) if n in index else inputs[n] for n in ARGUMENTS]


class Rolling(nn.Module):
    """A step on preallocated caches [B, L, H, D], as in Self-Forcing: own keys are written into them, then a slice is read.

    skip: tokens of the cache's first frame that are left out.
    """

    def __init__(self, skip: int = 0):
        super().__init__()
        self.skip = skip
        self.patch, self.blocks, self.final = nn.Conv3d(3, DIM, 1), nn.ModuleList(Block() for _ in range(DEPTH)), nn.Linear(DIM, 3)

    def forward(self, x, keys, values, start: int, first: int = 0):
        """x: latents [1, 3, Q, h, w] of frames start, start + 1, ...; the cache is read from frame ``first`` on."""
        tokens, count = self.patch(x).flatten(2).transpose(1, 2), x.shape[2]
        index = torch.arange(count) + start
        begin, stop = start * TOKENS, (start + count) * TOKENS
        for block, k_cache, v_cache in zip(self.blocks, keys, values):
            q, k, v = block.project(tokens)
            q, k = rotate(q, index), rotate(k, index)
            k_cache[:, begin:stop] = k
            v_cache[:, begin:stop] = v
            past = [cache[:, first * TOKENS + self.skip : stop].to(q.dtype) for cache in (k_cache, v_cache)]
            tokens = tokens + block.out(attend(q, *past))
        return self.final(tokens).unflatten(1, (-1, ROWS, COLUMNS)).permute(0, 4, 1, 2, 3)


def rolling_inputs(frames: int, room: int = 24, dtype: torch.dtype = torch.float32):
    """(latents of a chunk, key caches, value caches) with so many frames in the caches."""
    random = torch.Generator().manual_seed(frames)
    caches = lambda: [torch.zeros(1, room * TOKENS, HEADS, HEAD_DIM, dtype=dtype) for _ in range(DEPTH)]
    keys, values = caches(), caches()
    for cache in (*keys, *values):
        cache[:, : frames * TOKENS] = torch.randn(1, frames * TOKENS, HEADS, HEAD_DIM, generator=random).to(dtype)
    return torch.randn(1, 3, 4, ROWS, COLUMNS, generator=random), keys, values

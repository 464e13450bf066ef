"""A reduced HY-WorldPlay of the kind that is based on Wan 2.2, of our own code from a description: one stream with cross-attention to
text, a RoPE and a camera branch whose keys and values are cached side by side along the head's dimension, modulation by frames, a
rotary table of the whole video that is sliced by numbers, an attention that a graph cannot see into, blocks compiled each by itself."""

from __future__ import annotations

import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import DIM, HEAD_DIM, HEADS, TimeEmbedding
from .worldplay import camera_matrices, project

CHANNELS, ROWS, COLUMNS, DEPTH, WORDS = 4, 3, 4, 2, 5
TOKENS = ROWS * COLUMNS


@torch.library.custom_op("li_models::hnd", mutates_args=())
def opaque(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).contiguous()


@opaque.register_fake
def _(q, k, v):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False):
    assert tensor_layout == "HND" and not is_causal
    return opaque(q, k, v)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


class Rope(nn.Module):
    def forward(self, video: Tensor):
        """cos and sin, [1, 1, frames * tokens, HEAD_DIM / 2], of a video of so many frames."""
        place = torch.arange(video.shape[2] * TOKENS)
        angles = torch.stack([place // TOKENS, place % TOKENS // COLUMNS, place % COLUMNS], 1).float() @ torch.rand(
            3, HEAD_DIM // 2, generator=torch.Generator().manual_seed(0))
        return angles.cos()[None, None], angles.sin()[None, None]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)
        self.q, self.k, self.v, self.out, self.camera_out, self.words_q, self.words_out = (nn.Linear(DIM, DIM) for _ in range(7))
        self.words_kv, self.mlp = nn.Linear(DIM, 2 * DIM), nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    @property
    def attn1(self):
        return types.SimpleNamespace(to_out_prope=[self.camera_out])

    @torch.compile
    def forward(self, x, text, vec, rope, cache, is_cache, viewmats, Ks):
        own = sys.modules[type(self).__module__]  # as upstream looks the function up in its module
        scale1, shift1, gate1, scale2, shift2, gate2 = ((self.table + vec).flatten(0, 0).transpose(0, 1)[:, None]).repeat_interleave(TOKENS, 2)
        heads = lambda t: t.unflatten(2, (HEADS, -1)).transpose(1, 2)
        h = F.layer_norm(x, [DIM]) * (1 + scale1) + shift1
        q, k, v = heads(self.q(h)), heads(self.k(h)), heads(self.v(h))
        p, transposed, inverse = camera_matrices(viewmats, Ks)
        q_p, k_p, v_p = project(transposed, q), project(inverse, k), project(inverse, v)
        q_r, k_r, v_r = turned(q, *rope), turned(k, *rope), v
        if cache["k"] is not None and not is_cache:
            (a, b), (c, d) = cache["k"].chunk(2, -1), cache["v"].chunk(2, -1)
            k_r, k_p, v_r, v_p = (torch.cat([old, new], dim=-2) for old, new in ((a, k_r), (b, k_p), (c, v_r), (d, v_p)))
        kept = {"k": torch.cat([k_r, k_p], dim=-1), "v": torch.cat([v_r, v_p], dim=-1)} if is_cache else {}
        q, k, v = (torch.cat(pair, dim=0) for pair in ((q_r, q_p), (k_r, k_p), (v_r, v_p)))
        rope_out, camera = own.sageattn(q, k, v, tensor_layout="HND", is_causal=False).chunk(2, dim=0)
        flat = lambda t: t.transpose(1, 2).flatten(2)
        x = x + gate1 * (self.out(flat(rope_out)) + self.camera_out(flat(project(p, camera))))
        words = [heads(t) for t in self.words_kv(text).chunk(2, -1)]
        x = x + self.words_out(flat(own.sageattn(heads(self.words_q(x)), *words, tensor_layout="HND", is_causal=False)))
        return x + gate2 * self.mlp(F.layer_norm(x, [DIM]) * (1 + scale2) + shift2), kept


class WanWorld(nn.Module):
    config = types.SimpleNamespace(patch_size=(1, 2, 2), in_channels=CHANNELS)
    dtype = property(lambda self: self.head.weight.dtype)
    condition_embedder = property(lambda self: types.SimpleNamespace(action_embedder=self.action))

    def __init__(self, depth: int = DEPTH):
        super().__init__()
        self.patch, self.rope, self.time, self.action = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2)), Rope(), TimeEmbedding(), TimeEmbedding()
        self.blocks, self.modulation, self.head = nn.ModuleList(Block() for _ in range(depth)), nn.Linear(DIM, 6 * DIM), nn.Linear(DIM, 4 * CHANNELS)

    def forward(self, hidden_states, timestep, encoder_hidden_states, action, viewmats, Ks, kv_cache, is_cache, current_start, current_end,
                window_frames):
        """hidden_states [1, C, F, 2 * ROWS, 2 * COLUMNS]; returns the velocity in a tuple, or keys and values [1, H, N, 2 D] a block."""
        frames = hidden_states.shape[2]
        video = F.pad(hidden_states, (0, 0, 0, 0, 0, window_frames - frames)) if frames < window_frames else hidden_states[:, :, :window_frames]
        rope = tuple(t[:, :, current_start:current_end] for t in self.rope(video))
        x = self.patch(hidden_states).flatten(2).transpose(1, 2)
        vec = self.modulation(F.silu(self.time(timestep) + self.action(action.squeeze(0)))).unflatten(1, (6, -1))
        caches = []
        for block, cache in zip(self.blocks, kv_cache):
            x, kept = block(x, encoder_hidden_states, vec, rope, cache, is_cache, viewmats, Ks)
            caches.append(kept)
        if is_cache:
            return caches
        out = self.head(x).reshape(1, frames, ROWS, COLUMNS, 1, 2, 2, CHANNELS).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return (out.flatten(6, 7).flatten(4, 5).flatten(2, 3),)


def call(frames: int, start: int, cache=None, keep: bool = False) -> dict:
    """Arguments of an encoding (keep) or a step at latents start, start + 1, ... of a video of 40."""
    g = torch.Generator().manual_seed(frames + start)
    views = torch.eye(4).repeat(1, frames, 1, 1)
    views[0, :, :3, 3] = 0.3 * torch.randn(frames, 3, generator=g)
    return dict(
        hidden_states=torch.randn(1, CHANNELS, frames, 2 * ROWS, 2 * COLUMNS, generator=g), timestep=torch.full((frames,), 14.0 if keep else 800.0),
        encoder_hidden_states=torch.randn(1, WORDS, DIM, generator=torch.Generator().manual_seed(0)), viewmats=views,
        action=torch.randint(0, 81, (1, frames), generator=g).float(), Ks=torch.tensor([[0.5, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).repeat(1, frames, 1, 1),
        kv_cache=cache or [{"k": None, "v": None} for _ in range(DEPTH)], is_cache=keep, current_start=start * TOKENS,
        current_end=(start + frames) * TOKENS, window_frames=40)

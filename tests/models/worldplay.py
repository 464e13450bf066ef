"""A reduced HY-WorldPlay transformer: the anatomy of Tencent's model with what a compiler finds wasteful in it left in.

Written from a description (shapes, order of operations, tensor layouts), not from the code. Kept on purpose: the modulation
is computed for every token of what is the same for all tokens of a frame; cameras are repeated over tokens, and their
matrices are made in place, in every block; the rotary table is built on the CPU for context and chunk, sliced, and moved
in every block; keys and values are concatenated twice a step.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Size:
    channels: int = 128
    heads: int = 2
    depth: int = 2
    latent: int = 8  # channels of a latent frame; the model also reads as many of the prompt, and a mask
    height: int = 3
    width: int = 4
    rope: tuple[int, int, int] = (16, 24, 24)
    theta: float = 256.0

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads


def sinusoid(t: Tensor) -> Tensor:
    """[N] -> [N, 256]; the frequencies are made on the CPU and moved."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(start=0, end=128, dtype=torch.float32) / 128).to(device=t.device)
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def rope_table(size: Size, frames: int) -> tuple[Tensor, Tensor]:
    """cos and sin [frames * height * width, head_dim], built on the CPU."""
    axes = [torch.linspace(0, n, n + 1, dtype=torch.float32)[:n] for n in (frames, size.height, size.width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=0)
    cos, sin = [], []
    for axis, dim in enumerate(size.rope):
        frequencies = 1.0 / (size.theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
        angles = torch.outer(grid[axis].reshape(-1) * 1.0, frequencies)
        cos.append(angles.cos().repeat_interleave(2, dim=1))
        sin.append(angles.sin().repeat_interleave(2, dim=1))
    return torch.cat(cos, dim=1), torch.cat(sin, dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D]; the table moves to its device here, in every block."""
    cos, sin = (t.view(1, x.shape[1], 1, x.shape[3]).to(x.device) for t in (cos, sin))
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned * sin).type_as(x)


def lift(k: Tensor) -> Tensor:
    """[..., 3, 3] -> [..., 4, 4]"""
    out = torch.zeros(k.shape[:-2] + (4, 4), device=k.device)
    out[..., :3, :3] = k
    out[..., 3, 3] = 1.0
    return out


def invert_rigid(w: Tensor) -> Tensor:
    turned = w[..., :3, :3].transpose(-1, -2)
    out = torch.zeros_like(w)
    out[..., :3, :3] = turned
    out[..., :3, 3] = -torch.einsum("...ij,...j->...i", turned, w[..., :3, 3])
    out[..., 3, 3] = 1.0
    return out


def invert_intrinsics(k: Tensor) -> Tensor:
    out = torch.zeros_like(k)
    out[..., 0, 0] = 1.0 / k[..., 0, 0]
    out[..., 1, 1] = 1.0 / k[..., 1, 1]
    out[..., 0, 2] = -k[..., 0, 2] / k[..., 0, 0]
    out[..., 1, 2] = -k[..., 1, 2] / k[..., 1, 1]
    out[..., 2, 2] = 1.0
    return out


def camera_matrices(w: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, its transpose and its inverse, [B, L, 4, 4], from cameras and intrinsics of every token. No principal point."""
    plain = torch.zeros_like(k)
    plain[..., 0, 0] = k[..., 0, 0]
    plain[..., 1, 1] = k[..., 1, 1]
    plain[..., 2, 2] = 1.0
    p = torch.einsum("...ij,...jk->...ik", lift(plain), w)
    inverse = torch.einsum("...ij,...jk->...ik", invert_rigid(w), lift(invert_intrinsics(plain)))
    return p, p.transpose(-1, -2), inverse


def project(matrices: Tensor, x: Tensor) -> Tensor:
    """matrices [B, C, 4, 4] over the channels of x [B, H, L, D], in groups of four; L is a multiple of C."""
    (part,) = torch.split(x, [x.shape[-1]], dim=-1)
    batch, heads, length, dim = part.shape
    groups = part.reshape(batch, heads, matrices.shape[1], -1, dim // 4, 4)
    out = torch.einsum("bcij,bncpkj->bncpki", matrices, groups).reshape(batch, heads, length, dim)
    return torch.cat([out], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Vectors [L, C] of every token, spelt as if they were of every frame."""
    shift, scale = (v.unsqueeze(0).reshape(1, 1, *v.shape).reshape(1, *v.shape).repeat_interleave(1, dim=1).type_as(x) for v in (shift, scale))
    return x * (1 + scale) + shift


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.unsqueeze(0).repeat_interleave(1, dim=1).type_as(x)


class Mlp(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(nn.Linear(channels, 4 * channels), nn.GELU(approximate="tanh"), nn.Dropout(0.0), nn.Linear(4 * channels, channels), nn.Dropout(0.0))


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        c, d = size.channels, size.head_dim
        self.size = size
        self.modulation = nn.Linear(c, 6 * c)
        self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.q_norm, self.k_norm = RMSNorm(d), RMSNorm(d)
        self.out, self.camera_out = nn.Linear(c, c), nn.Linear(c, c)
        self.mlp = Mlp(c)

    def forward(self, x, vec, cos, sin, w, k, text_k, text_v, past_k, past_v, keep: bool):
        """x [1, L, C], vec [L, C], w [1, L, 4, 4], k [1, L, 3, 3]; the others: of this block. Returns x, and keys and values if kept."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(vec)).chunk(6, dim=-1)
        h = modulated(F.layer_norm(x, [x.shape[-1]], eps=1e-6), shift1, scale1)
        query, key, value = (f(h).reshape(1, x.shape[1], self.size.heads, -1) for f in (self.q, self.k, self.v))
        query, key = self.q_norm(query).to(value), self.k_norm(key).to(value)
        p, p_transposed, p_inverse = (m.to(value.dtype) for m in camera_matrices(w, k))
        seen = lambda m, y: project(m, y.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
        query = torch.cat([rotate(query, cos, sin), seen(p_transposed, query)], dim=0).transpose(1, 2)
        key = torch.cat([rotate(key, cos, sin), seen(p_inverse, key)], dim=0).transpose(1, 2)
        value = torch.cat([value, seen(p_inverse, value)], dim=0).transpose(1, 2)
        kept = (key, value) if keep else ()
        if not keep and past_k is not None:
            key, value = torch.cat([past_k, key], dim=2), torch.cat([past_v, value], dim=2)
        both = lambda t: t.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(2, *t.shape[1:])
        key, value = torch.cat([both(text_k), key], dim=2), torch.cat([both(text_v), value], dim=2)
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        rope, prope = attended.transpose(1, 2).reshape(2, x.shape[1], -1).chunk(2, dim=0)
        prope = seen(p, prope.reshape(1, x.shape[1], self.size.heads, -1)).reshape(1, x.shape[1], -1)
        x = x + gated(self.out(rope) + self.camera_out(prope), gate1)
        return x + gated(self.mlp(modulated(F.layer_norm(x, [x.shape[-1]], eps=1e-6), shift2, scale2)), gate2), *kept


def run_block(index: int, block: Block, *args):
    return block(*args)


class WorldPlay(nn.Module):
    """The vision half of the model: context encoding (``keep``) or a denoising step over cached keys and values."""

    def __init__(self, size: Size = Size(), regional: bool = False, block: type[Block] = Block):
        """regional: mark each block as a region of its own, as upstream's users do; its number is passed along."""
        super().__init__()
        c = size.channels
        self.run_block = torch.compiler.nested_compile_region(run_block) if regional else run_block
        self.size = size
        self.patch = nn.Conv3d(2 * size.latent + 1, c, 1)
        self.time = nn.Sequential(nn.Linear(256, c), nn.SiLU(), nn.Linear(c, c))
        self.action = nn.Sequential(nn.Linear(256, c), nn.SiLU(), nn.Linear(c, c))
        self.blocks = nn.ModuleList(block(size) for _ in range(size.depth))
        self.final_modulation = nn.Linear(c, 2 * c)
        self.final = nn.Linear(c, size.latent)

    def forward(self, x, timestep, action, viewmats, ks, kv_cache, keep: bool = False, rope_frames: int = 4, rope_start: int = 0, rope=None):
        """x [1, 2 * latent + 1, F, H, W]; timestep [F]; action [1, F]; viewmats [1, F, 4, 4]; ks [1, F, 3, 3]; kv_cache: a dict
        of k, v [2, H, N, D] or None and k_text, v_text [1, H, T, D] a block; rope: the rotary table, cos and sin [F * H * W, D], made here if not given. Returns the new cache if ``keep``, else the
        velocity [1, latent, F, H, W]."""
        size, frames = self.size, x.shape[2]
        area = size.height * size.width
        cos, sin = rope or (t[rope_start * area : (rope_start + frames) * area, ...] for t in rope_table(size, rope_frames))
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        vec = self.time(sinusoid(timestep.reshape(-1))) + self.action(sinusoid(action.reshape(-1)))
        over_tokens = lambda t: t.unsqueeze(2).unsqueeze(3).expand(-1, -1, size.height, size.width, *[-1] * (t.dim() - 2)).reshape(1, frames * area, *t.shape[2:])
        vec = over_tokens(vec.reshape(1, frames, -1)).reshape(frames * area, -1)
        w, k = over_tokens(viewmats), over_tokens(ks)
        cache = []
        for i, (block, entry) in enumerate(zip(self.blocks, kv_cache)):
            past = (None, None) if keep else (entry["k"], entry["v"])
            tokens, *kept = self.run_block(i, block, tokens, vec, cos, sin, w, k, entry["k_text"], entry["v_text"], *past, keep)
            if keep:
                cache.append({**entry, "k": kept[0], "v": kept[1]})
        if keep:
            return cache
        shift, scale = self.final_modulation(F.silu(vec)).chunk(2, dim=1)
        out = self.final(modulated(F.layer_norm(tokens, [tokens.shape[-1]], eps=1e-6), shift, scale))
        return out.reshape(1, frames, size.height, size.width, size.latent).permute(0, 4, 1, 2, 3)


def step(depth: int, regional: bool = False):
    """(a step of a model with random weights as a function of its latents, latents)"""
    torch.manual_seed(0)
    model = WorldPlay(Size(depth=depth), regional=regional).eval()
    given = inputs(model)
    return lambda x: model(**(given | {"x": x})), given["x"]


def inputs(model: WorldPlay, frames: int = 4, context: int = 4, text: int = 22, seed: int = 0) -> dict:
    """Arguments of a step (context > 0 or 0) of so many frames."""
    size, g = model.size, torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g)
    angles = torch.randn(frames, generator=g) * 0.3
    views = torch.eye(4).repeat(1, frames, 1, 1)
    views[0, :, 0, 0], views[0, :, 0, 2], views[0, :, 2, 0], views[0, :, 2, 2] = angles.cos(), angles.sin(), -angles.sin(), angles.cos()
    views[0, :, :3, 3] = random(frames, 3) * 0.3
    ks = torch.tensor([[0.5, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]).repeat(1, frames, 1, 1)
    past = context * size.height * size.width
    cache = [{"k": random(2, size.heads, past, size.head_dim) if past else None, "v": random(2, size.heads, past, size.head_dim) if past else None,
              "k_text": random(1, size.heads, text, size.head_dim), "v_text": random(1, size.heads, text, size.head_dim)} for _ in model.blocks]
    return {"x": random(1, 2 * size.latent + 1, frames, size.height, size.width), "timestep": torch.full((frames,), 800.0),
            "action": torch.randint(0, 81, (1, frames), generator=g).float(), "viewmats": views, "ks": ks, "kv_cache": cache,
            "rope_frames": context + frames, "rope_start": context}

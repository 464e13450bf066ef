"""Matrix-Game-3.0 reduced: clean memory and past latents in front of the new ones, no cache, padding to one length, action modules that
attend over time at each place, products in fp32 around the self-attention, cameras that scale and shift. Own code, from a description."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM, ROWS, COLUMNS, CHANNELS, TEXT = 2, 18, 2, 3, 4, 5
DIM, TOKENS, LONGEST = HEADS * HEAD_DIM, ROWS * COLUMNS, 20
MEMORY, FIRST, WINDOW, PAST = 5, 15, 14, 4  # latents


def full(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer in full precision, whatever its weights are in."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def turned(x: Tensor, table: Tensor, frames: Tensor) -> Tensor:
    """RoPE of [B, L, H, D] over frames, rows and columns, a third of the channels each; table: complex [H, positions, D / 2]."""
    over_t, over_h, over_w = table.split(HEAD_DIM // 6, 2)
    places = (over_t[:, frames].view(HEADS, -1, 1, 1, HEAD_DIM // 6), over_h[:, :ROWS].view(HEADS, 1, ROWS, 1, HEAD_DIM // 6),
              over_w[:, :COLUMNS].view(HEADS, 1, 1, COLUMNS, HEAD_DIM // 6))
    turn = torch.cat([p.expand(HEADS, frames.shape[0], ROWS, COLUMNS, -1) for p in places], -1).reshape(HEADS, -1, HEAD_DIM // 2).transpose(0, 1)
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(3)


class Actions(nn.Module):
    """Mouse: every place attends over its own frames, with the mouse beside it; keyboard: to the keys of all frames, the same at every place."""

    def __init__(self):
        super().__init__()
        self.mouse, self.qkv, self.out = nn.Linear(DIM + 24, DIM), nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.q, self.keys, self.kv, self.back = (nn.Linear(*n) for n in ((DIM, DIM), (6, 4), (48, 2 * DIM), (DIM, DIM)))

    @staticmethod
    def windows(x: Tensor, latents: int, memory: Tensor | None) -> Tensor:
        """Of [B, frames, C] the last 12 frames up to each latent, [B, latents, 12 C]; memory latents have one value each."""
        lead = 12 if x.shape[1] % 4 else 8
        x = torch.cat([x[:, :1].repeat(1, lead, 1), x], 1)
        out = torch.stack([x[:, 4 * i: 4 * i + 12] for i in range(latents)], 1)
        out = out if memory is None else torch.cat([memory[:, :, None].repeat(1, 1, 12, 1), out], 1)
        return out.flatten(2)

    @staticmethod
    def turn(x: Tensor, memory: int) -> Tensor:
        """RoPE over frames in the first channels, counted anew after memory, written back in place."""
        for part in ([slice(0, memory), slice(memory, None)] if memory else [slice(None)]):
            angle = torch.arange(x[:, part].shape[1])[:, None, None] * 0.3
            a, b = x[:, part, :, 0].clone(), x[:, part, :, 1].clone()
            x[:, part, :, :2] = torch.stack([a * angle[..., 0].cos() - b * angle[..., 0].sin(), a * angle[..., 0].sin() + b * angle[..., 0].cos()], -1).to(x.dtype)
        return x

    def forward(self, x, frames, mouse, keyboard, mouse_memory, keyboard_memory):
        memory = 0 if mouse_memory is None else mouse_memory.shape[1]
        mine = x.unflatten(1, (frames, TOKENS)).transpose(1, 2).flatten(0, 1)  # [places, frames, C]
        moved = self.windows(mouse, frames - memory, mouse_memory).expand(TOKENS, -1, -1)
        q, k, v = (self.qkv(F.gelu(self.mouse(torch.cat([mine, moved], -1)))) * 1).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        out = attend(self.turn(q * 1, memory), self.turn(k * 1, memory), v).flatten(2)
        x = x + self.out(out.unflatten(0, (1, TOKENS)).transpose(1, 2).flatten(1, 2))
        keys = None if keyboard_memory is None else self.keys(keyboard_memory)
        k, v = self.kv(self.windows(self.keys(keyboard), frames - memory, keys)).unflatten(-1, (2, HEADS, HEAD_DIM)).unbind(2)
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).unflatten(1, (frames, TOKENS)).transpose(1, 2).flatten(0, 1)
        out = attend(self.turn(q * 1, memory), self.turn(k * 1, memory).repeat(TOKENS, 1, 1, 1), v.repeat(TOKENS, 1, 1, 1)).flatten(2)
        return x + self.back(out.unflatten(0, (1, TOKENS)).transpose(1, 2).flatten(1, 2))


class Block(nn.Module):
    def __init__(self, actions: bool):
        super().__init__()
        layer = lambda: nn.Linear(DIM, DIM)
        self.modulation = nn.Parameter(torch.randn(1, 1, 6, DIM) / DIM**0.5)
        self.q, self.k, self.v, self.o, self.cam1, self.cam2, self.scale, self.shift = (layer() for _ in range(8))
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (layer() for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.actions = Actions() if actions else None

    def forward(self, x, e, valid, frames, memory, table, index, memory_index, rays, text, actions):
        half, heads = self.up.weight.dtype, lambda y: y.unflatten(-1, (HEADS, HEAD_DIM))
        shift, scale, gate, shift2, scale2, gate2 = (m.squeeze(2) for m in (self.modulation.float() + e).chunk(6, 2))
        y = F.layer_norm(x.float(), (DIM,)) * (1 + scale) + shift
        q, k, v = (heads(full(layer, y)) for layer in (self.q, self.k, self.v))
        q, k = (F.rms_norm(z.flatten(2), (DIM,)).unflatten(2, (HEADS, HEAD_DIM)) for z in (q, k))
        if memory:
            m, tail = memory * TOKENS, slice(valid, None)
            q, k = (torch.cat([turned(z[:, :m], table, memory_index), torch.cat([turned(z[:, m:valid], table, index), z[:, tail]], 1)], 1)
                    for z in (q, k))
        else:
            q, k = (torch.cat([turned(z[:, :valid], table, index), z[:, valid:]], 1) for z in (q, k))
        y = attend(q.to(half), k[:, :valid].to(half), v[:, :valid].to(half)).float()
        x = x + full(self.o, y.flatten(2)) * gate
        camera = self.cam2(F.silu(self.cam1(rays))) + rays
        x = (1 + self.scale(camera)) * x + self.shift(camera)
        x = F.layer_norm(x.float(), (DIM,), self.norm.weight.float(), self.norm.bias.float())  # in place of the stream itself
        text_k, text_v = heads(self.cross_k(text)), heads(self.cross_v(text))
        x = x + self.cross_o(attend(heads(self.cross_q(x.to(half))), text_k, text_v).flatten(2))
        if self.actions is not None:
            x = torch.cat([self.actions(x[:, :valid].to(half), frames, *actions), x[:, valid:]], 1)
        y = F.layer_norm(x.float(), (DIM,)) * (1 + scale2) + shift2
        return x + self.down(F.gelu(self.up(y.to(half)))) * gate2


def run_block(block: Block, *args) -> Tensor:
    return block(*args)


class MatrixGame(nn.Module):
    """Arguments by upstream's names: x [B, C, F, h, w] beside x_memory [B, C, M, h, w], times by token, rays of all frames.

    regional: blocks are regions that are compiled once for all of a kind, which is what the family makes of upstream's.
    """

    def __init__(self, depth: int = 3, regional: bool = False):
        super().__init__()
        self.run = torch.compiler.nested_compile_region(run_block) if regional else run_block
        self.patch, self.rays = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(24, DIM)
        self.text = nn.Sequential(nn.Linear(8, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.time, self.project = nn.Sequential(nn.Linear(8, DIM), nn.SiLU(), nn.Linear(DIM, DIM)), nn.Linear(DIM, 6 * DIM)
        self.blocks = nn.ModuleList(Block(actions=i < depth - 1) for i in range(depth))
        self.modulation, self.head = nn.Parameter(torch.randn(1, 1, 2, DIM) / DIM**0.5), nn.Linear(DIM, 4 * CHANNELS)
        base = 1e2 * (1 + 0.8 * torch.linspace(-1, 1, HEADS))  # one for each head
        angles = torch.arange(512)[None, :, None] / base[:, None, None] ** (torch.arange(HEAD_DIM // 6) / (HEAD_DIM // 6))
        self.table = torch.polar(torch.ones_like(angles), angles).repeat(1, 1, 3)

    def forward(self, x, t, context, seq_len, mouse_cond, keyboard_cond, plucker_emb, x_memory=None, timestep_memory=None, mouse_cond_memory=None,
                keyboard_cond_memory=None, memory_latent_idx=None, predict_latent_idx=None):
        memory = 0
        index, memory_index = (torch.arange(*i) if isinstance(i, tuple) else i if i is None else torch.as_tensor(i)
                               for i in (predict_latent_idx, memory_latent_idx))
        if x_memory is not None:
            memory = x_memory.shape[2]
            x, t = torch.cat([x_memory, x], 2), torch.cat([timestep_memory, t], 1)
        x = self.patch(x)
        frames, x = x.shape[2], x.flatten(2).transpose(1, 2)
        valid = frames * TOKENS
        pad = lambda y: F.pad(y, (0, 0, 0, seq_len - valid)) if seq_len else y
        rays = plucker_emb.unflatten(4, (COLUMNS, 2)).unflatten(3, (ROWS, 2)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        x, rays, t = pad(x), self.rays(pad(rays)), pad(t[..., None])
        waves = t.double() * 10.0 ** -torch.arange(4)
        e = full(self.time[2], F.silu(full(self.time[0], torch.cat([waves.cos(), waves.sin()], -1))))
        e0 = full(self.project, F.silu(e)).unflatten(2, (6, DIM))
        text = self.text(torch.stack([F.pad(c, (0, 0, 0, TEXT - c.shape[0])) for c in context]))
        for block in self.blocks:
            x = self.run(block, x, e0, valid, frames, memory, self.table, index, memory_index, rays, text,
                      (mouse_cond, keyboard_cond, mouse_cond_memory, keyboard_cond_memory))
        shift, scale = (m.squeeze(2) for m in (self.modulation.float() + e[:, :, None]).chunk(2, 2))
        x = full(self.head, F.layer_norm(x.float(), (DIM,)) * (1 + scale) + shift)[:, :valid]
        x = torch.einsum("bfhwpqc->bcfhpwq", x.unflatten(1, (frames, ROWS, COLUMNS)).unflatten(4, (2, 2, CHANNELS)))
        return x.reshape(x.shape[0], CHANNELS, frames, 2 * ROWS, 2 * COLUMNS)[:, :, memory:]


def inputs(clip: int, dtype: torch.dtype = torch.float32, memory: int = MEMORY) -> dict:
    """What one step of a clip is called with, but for ``t``; lists of indices as upstream has them."""
    random = torch.Generator().manual_seed(clip)
    draw = lambda *size: torch.randn(*size, generator=random).to(dtype)
    window, frames, memory = WINDOW if clip else FIRST, 56 if clip else 57, memory if clip else 0
    first = 1 + 10 * clip if clip else 0
    given = {"x": draw(1, CHANNELS, window, 2 * ROWS, 2 * COLUMNS), "seq_len": LONGEST * TOKENS, "context": [draw(3, 8)], "mouse_cond": draw(1, frames, 2),
             "keyboard_cond": draw(1, frames, 6), "plucker_emb": draw(1, 6, memory + window, 2 * ROWS, 2 * COLUMNS),
             "predict_latent_idx": (first, first + window)}
    if clip:
        given |= {"x_memory": draw(1, CHANNELS, memory, 2 * ROWS, 2 * COLUMNS), "timestep_memory": torch.zeros(1, memory * TOKENS, dtype=dtype),
                  "mouse_cond_memory": torch.ones(1, memory, 2, dtype=dtype), "keyboard_cond_memory": -torch.ones(1, memory, 6, dtype=dtype),
                  "memory_latent_idx": [max(first - 2 - 2 * i, 0) for i in range(memory - 1)] + [1]}
    return given


def times(latents: Tensor, time: float, past: int) -> Tensor:
    """The time of every token: 0 for past latents."""
    t = latents.new_full((latents.shape[2], TOKENS), time)
    t[:past] = 0
    return t.flatten()[None]

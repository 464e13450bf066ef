"""One attention over latent frames, in the spellings that models are written in. Every table: name -> how.

Shapes: B batch, L tokens, H heads, D head_dim; latents [B, 3, frames, 2, 3], text and context as keys and values.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, COLUMNS, HEADS, HEAD_DIM = 2, 3, 2, 8
FRAME, DIM = ROWS * COLUMNS, HEADS * HEAD_DIM
sdpa, aten = F.scaled_dot_product_attention, torch.ops.aten

EMBED = {
    "conv3d": (lambda: nn.Conv3d(3, DIM, 1), lambda conv, x: conv(x).flatten(2).transpose(1, 2)),
    "conv3d, einops": (lambda: nn.Conv3d(3, DIM, 1), lambda conv, x: conv(x).permute(0, 2, 3, 4, 1).reshape(x.shape[0], -1, DIM)),
    "conv2d of frames": (lambda: nn.Conv2d(3, DIM, 1), lambda conv, x: conv(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
                         .reshape(x.shape[0], x.shape[2] * FRAME, DIM)),
    "conv2d, unflattened": (lambda: nn.Conv2d(3, DIM, 1), lambda conv, x: conv(x.permute(0, 2, 1, 3, 4).reshape(-1, 3, ROWS, COLUMNS))
                            .unflatten(0, (x.shape[0], -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)),
}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD_DIM))


# How q, k, v [B, L, H, D] come from tokens [B, L, C]: layers, and the function.
linear = lambda n: lambda: nn.Linear(DIM, n * DIM)
PROJECT = {
    "chunk": ([linear(3)], lambda m, x: [heads(t) for t in m[0](x).chunk(3, -1)]),
    "chunk of heads": ([linear(3)], lambda m, x: m[0](x).view(*x.shape[:2], HEADS, 3 * HEAD_DIM).chunk(3, dim=-1)),
    "split": ([linear(3)], lambda m, x: [heads(t) for t in torch.split(m[0](x), DIM, dim=-1)]),
    "split by sizes": ([linear(3)], lambda m, x: [t.reshape(*x.shape[:2], HEADS, HEAD_DIM) for t in m[0](x).split([DIM, DIM, DIM], -1)]),
    "unbind": ([linear(3)], lambda m, x: m[0](x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)),
    "indexed": ([linear(3)], lambda m, x: [m[0](x).view(*x.shape[:2], 3, HEADS, HEAD_DIM)[:, :, i] for i in range(3)]),
    "selected": ([linear(3)], lambda m, x: [m[0](x).reshape(*x.shape[:2], 3, HEADS, -1).select(2, i) for i in range(3)]),
    "timm": ([linear(3)], lambda m, x: [t.transpose(1, 2) for t in m[0](x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)]),
    "sliced": ([linear(3)], lambda m, x: [heads(m[0](x)[..., i * DIM:(i + 1) * DIM]) for i in range(3)]),
    "separate": ([linear(1)] * 3, lambda m, x: [heads(f(x)) for f in m]),
    "separate, viewed": ([linear(1)] * 3, lambda m, x: [f(x).view(x.size(0), -1, HEADS, HEAD_DIM) for f in m]),
    "q and kv": ([linear(1), linear(2)], lambda m, x: [heads(m[0](x)), *(heads(t) for t in m[1](x).chunk(2, -1))]),
    "kv first": ([linear(1), linear(2)], lambda m, x: (lambda kv, q: [q, *kv.unbind(2)])(
        m[1](x).unflatten(-1, (2, HEADS, HEAD_DIM)), heads(m[0](x)))),
    "with an mlp": ([linear(5)], lambda m, x: [heads(t) for t in m[0](x).split([DIM, DIM, DIM, 2 * DIM], -1)[:3]]),
    "functional": ([linear(1)] * 3, lambda m, x: [heads(F.linear(x, weight=f.weight, bias=f.bias)) for f in m]),
}

NORM = {
    "none": lambda x: x,
    "rms_norm": lambda x: F.rms_norm(x, (HEAD_DIM,)),
    "by hand": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).type_as(x),
    "layer_norm": lambda x: F.layer_norm(x, (HEAD_DIM,)),
    "normalize": lambda x: F.normalize(x, dim=-1) * HEAD_DIM**0.5,
    "in fp32": lambda x: F.rms_norm(x.float(), (HEAD_DIM,)).to(x.dtype),
}


def angles(length: int, width: int) -> Tensor:
    return (torch.arange(length)[:, None] * 0.3 ** torch.arange(width))[None, :, None]


def _halves(x):
    a, (c, s) = angles(x.shape[1], HEAD_DIM // 2), x.chunk(2, -1)
    return torch.cat([c * a.cos() - s * a.sin(), c * a.sin() + s * a.cos()], -1)


def _rotate_half(x):
    a = angles(x.shape[1], HEAD_DIM // 2).repeat(1, 1, 1, 2)
    one, two = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2:]
    return x * a.cos() + torch.cat((-two, one), dim=-1) * a.sin()


def _interleaved(x):
    a, pair = angles(x.shape[1], HEAD_DIM // 2), x.unflatten(-1, (-1, 2))
    c, s = pair[..., 0], pair[..., 1]
    return torch.stack([c * a.cos() - s * a.sin(), c * a.sin() + s * a.cos()], -1).flatten(-2)


def _complex(x):
    a = angles(x.shape[1], HEAD_DIM // 2).float()
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(a), a)
    return torch.view_as_real(turned).flatten(3).type_as(x)


def _axes(x):
    """Time, rows and columns each turn a part of the channels."""
    time, rest = x.split([4, HEAD_DIM - 4], dim=-1)
    a = angles(x.shape[1], 2)
    c, s = time.chunk(2, -1)
    return torch.cat([torch.cat([c * a.cos() - s * a.sin(), c * a.sin() + s * a.cos()], -1), rest], dim=-1)


ROPE = {"none": lambda x: x, "halves": _halves, "rotate_half": _rotate_half, "interleaved": _interleaved, "complex": _complex, "axes": _axes}

# [B, L, H, D] -> [B, H, L, D]
MOVE = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "permute, contiguous": lambda x: x.permute(0, 2, 1, 3).contiguous(),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "movedim": lambda x: x.movedim(2, 1),
    "function": lambda x: torch.transpose(x, 1, -2),
    "negative": lambda x: torch.permute(x, (0, -2, -3, -1)),
    "einops": lambda x: x.reshape(x.shape[0], -1, HEADS, HEAD_DIM).transpose(2, 1).reshape(x.shape[0], HEADS, -1, HEAD_DIM),
}

# [parts], dim -> their concatenation
JOIN = {
    "flat": lambda parts, dim: torch.cat(parts, dim=dim),
    "positional": lambda parts, dim: torch.cat(parts, dim),
    "tuple": lambda parts, dim: torch.concat(tuple(parts), dim=dim),
    "axis": lambda parts, dim: torch.concatenate(parts, axis=dim),
    "negative": lambda parts, dim: torch.cat(parts, dim=dim - parts[0].dim()),
    "keywords": lambda parts, dim: torch.cat(tensors=parts, dim=dim),
    "to the right": lambda parts, dim: parts[0] if len(parts) == 1 else torch.cat([parts[0], JOIN["to the right"](parts[1:], dim)], dim=dim),
    "to the left": lambda parts, dim: parts[0] if len(parts) == 1 else torch.cat([JOIN["to the left"](parts[:-1], dim), parts[-1]], dim=dim),
    "singles": lambda parts, dim: torch.cat([torch.cat([p], dim=0) for p in parts], dim=dim),
}


def _stacked(join, pieces, move):
    """Keys and values in one tensor [B, L, 2, H, D]."""
    both = join([torch.stack(p, dim=2) for p in pieces], 1)
    return [move(x) for x in both.unbind(2)]


def _paired(join, pieces, move):
    both = join([torch.cat(p, dim=-1) for p in pieces], 1)
    return [move(x) for x in both.chunk(2, dim=-1)]


# pieces [(k, v), ...] of [B, L, H, D] -> k, v [B, H, L, D]
WHERE = {
    "heads first": lambda join, pieces, move: [join([move(x) for x in xs], 2) for xs in zip(*pieces)],
    "tokens first": lambda join, pieces, move: [move(join(list(xs), 1)) for xs in zip(*pieces)],
    "flat channels": lambda join, pieces, move: [move(heads(join([x.flatten(2) for x in xs], 1))) for xs in zip(*pieces)],
    "k and v stacked": _stacked,
    "k and v paired": _paired,
}

CAST = {
    "none": lambda q, k, v: (q, k, v),
    "like q": lambda q, k, v: (q, k.to(q.dtype), v.to(q.dtype)),
    "type_as": lambda q, k, v: (q.type_as(v), k.type_as(v), v),
    "bfloat16": lambda q, k, v: tuple(x.to(torch.bfloat16) for x in (q, k, v)),
    "half, keyword": lambda q, k, v: tuple(x.to(dtype=torch.float16) for x in (q, k, v)),
    "contiguous": lambda q, k, v: (q.contiguous(), k.contiguous(), v.contiguous()),
    "float": lambda q, k, v: (q.float(), k.float(), v.float()),
    "clone": lambda q, k, v: (q, k.clone(), v.detach()),
}

SCALE = HEAD_DIM**-0.5
scores = lambda q, k: torch.matmul(q, k.transpose(-2, -1))
everything = lambda q, k: torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
nothing = lambda q, k: torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
# Name -> (attention, its scale; None for the default)
ATTEND = {
    "F": (sdpa, None),
    "keywords": (lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False), None),
    "positional": (lambda q, k, v: sdpa(q, k, v, None, 0.0, False), None),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.2), 0.2),
    "default scale": (lambda q, k, v: sdpa(q, k, v, scale=HEAD_DIM**-0.5), SCALE),
    "torch._C": (lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v), None),
    "aten": (lambda q, k, v: aten.scaled_dot_product_attention.default(q, k, v), None),
    "all-true mask": (lambda q, k, v: sdpa(q, k, v, attn_mask=everything(q, k)), None),
    "all-true mask, expanded": (lambda q, k, v: sdpa(q, k, v, everything(q, k)[None, None].expand(q.shape[0], q.shape[1], -1, -1)), None),
    "zeros to add": (lambda q, k, v: sdpa(q, k, v, attn_mask=nothing(q, k)), None),
    "full of true": (lambda q, k, v: sdpa(q, k, v, attn_mask=torch.full((q.shape[-2], k.shape[-2]), True)), None),
    "matmul": (lambda q, k, v: torch.softmax(scores(q, k) * SCALE, dim=-1) @ v, None),
    "no scale": (lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, 1.0),
    "divided": (lambda q, k, v: F.softmax(q @ k.mT / HEAD_DIM**0.5, dim=-1) @ v, None),
    "divided by a function": (lambda q, k, v: torch.matmul(torch.div(scores(q, k), HEAD_DIM**0.5).softmax(-1), v), None),
    "number first": (lambda q, k, v: (SCALE * (q @ k.permute(0, 1, 3, 2))).softmax(-1) @ v, None),
    "scale in q": (lambda q, k, v: ((q * SCALE) @ k.swapaxes(2, 3)).softmax(dim=3) @ v, None),
    "scale in both": (lambda q, k, v: ((q * 0.5) @ (k * 0.4).mT).softmax(-1) @ v, 0.2),
    "scale in the transposed k": (lambda q, k, v: (q @ (k.transpose(2, 3) * 0.2)).softmax(-1) @ v, 0.2),
    "softmax in fp32": (lambda q, k, v: (scores(q, k) * SCALE).softmax(-1, dtype=torch.float32).to(v.dtype) @ v, None),
    "scores in fp32": (lambda q, k, v: torch.softmax((scores(q, k) * SCALE).float(), dim=-1).type_as(v) @ v, None),
    "all in fp32": (lambda q, k, v: (torch.softmax(scores(q.float(), k.float()) * SCALE, -1) @ v.float()).type_as(v), None),
    "dropout 0": (lambda q, k, v: F.dropout(torch.softmax(scores(q, k) * SCALE, -1), 0.0) @ v, None),
    "dropout in eval": (lambda q, k, v: F.dropout((scores(q, k) * SCALE).softmax(-1), p=0.1, training=False) @ v, None),
    "zeros added": (lambda q, k, v: torch.softmax(scores(q, k) * SCALE + nothing(q, k), -1) @ v, None),
    "einsum": (lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(-1), v), None),
    "einsum, other letters": (lambda q, k, v: torch.einsum("b h i j, b h j d -> b h i d", torch.einsum("b h i d, b h j d -> b h i j", q * SCALE, k)
                                                          .softmax(dim=-1), v), None),
    "einsum and matmul": (lambda q, k, v: torch.matmul(torch.softmax(torch.einsum("...id,...jd->...ij", q * 0.2, k), -1), v), 0.2),
    "aten by hand": (lambda q, k, v: aten.matmul.default(aten.softmax.int(aten.mul.Tensor(aten.matmul.default(
        q, aten.transpose.int(k, -2, -1)), SCALE), -1), v), None),
    "multiplied in place": (lambda q, k, v: torch.softmax(scores(q, k).mul_(SCALE), -1) @ v, None),
    "softmax module": (lambda q, k, v: nn.Softmax(dim=-1)(scores(q, k) / HEAD_DIM**0.5) @ v, None),
}

@dataclasses.dataclass(frozen=True)
class Spelling:
    """One choice of every table; context and text: whether there are such keys."""

    embed: str = "conv3d"
    project: str = "chunk"
    norm: str = "none"
    rope: str = "none"
    move: str = "transpose"
    join: str = "flat"
    where: str = "heads first"
    cast: str = "none"
    attend: str = "F"
    text: bool = True
    context: bool = True
    frames: int = 4
    batch: int = 1

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(role, tokens) of each segment, as a matcher must read them."""
        return [(0, 5)] * self.text + [(1, 8 * FRAME)] * self.context + [(2, self.frames * FRAME)]

    def inputs(self) -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(self.batch, *size, generator=random)
        return [draw(3, self.frames, ROWS, COLUMNS), *(draw(n, HEADS, HEAD_DIM) for n in (5, 5) * self.text + (8 * FRAME,) * 2 * self.context)]


class Attention(nn.Module):
    """Self-attention over latent frames in one spelling. keys: what becomes of the pieces [(k, v), ...] before anything."""

    def __init__(self, spelling: Spelling):
        super().__init__()
        self.spelling = spelling
        embed, self.tokens = EMBED[spelling.embed]
        layers, self.project = PROJECT[spelling.project]
        self.embed, self.layers = embed(), nn.ModuleList(make() for make in layers)

    def forward(self, x, *given):
        s = self.spelling
        norm, rope, move = NORM[s.norm], ROPE[s.rope], MOVE[s.move]
        q, k, v = self.project(self.layers, self.tokens(self.embed, x))
        pieces = [*zip(given[::2], given[1::2]), (rope(norm(k)), v)]
        keys, values = WHERE[s.where](JOIN[s.join], pieces, move)
        q, keys, values = CAST[s.cast](move(rope(norm(q))), keys, values)
        return self.attend(q, keys, values).to(x.dtype)

    def attend(self, q, k, v):
        return ATTEND[self.spelling.attend][0](q, k, v)


def attending(attend, **changes):
    """make(spelling) of an attention whose operator is another."""
    def make(spelling):
        model = Attention(dataclasses.replace(spelling, **changes))
        model.attend = attend
        return model, model.spelling.inputs()

    return make


class _RotatedLate(Attention):
    """Keys are cached before RoPE and rotated after they are joined."""

    def attend(self, q, k, v):
        return sdpa(q, ROPE["halves"](k.transpose(1, 2)).transpose(1, 2), v)


class _Joint(Attention):
    """Context and current tokens are projected together; queries are those of the current ones."""

    def forward(self, x, *given):
        q, k, v = (t.transpose(1, 2) for t in self.project(self.layers, self.tokens(self.embed, x)))
        return sdpa(q[:, :, 2 * FRAME:], k, v)


class _Preallocated(Attention):
    """The keys are written into one new tensor, segment by segment."""

    def attend(self, q, k, v):
        keys = torch.zeros(k.shape, dtype=k.dtype)
        keys[:, :, :FRAME] = k[:, :, :FRAME]
        keys[:, :, FRAME:] = k[:, :, FRAME:]
        return sdpa(q, keys, v)


class _LinearEmbedding(Attention):
    """Patches are cut by reshapes and embedded by a linear layer: no convolution tells the token grid."""

    def __init__(self, spelling):
        super().__init__(spelling)
        self.embed, self.tokens = nn.Linear(3, DIM), lambda layer, x: layer(x.flatten(2).transpose(1, 2))


def _flat_batch(q, k, v):
    """[B * H, L, D], as with torch.baddbmm."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return torch.bmm(torch.softmax(torch.bmm(flat(q), flat(k).transpose(1, 2)) * SCALE, -1), flat(v)).reshape(q.shape)


def _stable(q, k, v):
    s = scores(q, k) * SCALE
    p = (s - s.amax(-1, keepdim=True)).exp()
    return p @ v / p.sum(-1, keepdim=True)


alone = dict(text=False, context=False)
whole = lambda kind, **changes: lambda spelling: (lambda s: (kind(s), s.inputs()))(dataclasses.replace(spelling, **changes))
# Deliberately not supported (docs/limits.md): make(spelling) -> (module, inputs), and the reason the user is given.
UNSUPPORTED = {
    "softmax by exp and sum": (attending(_stable), "no scaled dot-product attention"),
    "products of [B * H, L, D]": (attending(_flat_batch), "no scaled dot-product attention"),
    "SDPA of [B * H, L, D]": (attending(lambda q, k, v: sdpa(*(t.flatten(0, 1) for t in (q, k, v))).view(q.shape)), "needed: [batch, heads"),
    "einsum of [B, L, H, D]": (attending(lambda q, k, v: torch.einsum("bhqk,bkhd->bqhd", torch.einsum(
        "bqhd,bkhd->bhqk", *(t.transpose(1, 2) for t in (q, k))).mul(SCALE).softmax(-1), v.transpose(1, 2))), "no scaled dot-product attention"),
    "a scale a head": (attending(lambda q, k, v: torch.softmax(scores(q, k) * torch.full((HEADS, 1, 1), SCALE), -1) @ v), "no scaled dot-product"),
    "one projection of context and current": (whole(_Joint, **alone), "keys of the current tokens"),
    "keys written piece by piece": (whole(_Preallocated, **alone), "cross-attention"),
}
# What is put into another form first: masks and grids worked out from constants and reshapes, concatenation moved last.
CANONICAL = {
    "all true by comparison": attending(lambda q, k, v: sdpa(q, k, v, torch.zeros(q.shape[-2], k.shape[-2]) < 1)),
    "keys rotated after they are joined": whole(_RotatedLate),
    "patches embedded by a linear layer": whole(_LinearEmbedding),
}

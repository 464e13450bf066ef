"""What resembles an attention over latent frames and is none: one twist each, on top of any spelling.

Each twist names the reason that the user must be given.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from attention_spellings import CAST, DIM, FRAME, HEADS, JOIN, MOVE, NORM, ROPE, SCALE, WHERE, Attention, attending, heads, sdpa
from torch import nn

NONE, ONE_FRAME, PARTIAL = "no scaled dot-product attention", "one frame", "no whole number of latent frames"
CROSS, MASK, LAST = "cross-attention", "mask", "not one segment at the end"


def lower(q, k):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()


def by_hand(change):
    return attending(lambda q, k, v: torch.softmax(change(q @ k.transpose(-2, -1) * SCALE), -1) @ v)


def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


def talking(q, k, v):
    mix = torch.ones(HEADS, HEADS, dtype=q.dtype) / HEADS
    return torch.einsum("bhij,hg->bgij", q @ k.transpose(-2, -1) * SCALE, mix).softmax(-1) @ v


def twice(q, k, v):
    p = (q @ k.transpose(-2, -1) * SCALE).softmax(-1)
    return p @ v + p.sum()


class Twisted(Attention):
    """An attention whose tokens or pieces are changed. twist(self, tokens, given) -> q, keys, values of [B, H, L, D]."""

    def __init__(self, spelling, twist, **layers):
        super().__init__(spelling)
        self.twist, self.more = twist, nn.ModuleDict(layers)

    def forward(self, x, *given):
        q, k, v = self.twist(self, self.tokens(self.embed, x), given)
        return self.attend(*CAST[self.spelling.cast](q, k, v)).to(x.dtype)

    def projected(self, tokens):
        """q, k, v [B, L, H, D] with norm and RoPE."""
        q, k, v = self.project(self.layers, tokens)
        change = lambda t: ROPE[self.spelling.rope](NORM[self.spelling.norm](t))
        return change(q), change(k), v

    def joined(self, pieces):
        return WHERE[self.spelling.where](JOIN[self.spelling.join], pieces, self.move)

    @property
    def move(self):
        return MOVE[self.spelling.move]


def twisted(twist, inputs=None, layers=dict, **changes):
    def make(spelling):
        spelling = dataclasses.replace(spelling, **changes)
        return Twisted(spelling, twist, **layers()), spelling.inputs() if inputs is None else inputs(spelling)

    return make


def to_text(self, tokens, given):
    q, _, _ = self.projected(tokens)
    k, v = self.more["kv"](given[0]).chunk(2, -1)
    return (self.move(q), *self.joined([(heads(k), heads(v))]))


def text_inputs(spelling):
    return [spelling.inputs()[0], torch.randn(spelling.batch, 4 * FRAME, DIM)]


def to_an_earlier_layer(self, tokens, given):
    q, _, _ = self.projected(tokens + F.silu(self.more["mlp"](tokens)))
    _, k, v = self.projected(tokens)
    return (self.move(q), *self.joined([*zip(given[::2], given[1::2]), (k, v)]))


def learned_queries(self, tokens, given):
    _, k, v = self.projected(tokens)
    q = self.more["latents"](torch.eye(12)).expand(tokens.shape[0], -1, -1)
    return (self.move(heads(q)), *self.joined([(k, v)]))


def class_token(self, tokens, given):
    q, k, v = self.projected(F.pad(tokens, (0, 0, 1, 0)))
    return (self.move(q), *self.joined([*zip(given[::2], given[1::2]), (k, v)]))


def pooled(self, tokens, given):
    q, k, v = self.projected(tokens)
    return (self.move(q), *self.joined([(k[:, ::2], v[:, ::2])]))


def fewer_queries(self, tokens, given):
    q, k, v = self.projected(tokens)
    return (self.move(q[:, FRAME:]), *self.joined([*zip(given[::2], given[1::2]), (k, v)]))


def newest_first(self, tokens, given):
    q, k, v = self.projected(tokens)
    return (self.move(q), *self.joined([(k, v), *zip(given[::2], given[1::2])]))


def current_twice(self, tokens, given):
    q, k, v = self.projected(tokens)
    return (self.move(q), *self.joined([(k.flip(1), v.flip(1)), (k, v)]))


def two_streams(self, tokens, given):
    """Text and video attend to each other in one sequence, each with layers of its own (MMDiT)."""
    mine, text = self.projected(tokens), [heads(t) for t in self.more["qkv"](given[0]).chunk(3, -1)]
    return [self.move(torch.cat(pair, dim=1)) for pair in zip(text, mine)]


def spatial(self, tokens, given):
    return [self.move(t) for t in self.projected(tokens.unflatten(1, (-1, FRAME)).flatten(0, 1))]


def temporal(self, tokens, given):
    return [self.move(t) for t in self.projected(tokens.unflatten(1, (-1, FRAME)).transpose(1, 2).flatten(0, 1))]


def temporal_einops(self, tokens, given):
    b, length, c = tokens.shape
    frames = length // FRAME
    return [self.move(t) for t in self.projected(tokens.reshape(b, frames, FRAME, c).permute(0, 2, 1, 3).reshape(b * FRAME, frames, c))]


def among_channels(self, tokens, given):
    """Cross-covariance attention: channels attend to channels."""
    q, k, v = self.projected(tokens)
    return [self.move(t).transpose(-2, -1) for t in (q, k, v)]


def four_tokens(spelling):
    """Latents of 2 x 2 tokens a frame, so that the 8 channels of a head look like two frames."""
    return [torch.randn(spelling.batch, 3, spelling.frames, 2, 2)]


def one_frame(spelling):
    return [x[:, :, :1] if x.dim() == 5 else x for x in spelling.inputs()]


def grouped(q, k, v):
    return sdpa(q, k[:, :1], v[:, :1], enable_gqa=True)


def padded(q, k, v):
    keep = torch.arange(k.shape[-2]) < k.shape[-2] - 3
    return sdpa(q, k, v, attn_mask=keep[None, None, None])


def alibi(q, k, v):
    away = (torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])).abs()
    return sdpa(q, k, v, attn_mask=(-0.1 * away).to(q.dtype))


class Biased(Attention):
    """A learned bias on the scores."""

    def __init__(self, spelling):
        super().__init__(spelling)
        self.bias = nn.Parameter(torch.zeros(spelling.frames * FRAME, sum(n for _, n in spelling.segments)))

    def attend(self, q, k, v):
        return sdpa(q, k, v, attn_mask=self.bias.to(q.dtype))


image = dict(frames=1, context=False, text=False, batch=2)
# name -> (make(spelling) -> (module, inputs), reason)
LOOKALIKES = {
    "causal": (attending(lambda q, k, v: sdpa(q, k, v, is_causal=True)), "causal"),
    "causal mask": (attending(lambda q, k, v: sdpa(q, k, v, lower(q, k))), MASK),
    "causal bias": (attending(lambda q, k, v: sdpa(q, k, v, attn_mask=torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype).masked_fill(
        ~lower(q, k), -1e4))), MASK),
    "ones to add": (attending(lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2], dtype=q.dtype))), MASK),
    "padding": (attending(padded), "keys of the current tokens"),  # the mask is a constant prefix: the keys are cut to it
    "alibi": (attending(alibi), MASK),
    "learned bias": (lambda s: (Biased(s), s.inputs()), MASK),
    "dropout": (attending(lambda q, k, v: sdpa(q, k, v, dropout_p=0.1)), "dropout"),
    "grouped heads": (attending(grouped), "numbers of heads"),
    "causal by hand": (by_hand(lambda s: s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -1e4)), NONE),
    "bias by hand": (by_hand(lambda s: s + torch.ones(s.shape[-2:], dtype=s.dtype)), NONE),
    "capped": (by_hand(lambda s: 5 * torch.tanh(s / 5)), NONE),
    "top": (by_hand(lambda s: s.masked_fill(s < s.topk(3, -1)[0][..., -1:], -1e4)), NONE),
    "temperature a head": (by_hand(lambda s: s * torch.arange(1, HEADS + 1)[:, None, None]), NONE),
    "softmax of queries": (attending(lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1), dim=-2) @ v), NONE),
    "sigmoid": (attending(lambda q, k, v: torch.sigmoid(q @ k.transpose(-2, -1) * SCALE) @ v), NONE),
    "squared relu": (attending(lambda q, k, v: F.relu(q @ k.transpose(-2, -1) * SCALE).square() @ v), NONE),
    "linear": (attending(linear_attention), NONE),
    "talking heads": (attending(talking), NONE),
    "weights used twice": (attending(twice), NONE),
    "dropout by hand": (attending(lambda q, k, v: F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.1, True) @ v), NONE),
    "random scores": (attending(lambda q, k, v: torch.softmax(torch.randn(*q.shape[:3], k.shape[2], dtype=v.dtype), -1) @ v), NONE),
    "to text": (twisted(to_text, text_inputs, lambda: {"kv": nn.Linear(DIM, 2 * DIM)}, text=False, context=False), CROSS),
    "to an earlier layer": (twisted(to_an_earlier_layer, layers=lambda: {"mlp": nn.Linear(DIM, DIM)}), CROSS),
    "learned queries": (twisted(learned_queries, layers=lambda: {"latents": nn.Linear(12, DIM)}, text=False, context=False), CROSS),
    "class token": (twisted(class_token), PARTIAL),
    "pooled keys": (twisted(pooled, text=False, context=False), "keys of the current tokens"),
    "fewer queries": (twisted(fewer_queries), "keys of the current tokens"),
    "newest first": (twisted(newest_first, context=True), LAST),
    "current twice": (twisted(current_twice, text=False, context=False), LAST),
    "two streams": (twisted(two_streams, text_inputs, lambda: {"qkv": nn.Linear(DIM, 3 * DIM)}, text=False, context=False), LAST),
    "spatial": (twisted(spatial, text=False, context=False), ONE_FRAME),
    "temporal, 4 frames": (twisted(temporal, text=False, context=False), PARTIAL),
    "temporal, 12 frames": (twisted(temporal, frames=12, text=False, context=False), "temporal"),
    "temporal, einops": (twisted(temporal_einops, frames=12, text=False, context=False), "temporal"),
    "channels": (twisted(among_channels, four_tokens, embed="conv3d", frames=4, text=False, context=False), "channels"),
    "an image": (twisted(lambda self, tokens, given: (lambda q, k, v: (self.move(q), *self.joined([(k, v)])))(*self.projected(tokens)), **image),
                 ONE_FRAME),
    "one frame and text": (twisted(lambda self, tokens, given: (lambda q, k, v: (self.move(q), *self.joined([(given[0], given[1]), (k, v)])))(
        *self.projected(tokens)), one_frame, frames=1, text=True, context=False), ONE_FRAME),
}

"""Attention sites: every spelling is read, segments get their roles, and what is no video attention is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tracing import Traced, relative

from li_compile.patterns import CONTEXT, CURRENT, TEXT

GRID, FRAME, HEADS, HEAD_DIM = (2, 3), 6, 2, 8


def flat(text, context, current):
    return torch.cat([x for x in (text, context, current) if x is not None], dim=2)


class Block(nn.Module):
    """Self-attention over latent frames of 2 x 3 tokens, with text and context given as keys and values.

    attend(q, k, v) and join(text, context, current) are the spellings under test; they may return (out, used).
    """

    def __init__(self, attend=F.scaled_dot_product_attention, join=flat, separate=False):
        super().__init__()
        dim = HEADS * HEAD_DIM
        self.patch, self.attend, self.join, self.separate = nn.Conv3d(3, dim, 1), attend, join, separate
        self.qkv, self.q, self.kv = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x, text_k=None, text_v=None, context_k=None, context_v=None):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        heads = lambda t, n: t.unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(n, -1)
        q, k, v = (*heads(self.q(tokens), 1), *heads(self.kv(tokens), 2)) if self.separate else heads(self.qkv(tokens), 3)
        return self.attend(q, self.join(text_k, context_k, k), self.join(text_v, context_v, v))


def block_inputs(text=5, context=8, frames=4, spare=0):
    """Latents of so many frames, keys and values of text tokens and of context frames (and spare tokens)."""
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 3, frames, *GRID, generator=random)
    pair = lambda n: [torch.randn(1, HEADS, n, HEAD_DIM, generator=random) for _ in range(2)] if n else [None, None]
    return [latents, *pair(text), *pair(context * FRAME + spare)]


def read(module, inputs, **options):
    """(facts, canonical result, traced result) of a module; the canonical graph must still compute the same."""
    traced = Traced(module, *inputs)
    facts = traced.facts(**options)
    with torch.no_grad():
        assert relative(facts.module(*traced.arguments(*inputs))[0], module(*inputs)) <= 1e-5
    return facts


def only_site(module, inputs, **options):
    facts = read(module, inputs, **options)
    (site,) = facts.sites
    assert not [m for m in facts.misses if m.pattern == "attention"]
    return site


def refusal(module, inputs, **options) -> str:
    """The reason why there is no attention site."""
    facts = read(module, inputs, **options)
    assert not facts.sites
    (miss,) = [m for m in facts.misses if m.pattern == "attention"]
    return miss.reason


def softmax_product(q, k, v, scale=HEAD_DIM**-0.5):
    return torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * scale, dim=-1) @ v


# Name -> (attention, scale that the site must have: None for the default).
SPELLINGS = {
    "sdpa positional": (F.scaled_dot_product_attention, None),
    "sdpa keyword": (lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v), None),
    "keywords everywhere": (lambda q, k, v: torch.matmul(input=torch.softmax(input=torch.mul(input=torch.matmul(
        input=q, other=torch.transpose(input=k, dim0=2, dim1=3)), other=0.2), dim=-1), other=v), 0.2),
    "sdpa defaults given": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False), None),
    "sdpa with a scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.2), 0.2),
    "matmul": (softmax_product, None),
    "another scale": (lambda q, k, v: softmax_product(q, k, v, 0.2), 0.2),
    "no scale": (lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2), -1) @ v, 1.0),
    "divided": (lambda q, k, v: F.softmax(q @ k.mT / HEAD_DIM**0.5, dim=-1) @ v, None),
    "number first": (lambda q, k, v: (HEAD_DIM**-0.5 * (q @ k.permute(0, 1, 3, 2))).softmax(-1) @ v, None),
    "scale in q": (lambda q, k, v: ((q * HEAD_DIM**-0.5) @ k.swapaxes(2, 3)).softmax(dim=3) @ v, None),
    "scale in q and k": (lambda q, k, v: ((q * 0.5) @ (k * 0.4).mT).softmax(-1) @ v, 0.2),
    "scale in the transposed k": (lambda q, k, v: (q @ (k.mT * HEAD_DIM**-0.5)).softmax(-1) @ v, None),
    "einsum": (lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", (
        torch.einsum("bhqd,bhkd->bhqk", q, k) * HEAD_DIM**-0.5).softmax(-1), v), None),
    "einsum and matmul": (lambda q, k, v: torch.matmul(
        torch.softmax(torch.einsum("b h i d, b h j d -> b h i j", q * 0.2, k), -1), v), 0.2),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_site(name):
    attend, scale = SPELLINGS[name]
    site = only_site(Block(attend), block_inputs())
    assert site.node.target in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)
    assert site.scale == (None if scale is None else pytest.approx(scale))
    assert site.query.meta["example_value"].shape == (1, HEADS, 4 * FRAME, HEAD_DIM)
    assert [s.length for s in site.segments] == [5, 8 * FRAME, 4 * FRAME]


JOINS = {
    "flat": flat,
    "nested": lambda t, c, x: torch.cat([t, torch.cat([c, x], dim=2)], dim=2),
    "nested to the left": lambda t, c, x: torch.cat([torch.cat([t, c], dim=2), x], dim=2),
    "negative dimension": lambda t, c, x: torch.cat([t, c, x], dim=-2),
    "axis": lambda t, c, x: torch.concat([t, c, x], axis=2),
    "tuple, positional": lambda t, c, x: torch.concatenate((t, torch.cat((c, x), -2)), 2),
    "single inside": lambda t, c, x: torch.cat([torch.cat([t], dim=2), c, torch.cat([x], dim=1)], dim=2),
}


@pytest.mark.parametrize("name", JOINS)
def test_segments_of_every_concatenation(name):
    site = only_site(Block(join=JOINS[name]), block_inputs())
    assert [(s.role, s.length) for s in site.segments] == [(TEXT, 5), (CONTEXT, 48), (CURRENT, 24)]
    assert [s.key.meta["example_value"].shape[2] for s in site.segments] == [5, 48, 24]
    assert [s.value.meta["example_value"].shape[2] for s in site.segments] == [5, 48, 24]
    assert all(s.key is not s.value for s in site.segments)


@pytest.mark.parametrize(
    ("text", "context", "kind", "roles"),
    [
        (5, 8, "decode", [TEXT, CONTEXT, CURRENT]),
        (0, 8, "decode", [CONTEXT, CURRENT]),
        (5, 0, "prefill", [TEXT, CURRENT]),
        (0, 0, "prefill", [CURRENT]),
    ],
)
def test_roles_and_kind(text, context, kind, roles):
    site = only_site(Block(), block_inputs(text, context))
    assert site.kind == kind and [s.role for s in site.segments] == roles
    assert site.grid == GRID and site.branches == 1 and site.region == ""
    assert site.frames(CURRENT) == 4 and site.frames(CONTEXT) == context and site.tokens(TEXT) == text
    assert site.tokens(TEXT, CONTEXT, CURRENT) == text + (context + 4) * FRAME


def test_queries_and_keys_of_separate_projections():
    assert only_site(Block(separate=True), block_inputs()).kind == "decode"


def test_context_of_a_dynamic_length():
    # The tokens must be known to be whole frames: they are, where they come from frames.
    inputs, join = block_inputs(), lambda t, c, x: torch.cat([t, c.flatten(2, 3), x], dim=2)
    inputs[3] = inputs[4] = inputs[3].unflatten(2, (-1, FRAME))
    torch._dynamo.mark_dynamic(inputs[3], 2)
    site = only_site(Block(join=join), inputs)
    assert site.kind == "decode" and isinstance(site.frames(CONTEXT), torch.SymInt)


def test_two_branches_on_the_batch_axis():
    class Branches(Block):
        def forward(self, x, text_k, text_v, context_k, context_v):
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
            q, k, v = (torch.cat([t, t.flip(-1)], dim=0) for t in (q, k, v))
            join = lambda *parts: torch.cat([p if p.shape[0] == 2 else p.repeat(2, 1, 1, 1) for p in parts], dim=2)
            return self.attend(q, join(text_k, context_k, k), join(text_v, context_v, v))

    site = only_site(Branches(), block_inputs())
    assert site.branches == 2 and [s.role for s in site.segments] == [TEXT, CONTEXT, CURRENT]


def test_layers_are_told_apart_by_their_weights():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, *inputs):
            return self.first(*inputs) + self.second(*inputs) + self.first(*inputs)

    sites = read(Two(), block_inputs()).sites
    layers = [layer for site in sites for layer in site.layers]
    assert len(sites) == 3 and layers[0] == layers[2] != layers[1]


def test_the_grid_can_be_given():
    class Tokens(Block):  # no patch embedding in the graph
        def forward(self, tokens):
            q, k, v = self.qkv(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
            return self.attend(q, k, v)

    tokens = [torch.randn(1, 24, HEADS * HEAD_DIM)]
    assert "give sparse.grid=(rows, columns)" in refusal(Tokens(), tokens)
    assert only_site(Tokens(), tokens, sparse={"grid": GRID}).frames(CURRENT) == 4


MASK = torch.ones(4 * FRAME, 5 + 12 * FRAME, dtype=torch.bool)
CAUSAL = dict(is_causal=True)


@pytest.mark.parametrize(
    ("module", "inputs", "reason"),
    [
        (Block(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK.clone())), block_inputs(), "mask"),
        (Block(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **CAUSAL)), block_inputs(0, 0), "causal"),
        (Block(lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :-1], k, v)), block_inputs(), "23 queries but 24"),
        (Block(join=lambda t, c, x: torch.cat([x, t], dim=2)), block_inputs(), "not one segment at the end"),
        (Block(join=lambda t, c, x: torch.cat([c, x.flip(2), x], dim=2)), block_inputs(), "not one segment at the end"),
        (Block(), block_inputs(text=FRAME), "text and context cannot be told apart"),
        (Block(lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0])), block_inputs(), "needed: [batch, heads"),
    ],
    ids=["masked", "causal", "fewer queries", "text last", "current twice", "text of whole frames", "no batch axis"],
)
def test_what_cannot_be_read_is_refused(module, inputs, reason):
    assert reason in refusal(module, inputs)


def test_dropout_is_refused_in_training_only():
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    traced = Traced(Block(attend), *block_inputs())
    facts = traced.facts()
    assert not facts.sites and "dropout" in facts.misses[0].reason


def test_grouped_heads_are_refused():
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    assert "numbers of heads" in refusal(Block(attend), block_inputs())


def test_context_of_partial_frames_is_text():
    """Tokens that are no whole frames cannot be tiled; they are read whole, as text is."""
    site = only_site(Block(), block_inputs(text=0, spare=1))
    assert [s.role for s in site.segments] == [TEXT, CURRENT] and site.kind == "prefill"


def test_current_tokens_of_partial_frames_are_refused():
    class Registers(Block):
        def forward(self, x):
            tokens = F.pad(self.patch(x).flatten(2).transpose(1, 2), (0, 0, 0, 1))  # one token more than the frames
            q, k, v = self.qkv(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
            return self.attend(q, k, v)

    reason = refusal(Registers(), block_inputs()[:1])
    assert "25 tokens are no whole number of latent frames" in reason and "2 x 3" in reason and "sparse.grid" in reason


def test_cross_attention_is_refused():
    class Cross(Block):
        def forward(self, x, text):
            q = self.q(self.patch(x).flatten(2).transpose(1, 2)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            return self.attend(q, *self.kv(text).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(2, -1))

    text = torch.randn(1, 2 * FRAME, HEADS * HEAD_DIM)
    assert "cross-attention" in refusal(Cross(), [block_inputs()[0], text])


class ImageTransformer(nn.Module):
    """A plain ViT block: one image, no frames."""

    def __init__(self, cls: bool):
        super().__init__()
        self.patch, self.qkv, self.cls = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), cls

    def forward(self, image):
        tokens = self.patch(image).flatten(2).transpose(1, 2)
        tokens = F.pad(tokens, (0, 0, 1, 0)) if self.cls else tokens
        return F.scaled_dot_product_attention(*self.qkv(tokens).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1))


class LanguageBlock(nn.Module):
    def __init__(self, causal: bool):
        super().__init__()
        self.embed, self.qkv, self.causal = nn.Embedding(50, 16), nn.Linear(16, 48), causal

    def forward(self, tokens):
        q, k, v = self.qkv(self.embed(tokens)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, image):
        return image + self.up(F.silu(self.down(image)))


@pytest.mark.parametrize(
    ("module", "inputs", "reason"),
    [
        (ImageTransformer(cls=True), [torch.randn(2, 3, 16, 16)], "17 tokens are no whole number of latent frames"),
        (ImageTransformer(cls=False), [torch.randn(2, 3, 16, 16)], "one frame"),
        (LanguageBlock(causal=True), [torch.arange(12)[None]], "causal"),
        (LanguageBlock(causal=False), [torch.arange(12)[None]], "give sparse.grid"),
        (ConvNet(), [torch.randn(1, 3, 16, 16)], "no scaled dot-product attention"),
    ],
    ids=["ViT with a class token", "ViT", "causal LLM", "bidirectional LLM", "conv net"],
)
def test_models_of_other_kinds_have_no_site(module, inputs, reason):
    assert reason in refusal(module, inputs)

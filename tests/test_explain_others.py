"""Models that are no world models: explain finds nothing to rewrite in them, says why, and is quick."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import li_compile


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out, self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ImageTransformer(nn.Module):
    def __init__(self, class_token: bool):
        super().__init__()
        self.patch, self.blocks, self.head = nn.Conv2d(3, 32, 4, 4), nn.ModuleList(Block(32, 4) for _ in range(4)), nn.Linear(32, 10)
        self.token = nn.Parameter(torch.zeros(1, 1, 32)) if class_token else None

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = x if self.token is None else torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class LanguageModel(nn.Module):
    """Causal blocks; with a cache, one new token attends to the keys and values of the past."""

    def __init__(self, cached: bool):
        super().__init__()
        self.cached, self.embed, self.head = cached, nn.Embedding(50, 32), nn.Linear(32, 50)
        self.blocks = nn.ModuleList(Block(32, 4, causal=True) for _ in range(3))

    def forward(self, tokens, keys=None, values=None):
        x = self.embed(tokens)
        for block in self.blocks:
            if not self.cached:
                x = block(x)
                continue
            q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2))
            x = x + block.out(out.transpose(1, 2).flatten(2))
        return self.head(x)


class UNet(nn.Module):
    """Convolutions, attention at two resolutions, text by cross-attention, time by an embedding."""

    def __init__(self):
        super().__init__()
        self.enter, self.down, self.middle = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.leave, self.time = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1), nn.Linear(1, 16)
        self.low, self.high, self.q, self.kv = Block(16, 2), Block(16, 2), nn.Linear(16, 16), nn.Linear(16, 32)

    def attend(self, block, x, text):
        tokens = block(x.flatten(2).transpose(1, 2))
        heads = lambda t: t.unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = self.kv(text).chunk(2, -1)
        tokens = tokens + F.scaled_dot_product_attention(heads(self.q(tokens)), heads(k), heads(v)).transpose(1, 2).flatten(2)
        return tokens.transpose(1, 2).view_as(x)

    def forward(self, x, time, text):
        x = F.silu(self.enter(x) + self.time(time)[..., None, None])
        below = self.attend(self.low, F.silu(self.middle(F.silu(self.down(x)))), text)
        x = self.up(F.interpolate(below, scale_factor=2.0)) + x
        return self.leave(self.attend(self.high, x, text))


CASES = {
    "ViT": (lambda: ImageTransformer(False), lambda: [torch.randn(2, 3, 16, 16)], {"one frame": 4}),
    "ViT with a class token": (lambda: ImageTransformer(True), lambda: [torch.randn(2, 3, 16, 16)], {"no whole number of latent frames": 4}),
    "causal LLM": (lambda: LanguageModel(False), lambda: [torch.randint(50, (1, 12))], {"causal": 3}),
    "LLM with a cache": (lambda: LanguageModel(True), lambda: [torch.randint(50, (1, 1)), *torch.randn(2, 1, 4, 24, 8)], {"sparse.grid": 3}),
    "UNet": (UNet, lambda: [torch.randn(2, 4, 8, 8), torch.rand(2, 1), torch.randn(2, 16, 16)], {"one frame": 2, "cross-attention": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_rewritten_and_every_attention_has_its_reason(name):
    make, inputs, reasons = CASES[name]
    started = time.perf_counter()
    report = li_compile.explain(make().eval(), *inputs())
    assert time.perf_counter() - started < 60
    (graph,) = report.graphs
    assert graph.found == {} and not report.breaks
    assert not {pass_: n for pass_, n in report.counts().items() if n}
    given = [m for m in graph.misses if m.pattern == "attention"]
    assert {reason: sum(reason in m.reason for m in given) for reason in reasons} == reasons and len(given) == sum(reasons.values())
    assert all("test_explain_others.py" in m.where for m in given)
    assert {m.pattern for m in graph.misses} == {"attention", "context", "denoising loop"}

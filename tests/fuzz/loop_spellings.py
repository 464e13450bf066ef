"""One sampling loop over a small denoiser, in the spellings that pipelines are written in. Every table: name -> how."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from samplers import Denoiser, shifted, unipc
from torch import nn

WIDTH = 4


class Transformer(nn.Module):
    """Self-attention over the rows of a state [B, L, 4], between its embedding and its projection back."""

    def __init__(self):
        super().__init__()
        self.start, self.time, self.condition = nn.Linear(WIDTH, 8), nn.Linear(1, 8), nn.Linear(1, 8)
        self.qkv, self.out, self.end = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, WIDTH)

    def forward(self, x, time, condition):
        x = self.start(x) + self.time(time) + self.condition(condition)
        q, k, v = self.qkv(F.layer_norm(x, (8,))).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return self.end(x)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.time, self.condition = nn.Conv1d(WIDTH, 8, 1), nn.Linear(1, 8), nn.Linear(1, 8)
        self.end = nn.Conv1d(8, WIDTH, 1)

    def forward(self, x, time, condition):
        h = self.start(x.transpose(1, 2)) + (self.time(time) + self.condition(condition)).transpose(1, 2)
        return self.end(F.silu(h)).transpose(1, 2)


MODELS = {"denoiser": Denoiser, "one block": lambda: Denoiser(blocks=1), "three blocks": lambda: Denoiser(blocks=3),
          "attention": Transformer, "convolutions": Convolutional}

# How the model is told the noise level: (sigma, step, condition) -> time, of the condition's shape.
TIMES = {
    "full_like": lambda sigma, i, c: torch.full_like(c, sigma),
    "full": lambda sigma, i, c: torch.full(c.shape, sigma),
    "in thousands": lambda sigma, i, c: torch.full_like(c, 1000 * sigma),
    "expanded tensor": lambda sigma, i, c: torch.tensor(sigma).expand(c.shape),
    "index": lambda sigma, i, c: torch.full_like(c, float(i)),
    "ones": lambda sigma, i, c: torch.ones_like(c) * sigma,
}


def one_call(call, scale):
    return call


def two_calls(call, scale):
    return lambda x, i, sigma, c: (lambda plain, given: plain + scale * (given - plain))(call(x, i, sigma, torch.zeros_like(c)), call(x, i, sigma, c))


def two_calls_weighted(call, scale):
    return lambda x, i, sigma, c: (1 - scale) * call(x, i, sigma, torch.zeros_like(c)) + call(x, i, sigma, c) * scale


def given_first(call, scale):
    def velocity(x, i, sigma, c):
        given = call(x, i, sigma, c)
        return torch.lerp(call(x, i, sigma, c * 0), given, scale)

    return velocity


def one_batch(call, scale):
    def velocity(x, i, sigma, c):
        plain, given = call(torch.cat([x, x]), i, sigma, torch.cat([torch.zeros_like(c), c])).chunk(2)
        return plain + scale * (given - plain)

    return velocity


def one_batch_repeated(call, scale):
    def velocity(x, i, sigma, c):
        out = call(x.repeat(2, 1, 1), i, sigma, torch.cat((c, torch.zeros_like(c)), dim=0))
        given, plain = out[: x.shape[0]], out[x.shape[0]:]
        return plain.mul(1 - scale) + given.mul(scale)

    return velocity


GUIDANCE = {f.__name__: f for f in (one_call, two_calls, two_calls_weighted, given_first, one_batch, one_batch_repeated)}

# x, v, sigma, next sigma -> next x
def _add_(x, v, s, n):
    x = x.clone()
    x += v * (n - s)
    return x


EULER = {
    "x + v d": lambda x, v, s, n: x + v * (n - s),
    "x - d v": lambda x, v, s, n: x - (s - n) * v,
    "add alpha": lambda x, v, s, n: torch.add(x, v, alpha=n - s),
    "sub alpha": lambda x, v, s, n: x.sub(v, alpha=s - n),
    "in fp32": lambda x, v, s, n: (x.float() + (n - s) * v.float()).to(x.dtype),
    "type_as": lambda x, v, s, n: (x + v * (n - s)).type_as(x),
    "divided": lambda x, v, s, n: x + v / (1 / (n - s)),
    "through x0": lambda x, v, s, n: (lambda x0: x0 + n * (x - x0) / s)(x - s * v),
    "mixed": lambda x, v, s, n: (lambda x0, noise: (1 - n) * x0 + n * noise)(x - s * v, x + (1 - s) * v),
    "negated": lambda x, v, s, n: x + (-v) * (s - n),
    "a tensor's step": lambda x, v, s, n: x + v * torch.tensor(n - s),
}


def euler(update):
    def sample(velocity, sigmas, x, c):
        for i, (s, n) in enumerate(zip(sigmas, sigmas[1:])):
            x = EULER[update](x, velocity(x, i, s, c), s, n)
        return x

    return sample


def renoise(mix):
    def sample(velocity, sigmas, x, c):
        for i, (s, n) in enumerate(zip(sigmas, sigmas[1:])):
            clean = x - s * velocity(x, i, s, c)
            x = mix(clean, torch.randn_like(clean), n) if n else clean
        return x

    return sample


def x0(mix):
    """The model predicts the clean state."""
    def sample(velocity, sigmas, x, c):
        for i, (s, n) in enumerate(zip(sigmas, sigmas[1:])):
            clean = velocity(x, i, s, c)
            x = mix(clean, torch.randn_like(clean), n) if n else clean
        return x

    return sample


def ddim(velocity, sigmas, x, c):
    """Variance preserving, the model predicts noise."""
    alpha = [math.cos(0.5 * math.pi * 0.99 * s) for s in sigmas]
    for i, (a, b) in enumerate(zip(alpha, alpha[1:])):
        noise = velocity(x, i, sigmas[i], c)
        clean = (x - math.sqrt(1 - a * a) * noise) / a
        x = b * clean + math.sqrt(1 - b * b) * noise
    return x


def bashforth(velocity, sigmas, x, c):
    """Adams-Bashforth of order 2."""
    before = None
    for i, (s, n) in enumerate(zip(sigmas, sigmas[1:])):
        v = velocity(x, i, s, c)
        x = x + (n - s) * (v if before is None else 1.5 * v - 0.5 * before)
        before = v
    return x


def by_unipc(velocity, sigmas, x, c):
    levels = [min(s, 0.9998) for s in sigmas]
    step = iter(range(len(sigmas)))
    return unipc(lambda x, sigma, c: velocity(x, next(step), sigma, c), levels)(x, c)


MIX = {"weights": lambda clean, noise, n: (1 - n) * clean + n * noise, "lerp": lambda clean, noise, n: torch.lerp(clean, noise, n)}
# name -> (sampler, kind of update that is read)
SAMPLERS = {
    **{f"euler, {name}": (euler(name), "Euler") for name in EULER},
    **{f"renoise, {name}": (renoise(mix), "clean state and fresh noise") for name, mix in MIX.items()},
    **{f"x0, {name}": (x0(mix), "clean state and fresh noise") for name, mix in MIX.items()},
    "ddim": (ddim, "first order"), "adams-bashforth": (bashforth, "multistep"), "unipc": (by_unipc, "multistep"),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    sampler: str = "euler, x + v d"
    model: str = "denoiser"
    time: str = "full_like"
    guidance: str = "one_call"
    steps: int = 4
    shift: float = 5.0
    scale: float = 3.0

    @property
    def sigmas(self) -> list[float]:
        return shifted(self.steps, self.shift)

    @property
    def kind(self) -> str:
        """What is read of the updates: of two steps the first is Euler's in a multistep method too."""
        return "Euler" if self.steps == 2 and SAMPLERS[self.sampler][1] == "multistep" else SAMPLERS[self.sampler][1]

    def build(self):
        """(function of a state and a condition, its inputs)"""
        model, sample = MODELS[self.model](), SAMPLERS[self.sampler][0]
        call = lambda x, i, sigma, c: model(x, TIMES[self.time](sigma, i, c), c)
        velocity = GUIDANCE[self.guidance](call, self.scale)
        return lambda x, c: sample(velocity, self.sigmas, x, c), [torch.randn(1, 3, WIDTH), torch.randn(1, 3, 1)]

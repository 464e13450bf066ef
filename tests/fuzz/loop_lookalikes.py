"""What resembles a sampling loop and is none; every maker takes a Loop for its model, time, steps and sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from loop_spellings import MODELS, TIMES, WIDTH, Loop
from torch import nn

NOT_CALLED = "no model is called more than once"


def inputs():
    return [torch.randn(1, 3, WIDTH), torch.randn(1, 3, 1)]


def made(body, layers=None):
    """body(models, call, loop, x, c) -> result, with so many models (one of the loop's kind if None)."""
    def make(loop: Loop):
        models = nn.ModuleList(MODELS[loop.model]() for _ in range(1 if layers is None else layers(loop)))
        call = lambda model, x, sigma, i, c: model(x, TIMES[loop.time](sigma, i, c), c)
        return lambda x, c: body(models, call, loop, x, c), inputs()

    return make


def steps(loop):
    return list(enumerate(zip(loop.sigmas, loop.sigmas[1:])))


def own_weights(models, call, loop, x, c):
    """A stack of layers, each with weights of its own and a time of its own."""
    for model, (i, (s, n)) in zip(models, steps(loop)):
        x = x + call(model, x, s, i, c) * (n - s)
    return x


def shared_layer(models, call, loop, x, c):
    for _ in steps(loop):
        x = x + call(models[0], x, 0.5, 0, c)
    return x


def fixed_point(models, call, loop, x, c):
    for _ in steps(loop):
        x = call(models[0], x, 0.5, 0, c)
    return x


def damped(models, call, loop, x, c):
    """An unrolled optimiser: the step size falls, but the model is told nothing of it."""
    for _, (s, _) in steps(loop):
        x = x - s * call(models[0], x, 0.5, 0, c)
    return x


def momentum(models, call, loop, x, c):
    speed = torch.zeros_like(x)
    for _ in steps(loop):
        speed = 0.9 * speed + call(models[0], x, 0.5, 0, c)
        x = x - 0.1 * speed
    return x


def conditions(models, call, loop, x, c):
    """One input under several times, averaged."""
    return sum(call(models[0], x, s, i, c) for i, (s, _) in steps(loop)) / loop.steps


def micro_batches(models, call, loop, x, c):
    return torch.cat([call(models[0], x * float(i + 1), s, i, c) for i, (s, _) in steps(loop)])


def losses(models, call, loop, x, c):
    """Training on several noise levels at once."""
    noise, total = torch.randn_like(x), 0
    for i, (s, _) in steps(loop):
        total = total + (call(models[0], (1 - s) * x + s * noise, s, i, c) - (noise - x)).square().mean()
    return total


def only_through(models, call, loop, x, c):
    """An autoregressive rollout: nothing of the state goes around the model."""
    for i, (s, _) in steps(loop):
        x = call(models[0], x, s, i, c)
    return x


def normalised(models, call, loop, x, c):
    for i, (s, _) in steps(loop):
        x = F.layer_norm(F.silu(call(models[0], x, s, i, c)), (WIDTH,))
    return x


def one_step(models, call, loop, x, c):
    return x - call(models[0], x, 1.0, 0, c)


def dropping(models, call, loop, x, c):
    """The model draws random numbers."""
    for i, (s, n) in steps(loop):
        out = models[0].end(_dropped(models[0], x, s, c))
        x = x + (out.transpose(1, 2) if loop.model == "convolutions" else out) * (n - s)
    return x


def _dropped(model, x, s, c):
    h = model.time(torch.full_like(c, s)) + model.condition(c) + x.sum(-1, keepdim=True)
    h = F.dropout(h, 0.5, True)
    return h.transpose(1, 2) if isinstance(model.end, nn.Conv1d) else h


class Recurrent(nn.Module):
    """An RNN, a GRU or a gated residual over a sequence given as an input."""

    def __init__(self, kind: str, length: int, width: int):
        super().__init__()
        self.kind, self.length, self.width = kind, length, width
        self.x, self.h, self.gate = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, data, h):
        for i in range(self.length):
            x = data[:, i] if self.kind != "gru" else data[i]
            new = torch.tanh(self.x(x) + self.h(h))
            if self.kind == "gru":
                z = torch.sigmoid(self.gate(x))
                new = (1 - z) * h + z * new
            elif self.kind == "residual":
                new = h + new
            elif self.kind == "leaky":
                new = 0.9 * h + 0.1 * new
            h = new
        return h


def recurrent(kind):
    def make(loop: Loop):
        width = 2 + 2 * list(MODELS).index(loop.model) + list(TIMES).index(loop.time)
        sizes = (loop.steps, 2, width) if kind == "gru" else (2, loop.steps, width)
        return Recurrent(kind, loop.steps, width), [torch.randn(*sizes), torch.randn(2, width)]

    return make


class Layers(nn.Module):
    """A plain network of equal layers."""

    def __init__(self, depth: int, width: int, kind: str):
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) if kind == "resnet" else nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x + F.silu(layer(x)) if self.kind != "mlp" else F.gelu(layer(x))
        return x


def layers(kind):
    def make(loop: Loop):
        width = 2 + 2 * list(MODELS).index(loop.model) + list(TIMES).index(loop.time)
        return Layers(loop.steps, width, kind), [torch.randn(2, width, 4, 4) if kind == "resnet" else torch.randn(2, width)]

    return make


def pyramid(models, call, loop, x, c):
    """Every step works on another resolution."""
    for i, (s, n) in steps(loop):
        x = x + call(models[0], x, s, i, c) * (n - s)
        x, c = x.repeat_interleave(2, 1), c.repeat_interleave(2, 1)
    return x


# name -> (make(loop) -> (function, inputs), a pattern for the reason that the user must be given)
LOOKALIKES = {
    "layers with own weights": (made(own_weights, lambda loop: loop.steps), NOT_CALLED),
    "a shared layer": (made(shared_layer), "not even a time"),
    "a fixed point": (made(fixed_point), "not even a time|hands on other values"),
    "an unrolled optimiser": (made(damped), "not even a time"),
    "momentum": (made(momentum), "not even a time"),
    "an average over times": (made(conditions), "does not depend on"),
    "micro-batches": (made(micro_batches), "does not depend on"),
    "losses at several times": (made(losses), "does not depend on"),
    "a rollout": (made(only_through), "only through the model|hands on other values"),
    "a normalised rollout": (made(normalised), "only through the model|hands on other values"),
    "one step": (made(one_step), NOT_CALLED),
    "random numbers inside": (made(dropping), "random numbers"),
    "resolutions": (made(pyramid), NOT_CALLED),
    **{f"{kind} over a sequence": (recurrent(kind), "different data|only through the model|does not depend on|not linear") for kind in ("rnn", "gru", "residual", "leaky")},
    **{kind: (layers(kind), NOT_CALLED) for kind in ("mlp", "residual mlp", "resnet")},
}

"""A small denoiser in every form that a compiler sees one in, and the samplers that call it, written out from their papers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

region = torch.compiler.nested_compile_region


def run_block(layer, x):
    return x + F.silu(layer(x))


class Denoiser(nn.Module):
    """Velocity of a state [B, ..., 4], given a time [B, ..., 1] and a condition [B, ..., 1], through some blocks."""

    def __init__(self, regional=False, inside=None, blocks=2):
        super().__init__()
        self.start, self.time, self.condition = nn.Linear(4, 8), nn.Linear(1, 8), nn.Linear(1, 8)
        self.blocks, self.end = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks)), nn.Linear(8, 4)
        run = run_block if inside is None else lambda layer, x: run_block(layer, inside(x))
        self.run = region(run) if regional else run

    def forward(self, x, time, condition):
        x = self.start(x) + self.time(time) + self.condition(condition)
        for block in self.blocks:
            x = self.run(block, x)
        return self.end(x)


class Remembering(Denoiser):
    """A denoiser that keeps what each block read in a cache [blocks, B, slots, 8], as causal models keep keys and values:
    a call writes the slot of its chunk and reads all slots up to it."""

    def forward(self, x, time, condition, cache, slot=2, how="setitem"):
        x = self.start(x) + self.time(time) + self.condition(condition)
        for i, block in enumerate(self.blocks):
            if how == "setitem":
                cache[i, :, slot] = x
            elif how == "copy_":
                cache[i, :, slot].copy_(x)
            else:
                cache[i].index_copy_(1, torch.full((1,), slot, device=x.device), x[:, None])
            x = self.run(block, x + cache[i, :, :slot + 1].mean(1))
        return self.end(x)


plainly = lambda model, *args: model(*args)
FORMS = {
    "unrolled": (lambda **options: Denoiser(**options), plainly),
    "block regions": (lambda **options: Denoiser(regional=True, **options), plainly),
    "step regions": (lambda **options: Denoiser(**options), region(lambda model, *args: model(*args))),
}

Velocity = Callable[[Tensor, float, Tensor], Tensor]  # of a state, a noise level and a condition


def alone(model: nn.Module, call=plainly) -> Velocity:
    """One call of the model a step."""
    return lambda x, sigma, condition: call(model, x, torch.full_like(condition, sigma), condition)


def guided(model: nn.Module, call=plainly, scale: float = 3.0) -> Velocity:
    """Classifier-free guidance as two calls a step."""
    def velocity(x, sigma, condition):
        time = torch.full_like(condition, sigma)
        plain, given = call(model, x, time, torch.zeros_like(condition)), call(model, x, time, condition)
        return plain + scale * (given - plain)

    return velocity


def guided_batch(model: nn.Module, call=plainly, scale: float = 3.0) -> Velocity:
    """Classifier-free guidance as one call a step on both halves of a batch."""
    def velocity(x, sigma, condition):
        both = torch.cat([torch.zeros_like(condition), condition])
        plain, given = call(model, torch.cat([x, x]), torch.full_like(both, sigma), both).chunk(2)
        return plain + scale * (given - plain)

    return velocity


GUIDANCE = {"alone": alone, "sequential": guided, "batched": guided_batch}


def shifted(steps: int, shift: float = 5.0, most: float = 1.0) -> list[float]:
    """Noise levels of the shifted flow-matching schedule, steps + 1 values from ``most`` to 0."""
    line = [most * (1 - i / steps) for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in line]


def skipping(velocity: Velocity, skip: Sequence[int]) -> Callable:
    """velocity(x, sigma, condition, i), that hands on the last computed one at the steps in ``skip``."""
    last = []

    def held(x, sigma, condition, i):
        if i not in skip:
            last[:] = [velocity(x, sigma, condition)]
        return last[0]

    return held


def euler(velocity: Velocity, sigmas: Sequence[float], skip: Sequence[int] = ()):
    """x[i+1] = x[i] + (sigma[i+1] - sigma[i]) v[i], flow matching."""
    def sample(x, condition):
        held = skipping(velocity, skip)
        for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
            x = x + held(x, sigma, condition, i) * (following - sigma)
        return x

    return sample


def renoise(velocity: Velocity, sigmas: Sequence[float], skip: Sequence[int] = (), predicts: str = "velocity"):
    """Few-step distilled samplers (Self-Forcing): to the clean state, and noise again, drawn outside of the model."""
    def sample(x, condition):
        held = skipping(velocity, skip)
        for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
            out = held(x, sigma, condition, i)
            clean = x - sigma * out if predicts == "velocity" else out
            x = (1 - following) * clean + following * torch.randn_like(x) if following else clean
        return x

    return sample


def unipc(velocity: Velocity, sigmas: Sequence[float], skip: Sequence[int] = (), pinned: int = 0):
    """UniPC (Zhao et al. 2023), B2(h), order 2, on the clean state of flow matching, lower order at the end.

    pinned: leading rows of the state that are put back to what they were after each step (Matrix-Game's past frames).
    """
    def sample(x, condition):
        held, start, scheduler = skipping(velocity, skip), x, UniPC(sigmas)
        for i, sigma in enumerate(sigmas[:-1]):
            x = scheduler.step(held(x, sigma, condition, i), x)
            if pinned:
                x = torch.cat([start[:pinned], x[pinned:]])
        return x

    return sample


def lam(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


class UniPC:
    """The same, step by step."""

    def __init__(self, sigmas: Sequence[float]):
        self.sigmas, self.clean, self.before, self.orders = sigmas, [], None, []

    def step(self, velocity: Tensor, x: Tensor) -> Tensor:
        sigmas, i = self.sigmas, len(self.clean)
        sigma, following = sigmas[i], sigmas[i + 1]
        m = x - sigma * velocity
        if i:
            x = _correct(self.before, self.clean, m, sigmas, i, self.orders[-1], lam)
        self.clean, self.before = [*self.clean, m], x
        self.orders.append(min(2, i + 1, len(sigmas) - 1 - i))
        h = lam(following) - lam(sigma)
        x = following / sigma * x - (1 - following) * math.expm1(-h) * m
        if self.orders[-1] == 2:
            r = (lam(sigmas[i - 1]) - lam(sigma)) / h
            x = x - (1 - following) * math.expm1(-h) * 0.5 * (self.clean[-2] - m) / r
        return x


def _correct(x, clean, m, sigmas, i, order, lam):
    """UniC: the state at sigma[i] once more, now that the clean state there is known."""
    h = lam(sigmas[i]) - lam(sigmas[i - 1])
    phi = math.expm1(-h)
    out = sigmas[i] / sigmas[i - 1] * x - (1 - sigmas[i]) * phi * clean[-1]
    if order == 1:
        return out - (1 - sigmas[i]) * phi * 0.5 * (m - clean[-1])
    r = (lam(sigmas[i - 2]) - lam(sigmas[i - 1])) / h
    first = phi / -h - 1
    b1, b2 = first / phi, (first / -h - 0.5) * 2 / phi
    # The two equations a + b = b1, r a + b = b2 of the paper's linear system.
    a = (b2 - b1) / (r - 1)
    return out - (1 - sigmas[i]) * phi * (a * (clean[-2] - clean[-1]) / r + (b1 - a) * (m - clean[-1]))


def in_two_threads(rollout: Callable[[int, Callable[[], None]], None]) -> None:
    """Run rollout(0, meet) and rollout(100, meet) at once; meet() waits for the other. What either raises is raised here."""
    barrier, raised = threading.Barrier(2, timeout=60), []

    def run(base):
        try:
            rollout(base, barrier.wait)
        except BaseException as error:  # noqa: BLE001 - a thread's error would be lost
            barrier.abort()
            raised.append(error)

    threads = [threading.Thread(target=run, args=(base,)) for base in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    for error in raised:
        raise error

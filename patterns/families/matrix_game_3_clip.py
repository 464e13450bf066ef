"""A clip of Matrix-Game-3.0 as one function: its denoising steps, and UniPC between them, where upstream has a loop in Python.

Upstream hands the model a time for every token. Here it is one for every latent frame, repeated over its tokens in what is
traced, so that what follows from it is computed for frames. What is the same in all steps is computed before the first.
"""

from __future__ import annotations

import math

import torch

IMAGE, PAST = 1, 4  # latents that a clip begins with


class Clip(torch.nn.Module):
    """All steps of one clip.

    ``clip(latents, levels, times, given)``: latents [B, C, F, h, w] as they are before the first step, of which the first (the
    image, or with memory the newest of the last clip) are put back after each; levels: noise levels sigma of the steps and the
    last one's end; times: what the model is told of each step; given: the model's further arguments. Returns the latents after
    the last step.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents, levels: tuple[float, ...], times: tuple[float, ...], given: dict):
        known = IMAGE if given.get("x_memory") is None else PAST
        start, states, cleans = latents, [latents], []
        tokens = latents.shape[3] * latents.shape[4] // 4
        if given.get("x_memory") is not None:
            memory = given["x_memory"].new_zeros(given["x_memory"].shape[2])
            given = given | {"timestep_memory": memory[None].repeat_interleave(tokens, dim=1)}
        for i, time in enumerate(times):
            frames = torch.cat([start.new_zeros(known), start.new_full((start.shape[2] - known,), time)])  # upstream's times are of the latents' dtype
            velocity = self.model(x=latents, t=frames[None].repeat_interleave(tokens, dim=1), seq_len=0, **given)
            cleans.append(latents - levels[i] * velocity)
            corrected = latents if i == 0 else combined(corrector(levels, i), states[-1], cleans).to(start.dtype)
            latents = combined(predictor(levels, i), corrected, cleans).to(start.dtype)
            states.append(corrected)
            latents = torch.cat([start[:, :, :known], latents[:, :, known:]], dim=2)
        return latents


def combined(weights: tuple[float, ...], state, cleans: list):
    """A state and the last clean predictions, newest first, by these weights."""
    result = weights[0] * state
    for weight, clean in zip(weights[1:], reversed(cleans)):
        result = result + weight * clean if weight else result
    return result


def order(levels: tuple[float, ...], i: int) -> int:
    """Of the step from level i: 2, but 1 in the first step, where one prediction is known, and in the last."""
    return min(2, i + 1, len(levels) - 1 - i)


def log_ratio(level: float) -> float:
    """Half of the logarithmic signal-to-noise ratio of flow matching: log((1 - sigma) / sigma)."""
    return math.inf if level == 0 else math.log((1 - level) / level) if level < 1 else -math.inf


def predictor(levels: tuple[float, ...], i: int) -> tuple[float, ...]:
    """UniP, B2(h), data prediction (Zhao et al. 2023, arXiv 2302.04867): weights of the state and of the clean predictions of step i
    and the one before."""
    sigma, following = levels[i], levels[i + 1]
    h = log_ratio(following) - log_ratio(sigma)
    grown = -(1 - following) * math.expm1(-h)
    if order(levels, i) == 1:
        return following / sigma, grown
    ratio = (log_ratio(levels[i - 1]) - log_ratio(sigma)) / h
    return following / sigma, grown * (1 - 0.5 / ratio), grown * 0.5 / ratio


def corrector(levels: tuple[float, ...], i: int) -> tuple[float, ...]:
    """UniC of the same paper: weights of the state before step i - 1's prediction, and of the clean predictions of steps i, i - 1
    and i - 2, for the state at level i."""
    sigma, before = levels[i], levels[i - 1]
    h = log_ratio(sigma) - log_ratio(before)
    phi = math.expm1(-h)
    grown = -(1 - sigma) * phi
    if order(levels, i - 1) == 1:
        return sigma / before, 0.5 * grown, 0.5 * grown
    ratio = (log_ratio(levels[i - 2]) - log_ratio(before)) / h
    first = phi / -h - 1
    one, two = first / phi, (first / -h - 0.5) * 2 / phi
    older = (two - one) / (ratio - 1)  # of the two equations a + b = one, ratio a + b = two
    return sigma / before, grown * (one - older), grown * (1 - older / ratio - one + older), grown * older / ratio

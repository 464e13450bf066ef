"""Denoising loops: found in every form a compiler sees them in, and not taken for what only looks like one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tracing import Traced, world_inputs

from li_compile.patterns import DenoisingLoop

region = torch.compiler.nested_compile_region


def run_block(layer, x):
    return x + F.silu(layer(x))


class Denoiser(nn.Module):
    """Velocity of a state [B, 4], given a time and a condition, through two blocks."""

    def __init__(self, regional=False, inside=None):
        super().__init__()
        self.start, self.time, self.condition = nn.Linear(4, 8), nn.Linear(1, 8), nn.Linear(1, 8)
        self.blocks, self.end = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 4)
        run = run_block if inside is None else lambda layer, x: run_block(layer, inside(x))
        self.run = region(run) if regional else run

    def forward(self, x, time, condition):
        x = self.start(x) + self.time(time) + self.condition(condition)
        for block in self.blocks:
            x = self.run(block, x)
        return self.end(x)


FORMS = {
    "unrolled": (lambda **options: Denoiser(**options), lambda model, *args: model(*args)),
    "block regions": (lambda **options: Denoiser(regional=True, **options), lambda model, *args: model(*args)),
    "step regions": (lambda **options: Denoiser(**options), region(lambda model, *args: model(*args))),
}


def euler(model, steps, call=lambda model, *args: model(*args)):
    def sample(x, condition):
        for i in range(steps):
            x = x - call(model, x, torch.full_like(condition, 1 - i / steps), condition) / steps
        return x

    return sample


def find(fn, inputs=None):
    """(loop or None, reason or None) of a function of a state and a condition."""
    facts = Traced(fn, *(inputs or [torch.randn(3, 4), torch.randn(3, 1)])).facts()
    reasons = [m.reason for m in facts.misses if m.pattern == "denoising loop"]
    assert len(reasons) == (facts.loop is None)
    return facts.loop, (reasons or [None])[0]


def check(loop: DenoisingLoop, steps: int, form: str, outputs: int = 1):
    assert loop.steps == len(loop.outputs) == steps
    assert loop.form == ("unrolled" if form == "unrolled" else "regions")
    assert [len(o) for o in loop.outputs] == [outputs] * steps
    assert len({len(c) for c in loop.calls}) == 1
    assert not set.intersection(*map(set, loop.calls))


@pytest.mark.parametrize("steps", [2, 3, 4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_euler(form, steps):
    make, call = FORMS[form]
    loop, _ = find(euler(make(), steps, call))
    check(loop, steps, form)
    assert all(out[0].meta["example_value"].shape == (3, 4) for out in loop.outputs)


@pytest.mark.parametrize("form", FORMS)
def test_guidance_calls_the_model_twice_a_step(form):
    make, call = FORMS[form]
    model = make()

    def sample(x, condition):
        for i in range(3):
            time = torch.full_like(condition, 1 - i / 3)
            plain, guided = call(model, x, time, torch.zeros_like(condition)), call(model, x, time, condition)
            x = x - (plain + 3 * (guided - plain)) / 3
        return x

    loop, _ = find(sample)
    check(loop, 3, form, outputs=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("predicts", ["velocity", "clean state"])
def test_fresh_noise_after_every_step(form, predicts):
    """Few-step distilled samplers go to the clean state and add noise again; the noise is drawn outside the model."""
    make, call = FORMS[form]
    model = make()

    def sample(x, condition):
        for i in range(4):
            sigma, following = 1 - i / 4, 1 - (i + 1) / 4
            out = call(model, x, torch.full_like(condition, sigma), condition)
            clean = x - sigma * out if predicts == "velocity" else out
            x = (1 - following) * clean + following * torch.randn_like(x)
        return x

    loop, _ = find(sample)
    check(loop, 4, form)


def test_times_as_an_input():
    model = Denoiser()

    def sample(x, condition, times):
        for i in range(4):
            x = x - model(x, times[i].expand(3, 1), condition) * (times[i] - times[i + 1])
        return x

    loop, _ = find(sample, [torch.randn(3, 4), torch.randn(3, 1), torch.linspace(1, 0, 5)])
    check(loop, 4, "unrolled")


def test_work_around_the_loop_is_no_part_of_it():
    model, encode, decode = Denoiser(), nn.Linear(4, 4), nn.Linear(4, 4)

    def sample(x, condition):
        return decode(euler(model, 3)(encode(x), condition)).relu()

    loop, reason = find(sample)
    if loop is None:  # a decoder behind the loop hides it: then the reason must say where loops are looked for
        assert "at the end of the graph" in reason
    else:
        check(loop, 3, "unrolled")


def test_chunk_function_of_the_world(world):
    """The context prefill, a call of the same model in the same graph, is no step."""
    sampler, traced = world
    loop = traced.facts().loop
    regional = any("invoke_subgraph" in str(n.target) for n in traced.module.graph.nodes)
    check(loop, 3, "regions" if regional else "unrolled")
    assert [o[0].meta["example_value"].numel() for o in loop.outputs] == [4 * 4 * 16] * 3
    assert "unflatten" in str(loop.outputs[0][0].args[0]) and len(loop.calls[0]) == (9 if regional else 21)


def test_the_whole_step_of_the_world_as_one_region(tiny_world):
    model = tiny_world(regional=False, depth=1)
    step = region(lambda *args: model(*args)[0])
    from examples.doom_world.model import sigmas

    def sample(noise, prompt, action, w2c, intrinsics, text_k, text_v):
        x, levels = noise, sigmas(model.config, 3)
        for sigma, following in zip(levels[:-1], levels[1:]):
            time = torch.full_like(action, 1000 * sigma, dtype=torch.float32)
            x = x + step(torch.cat([x, prompt], dim=1), time, action, w2c, intrinsics, text_k, text_v) * (following - sigma)
        return x

    loop, _ = find(sample, world_inputs(model, 0))
    check(loop, 3, "regions")
    assert all(len(call) == 1 for call in loop.calls)


# Layers that are applied again and again, and calls that don't depend on one another.


def again(layer, times, update):
    def fn(x, condition):
        for _ in range(times):
            x = update(x, layer(x))
        return x

    return fn


@pytest.mark.parametrize("update", [lambda x, y: y, lambda x, y: x + y, lambda x, y: F.layer_norm(x + y, (4,))],
                         ids=["plain", "residual", "post-norm"])
def test_a_shared_layer_is_no_loop(update):
    layer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    loop, reason = find(again(layer, 4, update))
    assert loop is None and "no denoising loop" in reason


def test_independent_calls_are_no_loop():
    model = Denoiser()

    def fn(x, condition):
        return sum(model(x * i, torch.full_like(condition, i), condition) for i in range(4))

    loop, reason = find(fn)
    assert loop is None and "call 1 does not depend on call 0" in reason


@pytest.mark.parametrize("inside", [lambda x: F.dropout(x, 0.1), lambda x: x + torch.randn_like(x),
                                    lambda x: x + torch.rand(8), lambda x: x.clone().mul_(2)],
                         ids=["dropout", "randn_like", "rand", "in-place"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_effects_is_left_alone(form, inside):
    make, call = FORMS[form]
    loop, reason = find(euler(make(inside=inside), 4, call))
    assert loop is None and "draws random numbers or writes in place" in reason


def test_dropout_that_is_off_does_no_harm():
    loop, _ = find(euler(Denoiser(inside=lambda x: F.dropout(x, 0.1, training=False)), 3))
    check(loop, 3, "unrolled")


@pytest.mark.parametrize("form", FORMS)
def test_a_single_call_is_no_loop(form):
    make, call = FORMS[form]
    loop, reason = find(euler(make(), 1, call))
    assert loop is None and "compile the whole sampling loop as one function" in reason


def test_layers_with_weights_of_their_own_are_no_loop():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def fn(x, condition):
        for layer in layers:
            x = x + layer(x)
        return x

    loop, reason = find(fn)
    assert loop is None and "no model is called more than once" in reason

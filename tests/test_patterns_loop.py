"""Denoising loops: found in every form a compiler sees them in, and not taken for what only looks like one."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from samplers import FORMS, GUIDANCE, Denoiser, Remembering, alone, euler, renoise, shifted, unipc
from torch import nn
from tracing import Traced, relative, world_inputs

from li_compile.patterns import DenoisingLoop
from li_compile.patterns.linear_read import Reader
from li_compile.patterns.loop_body import Body

LEVELS = shifted(4)

region = torch.compiler.nested_compile_region
LINE = [1, 0.75, 0.5, 0.25, 0]


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


SAMPLERS = {"euler": (euler, "Euler"), "renoise": (renoise, "clean state and fresh noise"), "unipc": (unipc, "multistep")}
# Every sampler with every guidance and number of steps; the form in which the model is seen takes turns.
CASES = [(sampler, guidance, steps, list(FORMS)[(i + j + k) % 3]) for i, sampler in enumerate(SAMPLERS)
         for j, guidance in enumerate(GUIDANCE) for k, steps in enumerate((2, 3, 4, 8))]


@pytest.mark.parametrize(("sampler", "guidance", "steps", "form"), CASES)
def test_samplers(sampler, guidance, steps, form):
    (make, call), (sample, kind) = FORMS[form], SAMPLERS[sampler]
    levels = shifted(steps, most=0.9998)
    loop, _ = find(sample(GUIDANCE[guidance](make(), call), levels))
    check(loop, steps, form, outputs=1 if guidance == "alone" else 2)
    assert loop.branches == (2 if guidance == "sequential" else 1)
    assert all(tuple(o.meta["example_value"].shape) == (3, 4) for out in loop.outputs for o in out)
    # One update tells UniPC's first order from Euler's in nothing.
    assert loop.updates.kind == ("Euler" if sampler == "unipc" and steps == 2 else kind)
    assert [float(t) for t in loop.updates.times] == levels[:-1]
    body = loop.body
    assert body.calls == steps * loop.branches and not body.numbers
    assert len(body.varying) == (2 if guidance == "alone" else 3)  # state, time, and the branch's condition or its batch


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_predicts_the_clean_state(form):
    make, call = FORMS[form]
    loop, _ = find(renoise(alone(make(), call), LINE, predicts="clean state"))
    check(loop, 4, form)
    assert loop.updates.kind == "clean state and fresh noise"


def isomorphic(body, module) -> bool:
    """Whether the calls of a body are isomorphic, by networkx: operators as nodes, operand positions as edges."""
    def graph(call):
        own, found = set(body.of(call)), nx.MultiDiGraph()
        for node in own:
            found.add_node(node, label=str(node.target))
            for i, operand in enumerate(node.all_input_nodes):
                if operand not in own and operand.op != "get_attr" and operand not in body.shared:
                    found.add_node((operand, node, i), label="varying")
                    found.add_edge((operand, node, i), node, at=i)
                elif operand.op != "get_attr":
                    found.add_node(operand, label=str(operand.target))
                    found.add_edge(operand, node, at=i)
        return found

    one = graph(0)
    match = nx.algorithms.isomorphism
    return all(nx.is_isomorphic(one, graph(i), match.categorical_node_match("label", None),
                                match.categorical_multiedge_match("at", None)) for i in range(1, body.calls))


@pytest.mark.parametrize("form", FORMS)
def test_the_folded_calls_are_isomorphic(form):
    make, call = FORMS[form]
    loop, _ = find(euler(GUIDANCE["sequential"](make(), call), LINE))
    assert isomorphic(loop.body, None)


def test_the_updates_of_unipc_in_closed_form():
    """Matrix-Game's three steps, read from the graph: figures as its own scheduler gives them."""
    loop, _ = find(unipc(alone(Denoiser()), [0.9998, 0.908843, 0.713979, 0.0]))
    reader = Reader([o for out in loop.outputs for o in out])
    of = lambda node, *atoms: [float(reader.read(node).terms.get((a, ()), 0)) for a in atoms]
    first, second, third = loop.updates.states
    v0, v1, v2 = (out[0] for out in loop.outputs)
    assert of(second, first, v0) == pytest.approx([1, -0.090957], abs=1e-6)
    assert of(third, first, v0, v1) == pytest.approx([1, 0.054181 - 0.090957, -0.249044], abs=1e-5)
    last = max(n for n in v2.graph.nodes if n.op == "output").args[0][0]
    assert of(last, first, v0, v1, v2) == pytest.approx([1, 0.054181 - 0.090957, -0.249044, -0.713979], abs=1e-5)


def test_pinned_frames():
    """Matrix-Game puts the past frames back after each step: the update is read of the frames that are free."""
    loop, _ = find(unipc(alone(Denoiser()), shifted(3, most=0.9998), pinned=1))
    check(loop, 3, "unrolled")
    assert loop.updates.kind == "multistep"


@pytest.mark.parametrize("how", ["alike", "block regions"])
def test_a_first_state_that_all_calls_read_for_its_size(how):
    """Noise levels made with ``start.new_full`` read the first state in every call, and are none of its varying operands."""
    model = Denoiser(regional=how == "block regions")

    def sample(x, condition):
        start = x
        for sigma, following in zip(LEVELS, LEVELS[1:]):
            x = x + model(x, start.new_full((3, 1), sigma), condition) * (following - sigma)
        return x

    traced = Traced(sample, torch.randn(3, 4), torch.randn(3, 1))
    loop = traced.facts().loop
    check(loop, 4, "unrolled" if how == "alike" else "regions")
    assert loop.updates.kind == "Euler" and any(len(set(n)) == 4 and n[0].op == "placeholder" for n in loop.body.varying)
    compiled = traced.compile(preset="exact")
    given = torch.randn(3, 4), torch.randn(3, 1)
    assert relative(compiled(*given), traced(*given)) <= 1e-6 and compiled.report.counts()["share_steps"] == 4


@pytest.mark.parametrize("spelling", ["einsum", "stack"])
def test_what_a_call_hands_on_is_seen_through_moves_and_slices(spelling):
    """Memory that goes through the model in front of the state is dropped behind it, by a size that is a symbol."""
    model = Denoiser()

    def sample(x, condition, memory):
        kept = memory.shape[0]
        for sigma, following in zip(LEVELS, LEVELS[1:]):
            both = torch.cat([memory, x])
            time = torch.cat([memory.new_zeros(kept, 1), torch.full_like(condition, sigma)])
            out = model(both, time, torch.cat([memory[:, :1], condition]))
            out = torch.einsum("ab->ba", out).t()[kept:] if spelling == "einsum" else torch.stack([out[kept:]])[0]
            x = x + out * (following - sigma)
        return x

    memory = torch.randn(5, 4)
    torch._dynamo.mark_dynamic(memory, 0)
    loop, reason = find(sample, [torch.randn(3, 4), torch.randn(3, 1), memory])
    assert loop is not None, reason
    check(loop, 4, "unrolled")
    assert loop.updates.kind == "Euler"


def test_times_as_an_input():
    model = Denoiser()

    def sample(x, condition, times):
        for i in range(4):
            x = x - model(x, times[i].expand(3, 1), condition) * (times[i] - times[i + 1])
        return x

    loop, _ = find(sample, [torch.randn(3, 4), torch.randn(3, 1), torch.linspace(1, 0, 5)])
    check(loop, 4, "unrolled")
    assert loop.updates.kind == "Euler" and len(set(loop.updates.times)) == 4
    assert {str(loop.updates.symbols[t].args[1]) for t in loop.updates.times} == set("0123")


def test_times_as_numbers_inside_the_model():
    """Constants that differ from call to call become arguments of the folded call."""
    model = Denoiser()

    def sample(x, condition):
        for sigma, following in zip(LINE, LINE[1:]):
            x = x + model(x, condition, condition * sigma) * (1.0 + sigma) * (following - sigma)
        return x

    loop, _ = find(sample)
    check(loop, 4, "unrolled")
    assert not loop.body.numbers and len(loop.body.varying) == 2  # nothing behind a weight differs: operands do


def test_work_around_the_loop_is_no_part_of_it():
    model, encode, decode = Denoiser(), nn.Linear(4, 4), nn.Linear(4, 4)
    loop, _ = find(lambda x, condition: decode(euler(alone(model), LINE[1:])(encode(x), condition)).relu())
    check(loop, 3, "unrolled")


def test_the_first_call_may_be_an_encoding():
    """The same model on other data, with the result thrown into the condition: a context prefill of a step's shape."""
    model = Denoiser()

    def sample(x, condition):
        context = model(x * 2, torch.zeros_like(condition), condition).mean(1, keepdim=True)
        return euler(alone(model), LINE)(x, context)

    loop, _ = find(sample)
    check(loop, 4, "unrolled")


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


CALLS = {"plain calls": lambda layer, *args: layer(*args), "regions": region(lambda layer, *args: layer(*args))}


def again(layer, times, update, call):
    def fn(x, condition):
        for _ in range(times):
            x = update(x, call(layer, x))
        return x

    return fn


@pytest.mark.parametrize("update", [lambda x, y: y, lambda x, y: x + y, lambda x, y: F.layer_norm(x + y, (4,))],
                         ids=["plain", "residual", "post-norm"])
@pytest.mark.parametrize("call", CALLS)
def test_a_shared_layer_is_no_loop(update, call):
    layer = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    loop, reason = find(again(layer, 4, update, CALLS[call]))
    assert loop is None and "no denoising loop" in reason


@pytest.mark.parametrize("call", CALLS)
def test_a_recurrent_layer_over_a_sequence_is_no_loop(call):
    """Its state bypasses each call, and something differs: but that is data, as much as the state."""
    cell = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    def fn(x, condition, sequence):
        for i in range(4):
            x = x + CALLS[call](cell, torch.cat([x, sequence[i]], 1))
        return x

    loop, reason = find(fn, [torch.randn(3, 4), torch.randn(3, 1), torch.randn(4, 3, 4)])
    assert loop is None and "a loop over a sequence, no denoising loop" in reason


def test_independent_calls_are_no_loop():
    model = Denoiser()

    def fn(x, condition):
        return sum(model(x * i, torch.full_like(condition, i), condition) for i in range(4))

    loop, reason = find(fn)
    assert loop is None and "call 1 does not depend on call 0" in reason


@pytest.mark.parametrize("inside", [lambda x: F.dropout(x, 0.1), lambda x: x + torch.randn_like(x),
                                    lambda x: x + torch.rand(8)], ids=["dropout", "randn_like", "rand"])
@pytest.mark.parametrize("form", FORMS)
def test_a_model_with_effects_is_left_alone(form, inside):
    make, call = FORMS[form]
    loop, reason = find(euler(alone(make(inside=inside), call), LINE))
    assert loop is None and "draws random numbers or writes in place" in reason


def remembering(how="setitem", slot=lambda i: 2, between=lambda cache: 0.0):
    """A sampler of a model that writes into a cache. slot: at step i; between: what else is made of the cache."""
    model = Remembering()

    def sample(x, condition, cache):
        for i, (sigma, following) in enumerate(zip(LINE, LINE[1:])):
            v = model(x, torch.full_like(condition, sigma), condition, cache, slot(i), how)
            x = x + v * (following - sigma) + between(cache)
        return x

    return sample, [torch.randn(3, 4), torch.randn(3, 1), torch.randn(2, 3, 5, 8)]


@pytest.mark.parametrize("how", ["setitem", "copy_", "index_copy_"])
def test_a_cache_that_every_call_writes_in_the_same_place(how):
    loop, _ = find(*remembering(how))
    check(loop, 4, "unrolled")
    assert loop.body.writes


@pytest.mark.parametrize(("options", "says"), [
    ({"slot": lambda i: i}, "writes in place (setitem)"),
    ({"between": lambda cache: cache.mean() * 1e-3}, "what the calls write into is read between them"),
])
def test_a_cache_that_others_see(options, says):
    """Skipping a call would show: each writes a slot of its own, or something reads the cache between the calls."""
    loop, reason = find(*remembering(**options))
    assert loop is None and says in reason


def in_place(read, model=None):
    """HY-WorldPlay's own loop: each step's result is written into its place among all latents. read: what else happens."""
    model = model or Denoiser()

    def sample(x, condition):
        latents = torch.cat([x, x])
        for sigma, following in zip(LINE, LINE[1:]):
            latents[3:] = latents[3:] + alone(model)(latents[3:], sigma, condition) * (following - sigma)
            read(latents)
        return latents

    return sample


def test_a_state_that_is_written_in_place():
    loop, _ = find(in_place(lambda latents: None))
    check(loop, 4, "unrolled")
    assert loop.updates.kind == "Euler"


def test_a_state_that_something_else_writes():
    loop, reason = find(in_place(lambda latents: latents.mul_(0.5)))
    assert loop is None and "what call 0 gives is written in place (setitem); make a new state instead" in reason


def fill(x):
    out = torch.zeros_like(x)
    out[..., :4] = x[..., :4]
    out[..., 4:].copy_(x[..., 4:] * 2)
    return out


@pytest.mark.parametrize("inside", [fill, lambda x: x.clone().mul_(2)], ids=["buffer", "clone"])
@pytest.mark.parametrize("form", FORMS)
def test_writes_into_what_a_call_made_are_its_own(form, inside):
    make, call = FORMS[form]
    loop, _ = find(euler(alone(make(inside=inside), call), LINE))
    check(loop, 4, form)
    assert isinstance(loop.body, Body)


def test_dropout_that_is_off_does_no_harm():
    loop, _ = find(euler(alone(Denoiser(inside=lambda x: F.dropout(x, 0.1, training=False))), LINE))
    check(loop, 4, "unrolled")


@pytest.mark.parametrize("form", FORMS)
def test_a_single_call_is_no_loop(form):
    make, call = FORMS[form]
    loop, reason = find(euler(alone(make(), call), [1, 0]))
    assert loop is None and "compile the whole sampling loop as one function" in reason


def test_layers_with_weights_of_their_own_are_no_loop():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def fn(x, condition):
        for layer in layers:
            x = x + layer(x)
        return x

    loop, reason = find(fn)
    assert loop is None and "no model is called more than once" in reason

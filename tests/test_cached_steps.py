"""Cached steps in a graph: shared calls, predictors, folded updates; against loops that are written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from samplers import FORMS, GUIDANCE, Denoiser, Remembering, alone, euler, guided, renoise, shifted, skipping, unipc
from torch import nn
from tracing import Traced, relative

from li_compile.config import Config
from li_compile.dispatch import Variant
from li_compile.passes.predictors import PREDICTORS, Skipping
from li_compile.passes.share_steps import STEP
from li_compile.patterns.graph import name_of, region_calls

SAMPLERS = {"euler": euler, "renoise": renoise, "unipc": unipc}
LEVELS = shifted(4, most=0.9998)
ALWAYS = {"preset": "cache", "cache__gate": "always", "cache__guard": None}


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 1, generator=generator)


def run(fn, *given):
    """The result of a function that may draw random numbers, always the same ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        return fn(*given)


def two_steps(velocity, levels):
    """What is left of Euler and of UniPC when the steps between the first and the last hold the first one's output."""
    def sample(x, condition):
        x = x + (levels[-2] - levels[0]) * velocity(x, levels[0], condition)
        return x - levels[-2] * velocity(x, levels[-2], condition)

    return sample


def reusing(compiled):
    """The graph of the variant that reuses steps, with its regions."""
    return compiled.run.compiled[Variant(None, True)].run


CASES = [(sampler, guidance, steps, list(FORMS)[(i + j + k) % 3]) for i, sampler in enumerate(SAMPLERS)
         for j, guidance in enumerate(GUIDANCE) for k, steps in enumerate((3, 4, 8))]


@pytest.mark.parametrize(("sampler", "guidance", "steps", "form"), CASES)
def test_reuse_is_the_loop_by_hand(sampler, guidance, steps, form):
    """Every sampler: all steps, bit for bit; steps skipped, the loop with the last output held, to rounding."""
    make, call = FORMS[form]
    velocity, levels, sample = GUIDANCE[guidance](make(), call), shifted(steps, most=0.9998), SAMPLERS[sampler]
    traced, given = Traced(sample(velocity, levels), *inputs()), inputs()
    whole = run(sample(velocity, levels), *given)
    off = traced.compile(preset="cache")
    assert torch.equal(run(off, *given), run(traced, *given)) and relative(run(off, *given), whole) <= 1e-5
    assert off.report.counts()["share_steps"] == steps * (2 if guidance == "sequential" else 1)
    on = traced.compile(**ALWAYS)
    assert on.report.counts()["cached_steps"] == steps - 2
    want = run(sample(velocity, levels, skip=range(1, steps - 1)), *given)
    assert relative(run(on, *given), want) <= 1e-5 and relative(want, whole) > 1e-4
    if sampler != "renoise":
        assert relative(run(on, *given), run(two_steps(velocity, levels), *given)) <= 1e-5


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("steps", [3, 4, 8])
def test_k_updates_become_one(sampler, steps):
    """x + c v and then the last step: whatever the scheduler did in between."""
    levels = shifted(steps, most=0.9998)
    compiled = Traced(SAMPLERS[sampler](alone(Denoiser()), levels), *inputs()).compile(**ALWAYS)
    graph = reusing(compiled).graph
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["li_before", "li_step", "li_step"]
    arithmetic = [n for n in graph.nodes if n.op == "call_function" and n.target.__name__ in ("add", "sub", "mul", "truediv")]
    assert len(arithmetic) == 4
    (first, *_) = [n.args[1] for n in arithmetic if n.target.__name__ == "mul"]
    assert first == pytest.approx(levels[-2] - levels[0], abs=1e-9)


def test_pinned_frames_are_folded_too():
    velocity = alone(Denoiser())
    compiled = Traced(unipc(velocity, LEVELS, pinned=1), *inputs()).compile(**ALWAYS)
    want = run(unipc(velocity, LEVELS, skip=(1, 2), pinned=1), *inputs())
    assert relative(run(compiled, *inputs()), want) <= 1e-5
    names = [n.target.__name__ for n in reusing(compiled).graph.nodes if n.op == "call_function"]
    assert names.count("cat") == 2 and names.count("mul") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_half_and_double_precision(dtype):
    """Sums in half precision are taken in fp32 and rounded once; in double precision nothing is lost."""
    velocity = alone(Denoiser().to(dtype))
    given = [x.to(dtype) for x in inputs()]
    compiled = Traced(euler(velocity, LEVELS), *given).compile(**ALWAYS)
    got, want = run(compiled, *given), run(euler(velocity, LEVELS, skip=(1, 2)), *given)
    assert got.dtype == dtype
    assert relative(got.double(), want.double()) <= (1e-2 if dtype == torch.bfloat16 else 1e-12)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize(("sampler", "guidance"), [(euler, "batched"), (unipc, "sequential")])
def test_a_batch_of_any_size(sampler, guidance, lowering):
    """A dynamic size goes into the region beside the tensors that have it; both variants serve all sizes."""
    velocity = GUIDANCE[guidance](Denoiser())
    options = {"preset": "cache", "cache.gate": "always", "cache.guard": None, "lowering": lowering, "strict": True}
    compiled = torch.compile(sampler(velocity, LEVELS), backend="light_interaction", fullgraph=True, options=options)
    want = sampler(velocity, LEVELS, skip=(1, 2))
    with torch.no_grad():
        for i, batch in enumerate((5, 3, 7)):
            given = torch.randn(batch, 4), torch.randn(batch, 1)
            if not i:
                for x in given:
                    torch._dynamo.mark_dynamic(x, 0)
            with torch._dynamo.config.patch(error_on_recompile=bool(i)):
                assert relative(compiled(*given), want(*given)) <= 1e-5


@pytest.mark.parametrize(("skip", "computed"), [((1,), (0, 2, 3)), ((2,), (0, 1, 3)), ((1, 2), (0, 3)), ((2, 3, 7), (0, 1, 3))])
@pytest.mark.parametrize("predictor", ["hold", "linear"])
def test_which_steps_are_skipped(skip, computed, predictor):
    velocity = guided(Denoiser())

    def by_hand(x, condition):
        known = {}
        for i, (sigma, following) in enumerate(zip(LEVELS, LEVELS[1:])):
            if i in computed:
                known[i] = velocity(x, sigma, condition)
            a, b = sorted(known)[-2:] if len(known) > 1 else (0, 0)
            v = known[b]
            if i not in computed and predictor == "linear" and a != b:
                v = known[b] + (known[b] - known[a]) * (sigma - LEVELS[b]) / (LEVELS[b] - LEVELS[a])
            x = x + v * (following - sigma)
        return x

    compiled = Traced(euler(velocity, LEVELS), *inputs()).compile(**ALWAYS | {"cache__skip": skip, "cache__predictor": predictor})
    assert compiled.report.counts()["cached_steps"] == 4 - len(computed)
    assert relative(run(compiled, *inputs()), run(by_hand, *inputs())) <= 1e-5
    assert len(region_calls(compiled_graph(compiled), STEP)) == 2 * len(computed)


def compiled_graph(compiled):
    from li_compile.pipeline import build
    from li_compile import _compat

    dispatcher = compiled.run
    fakes = compiled.traced.fakes
    return build(dispatcher.facts, dispatcher.config, fakes, _compat.fake_mode_of(fakes), kept=None, reuse=True)[0]


def test_times_as_an_input_give_the_line():
    """The slope of a schedule that is given at run time is computed at run time."""
    model = Denoiser()

    def sample(x, condition, times, by_hand=False):
        known = []
        for i in range(4):
            if by_hand and i == 2:
                v = known[1] + (known[1] - known[0]) * (times[2] - times[1]) / (times[1] - times[0])
            else:
                v = model(x, times[i].expand(3, 1), condition)
            known.append(v)
            x = x + v * (times[i + 1] - times[i])
        return x

    given = [*inputs(), torch.tensor(LEVELS)]
    compiled = Traced(sample, *given).compile(**ALWAYS | {"cache__skip": (2,), "cache__predictor": "linear"})
    for times in (torch.tensor(LEVELS), torch.linspace(1, 0, 5)):
        given[2] = times
        assert relative(run(compiled, *given), run(lambda *a: sample(*a, by_hand=True), *given)) <= 1e-5


@pytest.mark.parametrize("steps", [2, 3])
def test_few_steps(steps):
    compiled = Traced(euler(alone(Denoiser()), shifted(steps)), *inputs()).compile(**ALWAYS)
    variants = [v.reuse for v in compiled.graph.variants]
    if steps == 2:
        assert variants == [False] and "2 denoising steps, reuse needs at least 3" in compiled.reasons
        assert torch.equal(run(compiled, *inputs()), run(compiled.traced, *inputs()))
    else:
        assert variants == [False, True] and compiled.report.counts()["cached_steps"] == 1


def test_a_step_that_the_loop_has_not():
    compiled = Traced(euler(alone(Denoiser()), shifted(3)), *inputs()).compile(**ALWAYS | {"cache__skip": (2, 3)})
    assert [v.reuse for v in compiled.graph.variants] == [False]
    assert "cache.skip = (2, 3) names no step between the first and the last of 3" in compiled.reasons


def test_no_poses_and_no_order_to_reuse():
    compiled = Traced(euler(alone(Denoiser()), LEVELS), *inputs()).compile(preset="cache")
    assert [v.reuse for v in compiled.graph.variants] == [False]
    assert "no context with camera poses" in compiled.reasons and "cache.gate='always'" in compiled.reasons


def test_calls_that_are_not_alike_are_skipped_but_not_shared():
    """The last call asks the model for more: no one region for all, and the held output stands in all the same."""
    model, more = Denoiser(), nn.Linear(4, 4)

    def sample(x, condition, skip=()):
        v = None
        for i, (sigma, following) in enumerate(zip(LEVELS, LEVELS[1:])):
            if i not in skip:
                h = model.start(x.round(decimals=i + 3)) + model.time(torch.full_like(condition, sigma))
                for block in model.blocks:
                    h = h + nn.functional.softplus(block(h), threshold=20 + i)
                v = model.end(h)
            x = x + v * (following - sigma)
        return more(x) * 2

    compiled = Traced(sample, *inputs()).compile(**ALWAYS)
    assert "share_steps" not in {k for k, v in compiled.report.counts().items() if v}
    assert "the calls differ in a constant of softplus (20, 21)" in compiled.reasons
    assert relative(run(compiled, *inputs()), run(lambda *a: sample(*a, skip=(1, 2)), *inputs())) <= 1e-5


def test_an_update_in_place_is_left_where_it_is():
    velocity = alone(Denoiser())

    def sample(x, condition):
        x = x.clone()
        for sigma, following in zip(LEVELS, LEVELS[1:]):
            x += velocity(x, sigma, condition) * (following - sigma)
        return x

    compiled = Traced(sample, *inputs()).compile(**ALWAYS)
    assert "iadd stands between the calls of the sampling loop" in compiled.reasons
    assert relative(run(compiled, *inputs()), run(euler(velocity, LEVELS, skip=(1, 2)), *inputs())) <= 1e-5


@pytest.mark.parametrize("how", ["setitem", "copy_"])
@pytest.mark.parametrize("clean", [False, True], ids=["", "written once more at the end"])
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_cache_of_keys_and_values(how, clean, lowering):
    """Self-Forcing: each call writes the chunk's slot of a cache, and a last one the clean state's. Results and cache are
    what they would be, with the steps skipped as by hand."""
    model = Remembering()

    def sample(x, condition, cache, skip=()):
        v = None
        for i, (sigma, following) in enumerate(zip(LEVELS, LEVELS[1:])):
            if i not in skip:
                v = model(x, torch.full_like(condition, sigma), condition, cache, 2, how)
            x = (x - sigma * v) * (1 - following) + following * torch.randn_like(x)
        if clean:
            model(x, torch.zeros_like(condition), condition, cache, 2, how)
        return x

    empty, given = torch.randn(2, 3, 5, 8), inputs()
    traced = Traced(sample, *given, empty.clone())
    off = traced.compile(preset="cache", lowering=lowering)
    on = traced.compile(**ALWAYS, lowering=lowering)
    assert off.report.counts()["share_steps"] == 4 and on.report.counts()["cached_steps"] == 2
    for compiled, skip in ((off, ()), (on, (1, 2))):
        got, want = empty.clone(), empty.clone()
        assert relative(run(compiled, *given, got), run(lambda *a: sample(*a, skip=skip), *given, want)) <= 1e-5
        assert relative(got, want) <= 1e-5 and not torch.equal(got, empty)


@pytest.mark.parametrize("mine", [True, False], ids=["own buffer", "the caller's"])
def test_a_state_in_a_larger_tensor(mine):
    """Written in place after each step; what the caller gave ends up as it would have."""
    velocity = alone(Denoiser())

    def sample(latents, condition, skip=()):
        latents, held = latents.clone() if mine else latents, skipping(velocity, skip)
        for i, (sigma, following) in enumerate(zip(LEVELS, LEVELS[1:])):
            latents[1:4] = latents[1:4] + held(latents[1:4], sigma, condition, i) * (following - sigma)
        return latents.sum(0)

    many, condition = torch.randn(6, 4), inputs()[1]
    traced = Traced(sample, many.clone(), condition)
    off, on = traced.compile(preset="cache"), traced.compile(**ALWAYS)
    assert off.report.counts()["share_steps"] == 4 and on.report.counts()["cached_steps"] == 2
    for compiled, skip in ((off, ()), (on, (1, 2))):
        given, want = many.clone(), many.clone()
        assert relative(run(compiled, given, condition), run(lambda *a: sample(*a, skip=skip), want, condition)) <= 1e-5
        assert relative(given, want) <= 1e-5 and torch.equal(given, many) == mine


class Islands(nn.Module):
    """A model with a part in half precision, and one inside of that in full."""

    def __init__(self):
        super().__init__()
        self.inner = Denoiser()

    def forward(self, x, time, condition):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.inner.start(x) + self.inner.time(time)
            with torch.autocast("cpu", enabled=False):
                h = h.float() + self.inner.condition(condition)
            h = self.inner.blocks[0](h)
        return self.inner.end(h.float())


def test_autocast_inside_of_the_model_goes_into_the_region():
    velocity = alone(Islands())
    traced = Traced(euler(velocity, LEVELS), *inputs())
    off, on = traced.compile(preset="cache"), traced.compile(**ALWAYS)
    assert off.report.counts()["share_steps"] == 4
    assert torch.equal(run(off, *inputs()), run(traced, *inputs()))
    assert not any("autocast" in str(n.target) for n in reusing(on).graph.nodes)
    assert relative(run(on, *inputs()), run(euler(velocity, LEVELS, skip=(1, 2)), *inputs())) <= 1e-5


def test_autocast_around_the_loop_is_left_where_it_is():
    velocity = alone(Denoiser())

    def sample(x, condition, skip=()):
        with torch.autocast("cpu", torch.bfloat16):
            return euler(velocity, LEVELS, skip=skip)(x, condition)

    compiled = Traced(sample, *inputs()).compile(**ALWAYS)
    assert "is under an autocast of its own" in compiled.reasons
    assert relative(run(compiled, *inputs()), run(lambda *a: sample(*a, skip=(1, 2)), *inputs())) <= 1e-5


def test_weights_are_known_as_such_to_the_compiler(monkeypatch):
    """Or CUDA graphs would copy them at each call: shared or whole, as in the graph that Dynamo traced."""
    from torch._dynamo.backends.common import aot_autograd

    from li_compile import _compat

    found = []

    def compile_forward(module, _):
        found.append(torch._guards.TracingContext.get().fw_metadata.static_input_indices)
        return module.forward

    backend = aot_autograd(fw_compiler=compile_forward)
    monkeypatch.setattr(_compat, "inductor", lambda module, inputs, patches, key: backend(module, inputs))
    sample = euler(alone(Denoiser()), LEVELS)
    for options in ({"preset": "off"}, {"preset": "exact"}, {"preset": "exact", "exact.shared_steps": False}):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(sample, backend="light_interaction", options=options)(*inputs())
    assert [len(f) for f in found] == [12, 2, 10, 12]  # what reads the condition is computed before the steps


def test_running_the_pass_twice_changes_nothing():
    from li_compile.passes.share_steps import share_steps
    from li_compile.patterns import find_loop

    module = Traced(euler(alone(Denoiser()), LEVELS), *inputs()).facts().module
    assert share_steps(module, find_loop(module)[0]).count == 4
    before = str(module.graph)
    assert share_steps(module, find_loop(module)[0]).count == 0 and str(module.graph) == before


def test_the_weights_of_each_predictor():
    times = [1000.0, 900.0, 700.0, 400.0, 300.0]
    of = lambda name, skip: Skipping(5, skip, PREDICTORS[name])
    weights = lambda name, skip, step: {k: float(v) for k, v in of(name, skip).weights(step, times).items()}
    assert weights("hold", (1, 2, 3), 3) == {(0, 0): 1}
    assert weights("hold", (2, 3), 3) == weights("hold", (2, 3), 2) == {(0, 1): 1}
    assert weights("linear", (2,), 2) == pytest.approx({(0, 0): -2, (0, 1): 3})
    assert weights("linear", (1, 3), 3) == pytest.approx({(0, 0): -1, (0, 2): 2})
    assert weights("linear", (1, 3), 1) == {(0, 0): 1}  # one point makes no line
    assert weights("previous", (1, 3), 3) == {(0, 2): 1, (-1, 3): 1, (-1, 2): -1}
    assert of("previous", (1, 3)).remembered() == (0, 1, 2, 3, 4)
    assert of("hold", (1, 2, 3)).computed == (0, 4) and of("hold", (1, 2, 3)).remembered() == ()


@pytest.mark.parametrize(("options", "steps", "skipped"), [
    ({}, 2, ()), ({}, 3, (1,)), ({}, 4, (1, 2)), ({}, 8, (1, 2, 3, 4, 5, 6)), ({"min_steps": 5}, 4, ()),
    ({"skip": (1,)}, 4, (1,)), ({"skip": (2, 5)}, 4, (2,)), ({"skip": (3,)}, 4, ()),
])
def test_skipped_steps(options, steps, skipped):
    """Two steps and fewer never reuse; the first and the last are always computed."""
    assert Config(cache=options).cache.skipped(steps) == skipped


class Injected(nn.Module):
    """A denoiser of equal layers, each of which makes a scale and a shift of the condition with weights of its own, as camera injectors do."""

    def __init__(self, layers: int = 3, width: int = 128):
        super().__init__()
        linear = lambda: nn.Linear(width, width)
        self.embed = linear()
        self.layers = nn.ModuleList(nn.ModuleDict({"camera": linear(), "scale": linear(), "shift": linear(), "mix": linear()}) for _ in range(layers))

        def run(layer, x, time, condition):
            camera = condition + torch.nn.functional.silu(layer["camera"](condition))
            return x + layer["mix"](x * (1 + layer["scale"](camera)) + layer["shift"](camera)) * time

        self.run = torch.compiler.nested_compile_region(run)

    def forward(self, x, time, condition):
        condition = self.embed(condition)
        for layer in self.layers:
            x = self.run(layer, x, time, condition)
        return x


ROWS, WIDTH = 4096, 128
KEPT = 4 * ROWS * WIDTH  # bytes of a layer's scale: more than what is kept in any case


@pytest.fixture(scope="module")
def injected():
    torch.manual_seed(0)
    model, given = Injected(width=WIDTH), (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))
    sample = euler(lambda x, sigma, condition: model(x, condition.new_tensor(sigma), condition), LEVELS)
    return Traced(sample, *given), given


def shared(traced, memory):
    """(record, step, its layer, the graph) after share_steps."""
    from li_compile.passes.propagate import tidy
    from li_compile.passes.share_steps import share_steps
    from li_compile.patterns import find_loop
    from li_compile.patterns.graph import all_graphs

    module = traced.facts().module
    record = share_steps(module, find_loop(module)[0], memory=memory)
    tidy(module)
    step = getattr(module, STEP)
    (layer,) = (g for g in all_graphs(step) if g is not step)
    return record, step, layer, module


def products_of(graph_module) -> int:
    return sum(name_of(n) == "linear" for n in graph_module.graph.nodes)


@pytest.mark.parametrize("memory, kept, products", [(math.inf, 6, 1), (6 * KEPT, 6, 1), (3 * KEPT, 4, 3), (0, 1, 4)])
def test_what_a_layer_computes_alike_in_all_steps_is_computed_before_them_as_far_as_memory_allows(injected, memory, kept, products):
    """products: of a layer that are left in a step; a scale or a shift without the other needs the camera's in both places, and its embedding."""
    traced, given = injected
    record, step, layer, module = shared(traced, memory)
    assert record.count == 4 and len([d for d in record.details if "out of its region" in d]) == kept
    assert products_of(layer) == products and len(region_calls(step, "subgraph_0")) == 3
    with torch.no_grad():
        assert relative(module(*traced.arguments(*given))[0], traced(*given)) <= 1e-6


@pytest.mark.parametrize("memory, products", [(12 * KEPT, 1), (6 * KEPT, 3)])
def test_each_branch_of_guidance_takes_its_share_of_the_memory(memory, products):
    torch.manual_seed(0)
    model, given = Injected(width=WIDTH), (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))

    def sample(x, condition):
        both = torch.zeros_like(condition), condition

        def velocity(x, sigma, _):
            plain, steered = (model(x, condition.new_tensor(sigma), c) for c in both)
            return plain + 3.0 * (steered - plain)

        return euler(velocity, LEVELS)(x, condition)

    traced = Traced(sample, *given)
    record, step, layer, module = shared(traced, memory)
    assert record.count == 8 and products_of(layer) == products
    with torch.no_grad():
        assert relative(module(*traced.arguments(*given))[0], traced(*given)) <= 1e-6


def test_the_share_of_memory_is_an_option(injected):
    traced, given = injected
    kept, alone = (traced.compile(preset="exact", exact__invariant_memory=share, lowering="eager") for share in (0.1, 0.0))
    flops = [compiled.graph.variants[0].flops for compiled in (kept, alone)]
    layer = 2 * ROWS * WIDTH**2  # of one product: three of four less in three of four steps, of three layers
    assert flops[1] - flops[0] == 3 * 3 * 3 * layer
    assert relative(kept(*given), traced(*given)) <= 1e-6 and relative(alone(*given), traced(*given)) <= 1e-6


def test_a_region_that_is_called_before_the_steps_too_keeps_its_operands_there():
    torch.manual_seed(0)
    model, given = Injected(width=WIDTH), (torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH))

    def sample(x, condition):
        condition = model.run(model.layers[0], x, condition.new_tensor(1.0), condition)
        return euler(lambda x, sigma, c: model(x, c.new_tensor(sigma), c), LEVELS)(x, condition)

    traced = Traced(sample, *given)
    for memory, products in ((math.inf, 1), (0, 4)):
        record, step, layer, module = shared(traced, memory)
        assert record.count == 4 and products_of(layer) == products
        with torch.no_grad():
            assert relative(module(*traced.arguments(*given))[0], traced(*given)) <= 1e-6

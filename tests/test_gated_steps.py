"""One graph that reuses steps or not, as an input says: the form that is exported."""

from __future__ import annotations

import pytest
import torch
from samplers import FORMS, GUIDANCE, alone, euler, renoise, shifted, unipc
from torch import nn
from tracing import relative, world_inputs

import li_compile
from li_compile import Config
from li_compile.errors import ExportError
from li_compile.exporting.program import bind_weights, make_program
from li_compile.exporting.trace import trace
from li_compile.exporting.variants import variants

LEVELS = shifted(4, most=0.9998)
ON, OFF = torch.tensor(True), torch.tensor(False)


class Sampler(nn.Module):
    """A sampling loop with the model that it calls, and the same loop with steps skipped by hand."""

    def __init__(self, sampler=euler, guidance="alone", form="unrolled", levels=LEVELS):
        super().__init__()
        make, call = FORMS[form]
        self.model = make()
        velocity = GUIDANCE[guidance](self.model, call)
        self.sample = sampler(velocity, levels)
        self.skipped = lambda *args, skip=range(1, len(levels) - 2): sampler(velocity, levels, skip=skip)(*args)

    def forward(self, x, condition):
        return self.sample(x, condition)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 1, generator=generator)


def gated(module, *given, **options):
    """The one program of gates="device", its weights bound, as a module (*inputs, reuse)."""
    config = Config.from_options({"preset": "cache", "cache.gate": "always"} | options)
    traced = trace(module, given, {}, config)
    (variant,) = variants(traced, config, "device")
    program = bind_weights(make_program(traced, variant), traced.tensors)
    assert [a.name for a in program.arguments][-1] == "reuse" and program.results == 1
    return program.exported.module()


def conditions(module) -> int:
    return sum(n.target is torch.ops.higher_order.cond for n in module.graph.nodes)


@pytest.mark.parametrize(("sampler", "guidance", "form"), [
    (euler, "alone", "unrolled"), (unipc, "sequential", "block regions"), (euler, "batched", "step regions")])
def test_both_ways_in_one_graph(sampler, guidance, form):
    module = Sampler(sampler, guidance, form)
    with torch.no_grad():
        both = gated(module, *inputs())
        assert conditions(both) == (4 if guidance == "sequential" else 2)
        assert relative(both(*inputs(), OFF)[0], module(*inputs())) <= 1e-6
        assert relative(both(*inputs(), ON)[0], module.skipped(*inputs())) <= 1e-6
        assert relative(module.skipped(*inputs()), module(*inputs())) > 1e-4
        exported = torch.export.export(both, (*inputs(), OFF))
        assert conditions(exported.graph_module) == conditions(both)
        for reuse in (ON, OFF):
            assert relative(exported.module()(*inputs(), reuse)[0], both(*inputs(), reuse)[0]) <= 1e-6


def test_what_is_not_taken_is_not_computed():
    """With reuse, two of four calls run, of six linear layers each."""
    both = gated(Sampler(), *inputs())
    for reuse, calls in ((ON, 2), (OFF, 4)):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            both(*inputs(), reuse)[0]
        assert sum(e.count for e in profile.key_averages() if e.key == "aten::linear") == calls * 6


def test_compiled():
    module = Sampler()
    both = gated(module, *inputs())
    with torch.no_grad():
        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
        assert relative(compiled(*inputs(), ON)[0], module.skipped(*inputs())) <= 1e-6
        assert relative(compiled(*inputs(), OFF)[0], module(*inputs())) <= 1e-6


def test_the_line_as_an_option():
    module = Sampler()
    with torch.no_grad():
        both = gated(module, *inputs(), **{"cache.predictor": "linear", "cache.skip": (2,)})
        assert conditions(both) == 1
        velocity, (x, condition) = alone(module.model), inputs()
        known = []
        for i, (sigma, following) in enumerate(zip(LEVELS, LEVELS[1:])):
            slope = (LEVELS[2] - LEVELS[1]) / (LEVELS[1] - LEVELS[0])
            known.append(known[1] + (known[1] - known[0]) * slope if i == 2 else velocity(x, sigma, condition))
            x = x + known[-1] * (following - sigma)
        assert relative(both(*inputs(), ON)[0], x) <= 1e-5


def test_the_world(tiny_world):
    from examples.doom_world.model import ChunkSampler

    sampler = ChunkSampler(tiny_world(depth=1), steps=3)
    given = world_inputs(sampler.model, 4)
    with torch.no_grad():
        both = gated(sampler, *given)
        assert conditions(both) == 1
        assert relative(both(*given, OFF)[0], sampler(*given)) <= 1e-5
        assert relative(both(*given, ON)[0], sampler(*given)) > 1e-4


@pytest.mark.parametrize(("module", "options", "says"), [
    (nn.Linear(4, 4), {}, "nothing to gate: no model is called more than once"),
    (Sampler(levels=shifted(2)), {}, "nothing to gate: 2 denoising steps, reuse needs at least 3"),
    (Sampler(), {"cache.predictor": "previous"}, "reads an earlier chunk, which one graph does not hold"),
])
def test_what_cannot_be_gated(module, options, says):
    given = inputs()[:1] if isinstance(module, nn.Linear) else inputs()
    config = Config.from_options({"preset": "cache", "cache.gate": "always"} | options)
    with pytest.raises(ExportError, match=says):
        li_compile.export_report(module, given, gates="device", config=config)


def test_an_artifact_that_asks_the_device(tmp_path):
    """One program; the runner hands it what the plan says, and a Session records it."""
    module = Sampler()
    report = li_compile.export(module, inputs(), path=tmp_path / "a", gates="device",
                               config=Config.from_options({"preset": "cache", "cache.gate": "always"}))
    assert [v.name for v in report.variants] == ["all_gated"] and "cache.guard is not watched" in report.notes[0]
    runner = li_compile.load(tmp_path / "a")
    with li_compile.Session(runner.config) as session:
        reused = runner(*inputs())
    assert [c["calls"] for c in session.stats()["per_chunk"]] == [2]
    entry = runner.manifest.calls[0].variants[0]
    full, = runner.run(entry, dict(zip(("x", "condition"), inputs())) | {"reuse": OFF})
    with torch.no_grad():
        assert relative(reused, module.skipped(*inputs())) <= 1e-6 and relative(full, module(*inputs())) <= 1e-6


def a_loop(graph):
    from li_compile.patterns import find_loop

    loop, misses = find_loop(graph)
    return loop or misses[0]


def test_a_registered_loop_pattern_is_asked(monkeypatch):
    """As for the backend: what a family names is looked for, and nothing else."""
    from li_compile.patterns import Family, registry

    seen = []
    monkeypatch.setattr(registry, "_PATTERNS", dict(registry._PATTERNS))
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.register_loop("watched", find=lambda graph: seen.append(graph) or a_loop(graph))
    registry.register_family(Family("watching", loop="watched"))
    both = gated(Sampler(), *inputs(), family="watching")
    assert conditions(both) == 2 and len(seen) >= 2  # in the traced graph, and in the one that is gated


def test_noise_between_the_steps_stays_where_it_is():
    module = Sampler(renoise)
    with torch.no_grad():
        both = gated(module, *inputs())
        for reuse, want in ((ON, module.skipped), (OFF, module)):
            torch.manual_seed(3)
            got = both(*inputs(), reuse)[0]
            torch.manual_seed(3)
            assert relative(got, want(*inputs())) <= 1e-6

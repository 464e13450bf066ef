"""One graph that reuses steps or not, as an input says: the form that is exported."""

from __future__ import annotations

import pytest
import torch
from samplers import FORMS, GUIDANCE, alone, euler, renoise, shifted, unipc
from torch import nn
from tracing import relative, world_inputs

from li_compile import Config, gated
from li_compile.errors import ExportError

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


def conditions(module) -> int:
    return sum(n.target is torch.ops.higher_order.cond for n in module.graph.nodes)


@pytest.mark.parametrize(("sampler", "guidance", "form"), [
    (euler, "alone", "unrolled"), (unipc, "sequential", "block regions"), (euler, "batched", "step regions")])
def test_both_ways_in_one_graph(sampler, guidance, form):
    module = Sampler(sampler, guidance, form)
    with torch.no_grad():
        both = gated(module, *inputs())
        assert conditions(both.graph_module) == (4 if guidance == "sequential" else 2)
        assert relative(both(OFF, *inputs()), module(*inputs())) <= 1e-6
        assert relative(both(ON, *inputs()), module.skipped(*inputs())) <= 1e-6
        assert relative(module.skipped(*inputs()), module(*inputs())) > 1e-4
        exported = torch.export.export(both, (OFF, *inputs()))
        assert conditions(exported.graph_module) == conditions(both.graph_module)
        for reuse in (ON, OFF):
            assert relative(exported.module()(reuse, *inputs()), both(reuse, *inputs())) <= 1e-6


def test_what_is_not_taken_is_not_computed():
    """With reuse, two of four calls run, of six linear layers each."""
    both = gated(Sampler(), *inputs())
    for reuse, calls in ((ON, 2), (OFF, 4)):
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            both(reuse, *inputs())
        assert sum(e.count for e in profile.key_averages() if e.key == "aten::linear") == calls * 6


def test_compiled():
    module = Sampler()
    both = gated(module, *inputs())
    with torch.no_grad():
        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
        assert relative(compiled(ON, *inputs()), module.skipped(*inputs())) <= 1e-6
        assert relative(compiled(OFF, *inputs()), module(*inputs())) <= 1e-6


def test_the_line_as_an_option():
    module = Sampler()
    with torch.no_grad():
        both = gated(module, *inputs(), config=Config.from_options({"cache.predictor": "linear", "cache.skip": (2,)}))
        assert conditions(both.graph_module) == 1
        velocity, (x, condition) = alone(module.model), inputs()
        known = []
        for i, (sigma, following) in enumerate(zip(LEVELS, LEVELS[1:])):
            slope = (LEVELS[2] - LEVELS[1]) / (LEVELS[1] - LEVELS[0])
            known.append(known[1] + (known[1] - known[0]) * slope if i == 2 else velocity(x, sigma, condition))
            x = x + known[-1] * (following - sigma)
        assert relative(both(ON, *inputs()), x) <= 1e-5


def test_the_world(tiny_world):
    from examples.doom_world.model import ChunkSampler

    sampler = ChunkSampler(tiny_world(depth=1), steps=3)
    given = world_inputs(sampler.model, 4)
    with torch.no_grad():
        both = gated(sampler, *given)
        assert conditions(both.graph_module) == 1
        assert relative(both(OFF, *given), sampler(*given)) <= 1e-5
        assert relative(both(ON, *given), sampler(*given)) > 1e-4


@pytest.mark.parametrize(("module", "options", "says"), [
    (nn.Linear(4, 4), {}, "no denoising loop was found: no model is called more than once"),
    (Sampler(levels=shifted(2)), {}, "2 steps, and none between the first and the last to skip"),
    (Sampler(), {"cache.predictor": "previous"}, "reads an earlier chunk, which one graph does not hold"),
])
def test_what_cannot_be_gated(module, options, says):
    given = inputs()[:1] if isinstance(module, nn.Linear) else inputs()
    with torch.no_grad(), pytest.raises(ExportError, match=says):
        gated(module, *given, config=Config.from_options(options))


def test_what_cannot_be_exported():
    def branches(x, condition):
        return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="torch.export cannot trace branches"):
        gated(branches, *inputs())


def test_noise_between_the_steps_stays_where_it_is():
    module = Sampler(renoise)
    with torch.no_grad():
        both = gated(module, *inputs())
        for reuse, want in ((ON, module.skipped), (OFF, module)):
            torch.manual_seed(3)
            got = both(reuse, *inputs())
            torch.manual_seed(3)
            assert relative(got, want(*inputs())) <= 1e-6

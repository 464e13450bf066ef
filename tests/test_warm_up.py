"""Compiling ahead of time: which variants there are then, that later chunks need no others, and what the command says."""

import pytest
import torch
from tracing import TINY, relative, world_inputs
from typer.testing import CliRunner

import li_compile
from examples.doom_world.model import ChunkSampler
from li_compile.cli import app


@pytest.fixture(scope="module")
def compiled(tiny_world):
    torch._dynamo.reset()
    sampler = ChunkSampler(tiny_world(regional=True))
    fn = li_compile.compile(sampler, li_compile.Config.from_options({**TINY, "preset": "all", "context.memory_frames": 16}))
    inputs = world_inputs(sampler.model, 20)
    for i, dim in ((7, 2), (8, 1), (9, 1)):
        torch._dynamo.mark_dynamic(inputs[i], dim)
    with torch.no_grad():
        report = fn.warm_up(*inputs)
    return sampler, fn, report


def test_all_that_a_plan_can_choose_is_compiled_once(compiled):
    sampler, fn, report = compiled
    (graph,) = report.graphs
    made = [(v.kept, v.reuse) for v in graph.variants]
    assert sorted(made) == [(4, False), *((kept, reuse) for kept in (8, 12, 16) for reuse in (False, True))]
    assert all(v.seconds > 0 for v in graph.variants)
    with torch.no_grad():
        for history, revisit in ((8, False), (20, True), (24, False)):
            inputs = world_inputs(sampler.model, history, revisit=revisit)
            result = fn(*inputs)
            assert torch.isfinite(result).all()
    assert len(fn.report().graphs[0].variants) == len(made) and len(fn.report().graphs) == 1


def test_warming_computes_what_a_call_computes(compiled):
    sampler, fn, _ = compiled
    inputs = world_inputs(sampler.model, 20)
    with torch.no_grad():
        first = fn(*inputs)
        before = len(fn.report().graphs[0].variants)
        fn.warm_up(*inputs)
        assert len(fn.report().graphs[0].variants) == before and relative(fn(*inputs), first) == 0


def target():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    return model, (torch.randn(2, 4),)


@pytest.mark.filterwarnings("ignore:light_interaction found nothing to rewrite")
def test_the_command_lists_what_it_compiled_and_refuses_bad_targets():
    run = CliRunner().invoke(app, ["warm", f"{__name__}:target", "--preset", "exact", "--option", "lowering=eager"], env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert "all context, every step" in run.output and "took 0 from its cache" in run.output
    run = CliRunner().invoke(app, ["warm", "nowhere:target"])
    assert run.exit_code == 2 and "cannot be loaded" in run.output

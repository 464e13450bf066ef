"""explain, compile, and the command line around them."""

from __future__ import annotations

import json

import pytest
import torch
from tracing import fired, world_inputs
from typer.testing import CliRunner

import li_compile
from examples.doom_world.model import ChunkSampler
from li_compile.cli import app
from li_compile.errors import ConfigError

TILES = {"tile": (4, 2, 2), "block_size": 16}


@pytest.fixture(scope="module")
def tiny_chunk(tiny_world):
    """tiny_chunk(context frames) -> (whole-chunk function, its arguments)."""
    def make(frames: int):
        sampler = ChunkSampler(tiny_world())
        return sampler, world_inputs(sampler.model, frames)

    return make


def test_a_chunk_is_explained_with_its_patterns_passes_and_costs(tiny_chunk):
    sampler, args = tiny_chunk(20)
    report = li_compile.explain(sampler, *args, config=li_compile.Config(preset="all", sparse=TILES))
    (graph,) = report.graphs
    assert set(graph.found) == {"attention, prefill", "attention, decode", "context", "denoising loop"}
    assert fired(report.counts()) == {
        "prune_context": 8, "equal_rows": 14, "invariants": 52, "dead_tails": 1, "sparse_attention": 4, "pack_context": 4, "share_steps": 4,
        "watch_steps": 1, "cached_steps": 2}
    kept, reusing = graph.variants
    assert (kept.kept, kept.reuse, reusing.kept, reusing.reuse) == (4, False, 8, True)
    assert 0 < kept.flops < graph.flops and 0 < kept.bytes < graph.bytes
    text = str(report)
    assert "sparse.skip_layers" in text and "context frames" in text
    json.dumps(report.to_dict(), default=str)


@torch.library.custom_op("li_tests::never", mutates_args=())
def never(x: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a kernel ran")


@never.register_fake
def _(x):
    return torch.empty_like(x)


def test_explain_runs_no_kernel():
    layer = torch.nn.Linear(4, 4)
    report = li_compile.explain(lambda x: layer(never(x)), torch.randn(2, 4))
    assert report.graphs[0].flops == 2 * 2 * 4 * 4
    with pytest.raises(AssertionError, match="a kernel ran"):
        never(torch.randn(2))


def test_a_model_without_patterns_is_explained_with_reasons():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    report = li_compile.explain(model, torch.randn(2, 8))
    (graph,) = report.graphs
    assert graph.found == {}
    assert {m.pattern for m in graph.misses} == {"attention", "context", "denoising loop"}
    assert all(count == 0 for count in report.counts().values())


def test_a_graph_break_is_reported_and_each_piece_is_explained():
    def broken(x):
        x = x + 1
        print("break")
        return x * 2

    report = li_compile.explain(broken, torch.randn(3))
    assert len(report.graphs) == 2
    (one,) = report.breaks
    file, line = one.where.rsplit(":", 1)
    assert file == __file__ and "print" in open(file).read().splitlines()[int(line) - 1]
    assert one.code == 'print("break")' and one.times == 1 and "builtin" in one.reason and any("print" in a for a in one.advice)
    assert "no family is known" in one.preparation
    assert "print(&#34;break&#34;)" in report.html() and one.where in str(report).replace("\n", "")
    named = li_compile.explain(broken, torch.randn(3), config=li_compile.Config(family="doom_world"))
    assert "doom_world has none" in named.breaks[0].preparation


def test_compile_checks_at_once_and_detaches(tiny_chunk):
    sampler, args = tiny_chunk(0)
    compiled = li_compile.compile(sampler, li_compile.Config(preset="exact", lowering="eager"))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), sampler(*args), rtol=1e-4, atol=1e-5)
    assert compiled.report().counts()["equal_rows"] > 0
    assert compiled.sigmas == sampler.sigmas
    assert compiled.detach() is sampler
    with pytest.raises(ConfigError, match="neither a module nor a function"):
        li_compile.compile(object())
    with pytest.raises(ConfigError, match="unknown; known: doom_world"):
        li_compile.compile(sampler, family="nobody")


def test_the_command_explains_a_target_and_refuses_bad_ones():
    run = CliRunner().invoke(app, ["explain", "tests.test_explain:target", "--preset", "exact", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["graphs"][0]["nodes"] > 0
    for arguments, words in [(["explain", "nothing"], "MODULE:FUNCTION"), (["explain", "no.such:thing"], "cannot be loaded"),
                             (["explain", "--preset", "fast"], "must be one of"), (["explain", "--option", "x"], "KEY=VALUE")]:
        run = CliRunner().invoke(app, arguments)
        assert run.exit_code == 2 and words in run.output


def target():
    return torch.nn.Linear(4, 4), (torch.randn(2, 4),)


def test_what_cannot_follow_a_graph_break_is_said_and_what_came_before_is_explained():
    """Behind the break a size is read from a tensor, and explain's zeros are none that fits."""
    def sized(x, count):
        count = count + 0
        x = x * 2
        return x[: count.tolist()[0]].reshape(3, -1) @ torch.ones(2, 2)

    report = li_compile.explain(sized, torch.randn(8), torch.tensor([6]))
    assert report.graphs and len(report.breaks) == 2
    last = report.breaks[-1]
    assert "was not traced" in last.reason and last.where.startswith(__file__) and "zeros" in last.advice[0]
    assert "was not traced" in str(report)
    with pytest.raises(RuntimeError):
        li_compile.explain(lambda x: x.reshape(3, -1), torch.randn(8))  # an error of the function's own is the user's


def test_a_graph_that_is_trained_is_left_to_inductor(recwarn):
    layer = torch.nn.Linear(4, 4)
    compiled = torch.compile(layer, backend="light_interaction", options={"lowering": "eager"})
    compiled(torch.randn(2, 4))
    assert [w for w in recwarn if "torch.no_grad()" in str(w.message)]
    assert li_compile.last_report().graphs[-1].variants == []


def test_a_graph_that_cannot_be_read_is_left_to_inductor_or_refused_under_strict(monkeypatch):
    def broken(*args):
        raise KeyError("planted")

    monkeypatch.setattr("li_compile.pipeline.canonical", broken)
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="leaves it to Inductor: KeyError"):
            got = torch.compile(layer, backend="light_interaction", options={"lowering": "eager"})(x)
        torch.testing.assert_close(got, layer(x))
        with pytest.raises(Exception, match="planted.*without strict"):
            torch.compile(layer, backend="light_interaction", options={"lowering": "eager", "strict": True})(x)

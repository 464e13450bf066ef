"""Other forms of context in artifacts: a step with cached keys and values, one that writes into preallocated caches, memory without cameras."""

from __future__ import annotations

import copy
import operator

import torch
from context_models import ARGUMENTS, Remembering, Rolling, keep_memory, mark, remembering_inputs, rolling_inputs
from test_context_forms import BASE, chosen_cache, rolled, session, step_inputs
from tracing import relative, seeded

import li_compile
from li_compile import Config
from li_compile.exporting.trace import trace
from li_compile.passes.index_slices import index_slices
from li_compile.patterns.graph import placeholders

CONFIG = Config.from_options(BASE)


def test_a_step_with_cached_context(tiny_world, tmp_path):
    """What the session's plan drops is not read; without a plan, all of it is."""
    model = tiny_world(depth=1)

    def step(x, time, action, w2c, intrinsics, text_k, text_v, keys, values, start):
        return model(x, time, action, w2c, intrinsics, text_k, text_v, (keys, values), start)[0]

    inputs = step_inputs(model, 12)
    report = li_compile.export(step, inputs, path=tmp_path / "a", config=CONFIG)
    assert [v.name for v in report.variants] == ["all_full", "keep4_full", "keep8_full"]
    runner = li_compile.load(tmp_path / "a")
    with torch.no_grad():
        with session(12, revisit=False) as s, s.chunk(12) as plan:
            got = runner(*inputs)
        assert len(plan.indices) == 8 and relative(got, step(*chosen_cache(inputs, plan.indices))) <= 1e-5
        assert relative(runner(*inputs), step(*inputs)) <= 1e-5


def test_memory_without_cameras(tmp_path):
    model, inputs = seeded(Remembering), remembering_inputs(12)
    given = lambda: [inputs[n] for n in ARGUMENTS]
    report = li_compile.export(model, mark(inputs), path=tmp_path / "a", config=CONFIG)
    assert [v.name for v in report.variants] == ["all_full", "keep4_full", "keep8_full", "keep12_full"]
    runner = li_compile.load(tmp_path / "a")
    with torch.no_grad():
        with session(12, revisit=False) as s, s.chunk(12) as plan:
            assert relative(runner(*given()), model(*keep_memory(inputs, plan.indices))) <= 1e-5
        assert relative(runner(*given()), model(*given())) <= 1e-5


def test_slices_of_a_preallocated_cache(tmp_path):
    """Caches of the caller's: results of ``step``, written into where the runner is called as the model; pruned by a plan."""
    model = seeded(Rolling)
    x, keys, values = rolling_inputs(20)
    copies = lambda: [[c.clone() for c in caches] for caches in (keys, values)]
    config = Config.from_options(BASE | {"context.memory_frames": 8, "context.temporal_frames": 4})
    report = li_compile.export(model, [x, keys, values, 20], path=tmp_path / "a", config=config)
    names = ["keys_0", "keys_1", "values_0", "values_1"]
    assert [v.name for v in report.variants] == ["all_full", "keep4_full", "keep8_full"] and report.variants[0].caches == names
    runner, (mine, theirs, given) = li_compile.load(tmp_path / "a"), (copies() for _ in range(3))
    with torch.no_grad():
        want = model(x, *theirs, 20)
        got, caches = runner.step(x, *given, 20)
        assert relative(got, want) <= 1e-5 and list(caches) == names
        assert all(torch.equal(a, b) for a, b in zip(sum(given, []), [*keys, *values]))  # not touched
        assert relative(runner(x, *mine, 20), want) <= 1e-5
        for explicit, a, b in zip(caches.values(), sum(mine, []), sum(theirs, [])):
            assert relative(a, b) <= 1e-6 and relative(explicit, b) <= 1e-6
        with session(20, revisit=True, **{"context.memory_frames": 8, "context.temporal_frames": 4}) as s, s.chunk(20) as plan:
            got = runner(x, *copies(), 20)
        assert len(plan.indices) == 8 and relative(got, rolled(model, x, keys, values, 20, plan.indices)) <= 1e-5


def test_slices_are_indexed_once_and_only_of_caches_that_are_written():
    """torch.export's slices and copies become what Dynamo's graphs hold, and the graph computes the same."""
    x, keys, values = rolling_inputs(20, room=26)  # so that a part is read
    program = torch.export.export(seeded(Rolling), (x, keys, values, 20), strict=True)
    graph = copy.deepcopy(program.graph_module)
    assert index_slices(graph).count == 4 and index_slices(graph).count == 0
    kinds = [n.target for n in graph.graph.nodes]
    assert kinds.count(operator.setitem) == 4 and torch.ops.aten.copy_.default not in kinds
    given = lambda: [*program.state_dict.values(), x, *(c.clone() for c in (*keys, *values)), 20]
    graph.recompile()
    with torch.no_grad():
        assert torch.equal(graph(*given())[0], program.graph_module(*given())[0])
    reading = torch.export.export(Reads(), (keys[0],), strict=True).graph_module
    assert index_slices(reading).count == 0 and operator.getitem not in [n.target for n in reading.graph.nodes]


class Places(torch.nn.Module):
    """Matrices made part by part, as cameras are; of the last one, a part is looked at before another write."""

    def forward(self, k):
        out = torch.zeros(k.shape[:-2] + (4, 4))
        out[..., :3, :3] = k
        out[:, 1:, -1, 1:3] = k[:, 1:, 0, :2]
        out[..., 3, 3] = 1.0
        part = out[..., 0]
        part[..., 1] = 7.0
        return torch.einsum("bcij,bcjk->bcik", out, out), part


def test_parts_of_what_the_graph_makes_become_values_as_in_dynamos_graphs():
    k = torch.randn(2, 5, 3, 3)
    traced = trace(Places(), (k,), {}, Config())
    graph = traced.facts.module
    written = [n.args[1] for n in graph.graph.nodes if n.target is operator.setitem]
    every = slice(None)
    assert written == [(every, every, slice(0, 3), slice(0, 3)), (every, slice(1, None), -1, slice(1, 3)), (every, every, 3, 3)]
    assert [n.args[1] for n in graph.graph.nodes if n.target is torch.ops.aten.fill_.Scalar] == [7.0]  # through a view that is read: left as it is
    assert [n.args[0] for n in graph.graph.nodes if n.target is torch.functional.einsum] == ["bcij,bcjk->bcik"]
    graph.recompile()
    given = [traced.tensors[traced.weights[p.name]] if p.name in traced.weights else k for p in placeholders(graph.graph)]
    for got, want in zip(graph(*given), Places()(k)):
        assert torch.equal(got, want)


class Reads(torch.nn.Module):
    def forward(self, cache):
        return cache[:, 3:9] * 2


def test_what_is_left_alone_is_told():
    report = li_compile.export_report(torch.nn.Linear(2, 2), [torch.ones(1, 2)])
    assert {"attention", "context", "denoising loop"} <= {r["pattern"] for r in report.left_alone}
    assert "left alone, denoising loop: no model is called more than once" in " ".join(str(report).split())


class Gathering(torch.nn.Module):
    """Takes most of its inputs as ``**kwargs``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, scale=1.0, **kwargs):
        return self.model(*(kwargs[n] for n in ("x", "time", "action", "w2c", "intrinsics", "text_k", "text_v")), (kwargs["keys"], kwargs["values"]),
                          kwargs["start"])[0] * scale


def test_a_model_that_gathers_its_keywords(tiny_world, tmp_path):
    """torch.export 2.11 takes no dynamic sizes of such a model as it is. Its forward is as it was afterwards."""
    model = Gathering(tiny_world(depth=1))
    given = dict(zip(("x", "time", "action", "w2c", "intrinsics", "text_k", "text_v", "keys", "values", "start"), step_inputs(model.model, 12)))
    for held in (*given["keys"], *given["values"]):
        torch._dynamo.mark_dynamic(held, 2)
    report = li_compile.export(model, [], {"scale": 2.0} | given, path=tmp_path / "a", config=CONFIG)
    assert [v.name for v in report.variants] == ["all_full", "keep4_full", "keep8_full"] and "forward" not in vars(model)
    with torch.no_grad():
        assert relative(li_compile.load(tmp_path / "a")(scale=2.0, **given), model(scale=2.0, **given)) <= 1e-5

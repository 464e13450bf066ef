"""The family on upstream's own code: ``MATRIX_GAME_3=<the folder that holds wan>``; skipped without."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from tracing import relative

import li_compile
from li_compile.patterns.families import matrix_game_3

pytestmark = pytest.mark.skipif("MATRIX_GAME_3" not in os.environ, reason="upstream's code is not here (MATRIX_GAME_3)")
SPARSE = {"sparse.tile": (4, 2, 2), "sparse.block_size": 16}
FLOAT = torch.float32


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def upstream(request):
    pytest.importorskip("einops")
    from examples.matrix_game_3.upstream import load

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), load(os.environ["MATRIX_GAME_3"], "cpu", request.param) as modules:
        if request.param == FLOAT:
            patch.setattr(matrix_game_3, "attention", functools.partial(matrix_game_3.attention, dtype=FLOAT))
        yield modules


def options(**given):
    return li_compile.Config.from_options({"lowering": "eager", "strict": True} | {k.replace("__", "."): v for k, v in given.items()})


def compiled_and_upstream(upstream, clip, **given):
    model, inputs = upstream.make(), upstream.inputs(clip=clip)
    want = model(**inputs)
    compiled = li_compile.compile(model, options(**given))
    torch._dynamo.utils.counters.clear()
    got = compiled(**inputs)
    assert not torch._dynamo.utils.counters["graph_break"] and len(compiled.report().graphs) == 1
    before = {name: sorted(vars(m)) for name, m in upstream.modules.items()}
    assert compiled.detach() is model and torch.equal(model(**inputs), want)
    assert before == {name: sorted(vars(m)) for name, m in upstream.modules.items()} and "forward" not in vars(model)
    return got, want, compiled.report()


#: In bf16, sequences of another length are added up in another order: as far as upstream's own outputs differ between lengths.
MOST = {torch.float32: 1e-5, torch.bfloat16: 3e-3}


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("given", [{"preset": "off"}, {"preset": "exact"}, {"preset": "context", "context.policy": "slots"},
                                   {"preset": "sparse", "sparse.topk_ratio": 1.0, "sparse.prefill_ratio": 1.0} | SPARSE],
                         ids=["off", "exact", "context", "sparse at ratio 1"])
def test_with_nothing_left_out_it_is_upstreams_result(upstream, own_report, clip, given):
    got, want, report = compiled_and_upstream(upstream, clip, **given)
    assert relative(got.float(), want.float()) <= MOST[upstream.dtype]
    if given["preset"] == "sparse":  # the first clip has one latent that is not new
        assert report.counts()["sparse_attention"] == (2 if clip else 0)
        assert not clip or "the last 10 frames protected" in str(report)
    if given["preset"] == "exact":
        assert (report.counts()["functional_writes"] > 0) == bool(clip) and report.counts()["invariants"] > 0


def test_inductor(upstream, own_report):
    got, want, _ = compiled_and_upstream(upstream, 1, preset="exact", lowering="inductor")
    assert relative(got.float(), want.float()) <= {torch.float32: 1e-5, torch.bfloat16: 1e-2}[upstream.dtype]


def test_explain(upstream):
    model = upstream.make()
    report = li_compile.explain(model, config=options(context__policy="slots", **SPARSE), **upstream.inputs(clip=1))
    (graph,) = report.graphs
    assert not report.breaks and graph.found["family"] == "matrix_game_3"
    assert graph.found["attention, prefill"].startswith("3 sites, grid 2 x 3")
    assert "(form latents), 6 tokens a frame" in graph.found["context"]
    assert all(name in graph.found["context"] for name in matrix_game_3.MEMORY)
    assert ("precision islands" in graph.found) == (upstream.dtype == torch.bfloat16)
    (padding,) = graph.prepared
    assert padding.details == ["6 of 120 tokens, exact, by the family's preparation"] and padding.flops > 0
    groups = {m.reason.split("'")[1] for m in graph.misses if m.pattern == "attention"}
    assert groups == {"cross-attention", "action attention"}
    assert {"wan.modules.model.torch", "wan.modules.model.flash_attention", "wan.modules.model.rope_apply_with_indices"} <= set(report.prepared)


def test_islands_in_bf16(upstream):
    """Upstream's fp32 products around the self-attention, of its time and of its head: what lowering them costs."""
    if upstream.dtype == FLOAT:
        pytest.skip("a model in fp32 has no islands")
    got, want, report = compiled_and_upstream(upstream, 1, preset="exact", exact__islands="bf16")
    assert report.counts()["islands"] == 16 and 1e-4 < relative(got.float(), want.float()) <= 3e-2


@pytest.mark.parametrize("given", [{"preset": "exact"}, {"preset": "cache", "context.policy": "slots", "cache.threshold": 0.45}], ids=["exact", "cache"])
def test_its_pipeline(given):
    """Three clips of a walk: upstream's own rollout, and with a step of each later clip held."""
    pytest.importorskip("einops")
    pytest.importorskip("scipy")
    from examples.matrix_game_3.upstream import load, there_and_back

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), load(os.environ["MATRIX_GAME_3"], "cpu", FLOAT, pipeline=True) as upstream:
        patch.setattr(matrix_game_3, "attention", functools.partial(matrix_game_3.attention, dtype=FLOAT))
        model, actions = upstream.make(), there_and_back("walk")[:3]
        pipeline, want = upstream.rollout(model)
        upstream.play(pipeline, actions)
        pipeline, got = upstream.rollout(model)
        compiled = li_compile.compile(pipeline, options(**given))
        torch._dynamo.utils.counters.clear()
        upstream.play(compiled, actions)
        assert len(got) == 3 and not torch._dynamo.utils.counters["graph_break"] and len(compiled.report().graphs) == 2
        assert relative(got[0], want[0]) <= 1e-5
        stats = compiled.rollout.session.stats()
        if given["preset"] == "exact":
            assert max(map(relative, got, want)) <= 1e-5 and stats["calls"] == 9
        else:
            assert relative(got[1], want[1]) > 1e-5 and stats["calls"] == 3 + 2 + 2
        compiled.detach()

"""The family of HY-WorldPlay's Wan variant, on a reduced model of our own under upstream's name."""

from __future__ import annotations

import sys

import pytest
import torch
from models import worldplay_wan as wan
from test_hy_rollout import graphs, quick  # noqa: F401
from torch.utils._pytree import tree_leaves
from tracing import relative

import li_compile
from li_compile.patterns.families.hy_worldplay_wan import MODEL

OPTIONS = {"lowering": "eager", "strict": True, "sparse.tile": (4, 2, 2), "sparse.block_size": 16}


@pytest.fixture
def model(monkeypatch):
    place, _, name = MODEL.rpartition(".")
    monkeypatch.setitem(sys.modules, place, wan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(name, (wan.WanWorld,), {"__module__": place})().eval().requires_grad_(False)


@pytest.fixture
def calls(model):
    """Calls of a rollout over contexts of 4, 8 and 12 latents, with what the model as it is gives."""
    given = [wan.call(4, 0)]
    with torch.compiler.set_stance("force_eager"):
        for frames in (4, 8, 12):
            given.append(wan.call(frames, 0, keep=True))
            given.append(wan.call(4, frames, cache=model(**given[-1])))
        return [(g, tree_leaves(model(**g))) for g in given]


def compiled(model, **options):
    torch._dynamo.utils.counters.clear()
    return li_compile.compile(model, li_compile.Config.from_options(OPTIONS | {k.replace("__", "."): v for k, v in options.items()}))


def distances(run, calls):
    return [max(map(relative, tree_leaves(run(**g)), want)) for g, want in calls]


def test_contexts_of_any_length_are_three_graphs_and_nothing_changes(model, calls):
    block, attention = wan.Block.forward, wan.sageattn
    fast = compiled(model, preset="exact")
    assert fast.config.family == "hy_worldplay_wan" and len(fast.preparation.changes) == 3
    assert max(distances(fast, calls)) <= 1e-6 and graphs() == 3
    found = [g.found for g in fast.report().graphs]
    assert [f.get("attention, decode", f.get("attention, prefill")) for f in found] == [
        f"{n} sites, grid 3 x 4, 2 branches" for n in (2, 1, 2)]  # of the last block of an encoding, nothing but keys and values is read
    assert fast.report().counts()["functional_writes"] >= 3 * 2 * wan.DEPTH
    assert fast.detach() is model and wan.Block.forward is block and wan.sageattn is attention and "forward" not in vars(model.rope)


def test_attention_becomes_sparse_from_min_context_on(model, calls):
    fast = compiled(model, preset="sparse", sparse__min_context=8)
    far = distances(fast, calls)
    assert max(far[:3]) <= 1e-6 and far[-1] > 1e-4 and graphs() == 5
    assert fast.report().counts()["sparse_attention"] >= 1
    whole = compiled(fast.detach(), preset="sparse", sparse__topk_ratio=1.0, sparse__prefill_ratio=1.0)
    assert max(distances(whole, calls)) <= 1e-5
    whole.detach()


def test_unprepared_its_attention_is_hidden(model):
    with torch.compiler.set_stance("force_eager"):
        model(**wan.call(4, 0))
    report = li_compile.explain(model, config=li_compile.Config(family="doom_world"), **wan.call(4, 0))
    assert not any("attention, prefill" in g.found for g in report.graphs)

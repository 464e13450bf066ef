"""Through Inductor: one tiny world, compiled once for plain Inductor, preset off and preset all."""

from __future__ import annotations

import pytest
import torch
from tracing import TINY, dynamic, relative, world_inputs

from li_compile.backend import last_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sampler(tiny_world):
    from examples.doom_world.model import ChunkSampler

    return ChunkSampler(tiny_world(depth=1), steps=3)


@pytest.fixture(scope="module", autouse=True)
def cache_of_our_own(tmp_path_factory):
    """A cold cache that goes away with the test session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def results(sampler, cache_of_our_own):
    """Name -> output for 20 context frames, of which preset all keeps 12 and reuses steps."""
    inputs = world_inputs(sampler.model, 20, revisit=True)
    ours = {"backend": "light_interaction", "fullgraph": True}
    options = {"sparse.skip_layers": 0, **{k: v for k, v in TINY.items() if k != "lowering"}}
    # The frames are a constant of the first two graphs: nothing is pruned there, and constants compile fastest.
    found = {"eager": sampler}
    found["inductor"] = torch.compile(sampler, dynamic=False, fullgraph=True)
    found["off"] = torch.compile(sampler, dynamic=False, options={"preset": "off"}, **ours)
    found["all"] = torch.compile(sampler, options={"preset": "all", **options}, **ours)
    found["all, eager lowering"] = torch.compile(sampler, options={"preset": "all", "lowering": "eager", **options}, **ours)
    out = {}
    for name, fn in found.items():
        torch._dynamo.reset()
        given = [x.clone() for x in inputs]
        with torch.no_grad():
            out[name] = fn(*(dynamic(given) if name.startswith("all") else given))
    return out


def test_off_is_plain_inductor(results):
    assert torch.equal(results["off"], results["inductor"])
    assert relative(results["off"], results["eager"]) <= 1e-5


def test_all_through_inductor_is_all_in_eager(results):
    assert relative(results["all"], results["all, eager lowering"]) <= 1e-5
    assert relative(results["all"], results["eager"]) > 1e-3  # it was pruned, thinned and reused


def test_a_preallocated_cache_through_inductor(cache_of_our_own):
    """Frames come in as a further input and the start stays symbolic: one variant serves all chunks, caches are written."""
    from context_models import Rolling, rolling_inputs
    from test_context_forms import rolled, session
    from tracing import seeded

    model = seeded(Rolling)
    fn = torch.compile(model, backend="light_interaction", fullgraph=True, options={"preset": "context", "context.policy": "authors"})
    with torch.no_grad():
        for history in (20, 24, 28):
            x, keys, values = rolling_inputs(history, room=36)
            mine = [[c.clone() for c in caches] for caches in (keys, values)]
            with session(history, revisit=True) as s, s.chunk(history) as plan:
                result = fn(x, *mine, history)
            assert relative(result, rolled(model, x, keys, values, history, plan.indices)) <= 1e-5
            model(x, keys, values, history)
            assert relative(mine[0][0], keys[0]) <= 1e-5  # the first layer writes what it would have written unpruned
    assert last_report().graphs[-1].variants[-1].kept == 12 and len(last_report().graphs[-1].variants) == 2


def test_lists_of_frames_through_inductor(cache_of_our_own, tiny_world):
    from test_context_forms import chosen_cache, session, step_inputs

    model = tiny_world(depth=1)

    def step(x, time, action, w2c, intrinsics, text_k, text_v, keys, values, start):
        return model(x, time, action, w2c, intrinsics, text_k, text_v, (keys, values), start)[0]

    fn = torch.compile(step, backend="light_interaction", fullgraph=True, dynamic=False,
                       options={"preset": "context", "context.policy": "authors", "sparse.block_size": 16})
    inputs = step_inputs(model, 20)
    with torch.no_grad(), session(20, revisit=True) as s, s.chunk(20) as plan:
        assert relative(fn(*inputs), step(*chosen_cache(inputs, plan.indices))) <= 1e-5


class Deep(torch.nn.Module):
    """So many equal blocks in regions; numbered: each is told its number."""

    def __init__(self, depth, numbered):
        super().__init__()
        self.layers, self.numbered = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(depth)), numbered
        self.run = torch.compiler.nested_compile_region(lambda index, layer, x: x + torch.nn.functional.silu(layer(x)))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.run(i if self.numbered else 0, layer, x)
        return x


def test_a_block_is_compiled_once(monkeypatch):
    """Twelve blocks make as many kernels as two; so do blocks that are told their number (of which Dynamo accepts eight),
    and blocks of a region each, which Dynamo 2.11 leaves."""
    from test_exact import split
    from torch._inductor import metrics

    from li_compile import pipeline

    made, canonical = {}, pipeline.canonical
    for name, model, apart, options in (("two", Deep(2, False), False, {}), ("twelve", Deep(12, False), False, {}),
                                        ("numbered", Deep(7, True), False, {}), ("apart", Deep(12, False), True, {}),
                                        ("not merged", Deep(12, False), True, {"exact.merge_regions": False})):
        torch._dynamo.reset()
        metrics.reset()
        x = torch.randn(4, 8)
        monkeypatch.setattr(pipeline, "canonical", lambda *a: split(canonical(*a)) if apart else canonical(*a))
        options = {"preset": "exact", "inductor": {"fx_graph_cache": False}} | options
        with torch.no_grad():
            assert relative(torch.compile(model, backend="light_interaction", options=options)(x), model(x)) <= 1e-5
        made[name] = metrics.generated_kernel_count
    assert 0 < made["two"] == made["twelve"] == made["numbered"] == made["apart"] < made["not merged"]

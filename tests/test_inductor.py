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
    from test_context_forms import rolled, seeded, session

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

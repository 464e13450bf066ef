"""Through Inductor: one tiny world, compiled once for plain Inductor, preset off and preset all."""

from __future__ import annotations

import pytest
import torch
from tracing import TINY, dynamic, relative, world_inputs

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

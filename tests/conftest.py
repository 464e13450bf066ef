"""Shared fixtures. Graphs are traced once a session; see tracing.py."""

from __future__ import annotations

import dataclasses
import gc
import os

import pytest

# Run beside another worker of pytest-xdist, a process keeps to one core. PyTorch and Inductor read this when they are imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(threads, "1")

import torch  # noqa: E402


def pytest_collection_finish():
    """Tracing makes objects by the million, almost none of them garbage in cycles; at Python's thresholds a fifth of the time of
    test_passes.py went into looking at all of them again, and at what was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def clean_dynamo():
    """No test sees what another compiled."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def own_report(request):
    """The report of graphs compiled begins with the test."""
    from li_compile.backend import last_report

    last_report(new={"test": request.node.name})


@pytest.fixture(scope="session")
def tiny_world():
    """tiny_world(regional=..., depth=2): Doom World with 2 blocks of 32 channels on 4 x 4 tokens, random weights."""
    from examples.doom_world.model import WorldConfig, WorldModel

    config = WorldConfig(channels=4, height=4, width=4, dim=32, heads=2, depth=2, rope_dims=(4, 6, 6), cond_dim=16,
                         text_dim=16, registers=4)

    def make(regional: bool = True, **changes) -> WorldModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return WorldModel(dataclasses.replace(config, **changes), regional=regional).eval()

    return make


@pytest.fixture(scope="session")
def traced_worlds():
    """Filled by ``world``; a parametrised session fixture would be made anew whenever tests alternate between forms."""
    return {}


@pytest.fixture(params=["regions", "unrolled"])
def world(request, tiny_world, traced_worlds):
    """The chunk function of the tiny world in both forms: (sampler, its graph with a dynamic number of context frames)."""
    from examples.doom_world.model import ChunkSampler
    from tracing import Traced, dynamic, world_inputs

    if request.param not in traced_worlds:
        sampler = ChunkSampler(tiny_world(regional=request.param == "regions"), steps=3)
        traced_worlds[request.param] = sampler, Traced(sampler, *dynamic(world_inputs(sampler.model, 20)))
    return traced_worlds[request.param]

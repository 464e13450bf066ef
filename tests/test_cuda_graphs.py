"""Option ``cuda_graphs``: what Inductor compiles is recorded and replayed, chunk by chunk."""

from __future__ import annotations

import pytest
import test_hy_wan_rollout
import torch
from models import worldplay_rollout as reduced
from models import worldplay_wan_rollout as wan
from test_hy_rollout import rollout
from test_policy import left_right
from tracing import relative, world_inputs

import li_compile
from li_compile import _compat
from li_compile.errors import ConfigError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
AUTHORS = {"context.policy": "authors", "cache.guard": None, "sparse.tile": (4, 2, 2), "sparse.block_size": 16, "strict": True}


@pytest.fixture
def handed(monkeypatch):
    """Options that Inductor is handed; it compiles nothing."""
    seen = []
    monkeypatch.setattr(_compat, "inductor", lambda module, inputs, patches, digest: seen.append(patches) or module)
    return seen


@pytest.fixture
def marks(monkeypatch):
    made = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: made.append(1))
    return made


def test_without_inductor_there_is_nothing_to_record():
    with pytest.raises(ConfigError, match="cuda_graphs.*lowering"):
        li_compile.Config(cuda_graphs=True, lowering="eager")


def test_on_the_cpu_inductor_is_not_asked_for_any(tiny_world, handed):
    from examples.doom_world.model import ChunkSampler

    sampler = ChunkSampler(tiny_world(depth=1), steps=2)
    with torch.no_grad():
        li_compile.compile(sampler, li_compile.Config(preset="exact", cuda_graphs=True))(*world_inputs(sampler.model, 4))
    assert handed and not any("triton.cudagraphs" in patches for patches in handed)


def test_the_report_says_of_which_graph_none_is_recorded(tiny_world, monkeypatch):
    from examples.doom_world.model import ChunkSampler

    def inductor(module, *_):
        torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += 1
        return module

    monkeypatch.setattr(_compat, "inductor", inductor)
    fast = li_compile.compile(ChunkSampler(tiny_world(depth=1), steps=2), li_compile.Config(preset="exact", cuda_graphs=True))
    with torch.no_grad():
        fast(*world_inputs(fast.original.model, 4))
    (miss,) = [m for m in fast.report().graphs[0].misses if m.pattern == "CUDA graphs"]
    assert "TORCH_LOGS=perf_hints" in miss.reason and "CUDA graphs" in str(fast.report())


@pytest.mark.parametrize("on", [True, False])
def test_a_chunk_of_a_session_begins_once(marks, on):
    session = li_compile.Session(li_compile.Config(preset="exact", cuda_graphs=on))
    session.extend(left_right()[:12])
    for start in (0, 4, 8):
        with session.chunk(start):
            assert len(marks) == (start // 4 + 1) * on


@pytest.mark.parametrize("on", [True, False])
def test_a_graph_that_is_a_whole_chunk_begins_it(tiny_world, handed, marks, on):
    from examples.doom_world.model import ChunkSampler

    sampler = ChunkSampler(tiny_world(depth=1), steps=2)
    fast = li_compile.compile(sampler, li_compile.Config(preset="cache", cuda_graphs=on))
    session = li_compile.Session(fast.config)
    with torch.no_grad():
        for _ in range(2):
            fast(*world_inputs(sampler.model, 4))
        assert len(marks) == 2 * on
        session.extend(left_right()[:8])
        with session.chunk(4):  # which has begun already
            fast(*world_inputs(sampler.model, 4))
    assert len(marks) == 3 * on


@pytest.mark.parametrize("on", [True, False])
def test_each_chunk_of_a_pipeline_begins_once(monkeypatch, handed, marks, on):
    """And not each of its steps, which read what the context encoding returned."""
    pipe, given = reduced.pipeline(monkeypatch, 3, depth=1), reduced.inputs(3, left_right())
    with torch.no_grad():
        want = rollout(pipe, given)
        fast = li_compile.compile(pipe, li_compile.Config.from_options({**AUTHORS, "preset": "exact", "cuda_graphs": on}))
        assert relative(rollout(fast, given), want) <= 1e-5 and len(marks) == 3 * on


@pytest.mark.parametrize("on", [True, False])
def test_each_call_of_a_pipeline_that_makes_one_chunk_begins_it(monkeypatch, handed, marks, on):
    pipe, given = wan.pipeline(monkeypatch, depth=1), wan.inputs(left_right()[:12])
    fast = li_compile.compile(pipe, li_compile.Config.from_options({**AUTHORS, "preset": "exact", "cuda_graphs": on}))
    test_hy_wan_rollout.rollout(fast, given)
    assert handed and len(marks) == 3 * on
    fast.detach()


@pytest.fixture
def replays(monkeypatch):
    made, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: made.append(1) or replay(graph))
    return made


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["exact", "all"])
def test_a_pipelines_chunks_are_replayed(monkeypatch, replays, preset):
    """From the third chunk with one length of context on; the latents are those without graphs, and the memory stays what it was."""
    chunks = 16
    pipe, given = reduced.pipeline(monkeypatch, chunks, depth=1), reduced.inputs(chunks, left_right())
    pipe.transformer.cuda()
    given = {k: v.cuda() if isinstance(v, torch.Tensor) and k not in ("viewmats", "Ks", "action") else v for k, v in given.items()}
    given |= {"device": torch.device("cuda"), "extra_kwargs": {k: v.cuda() for k, v in given["extra_kwargs"].items()}}
    results = {}
    with torch.no_grad():
        for on in (False, True):
            fast = li_compile.compile(pipe, li_compile.Config.from_options({**AUTHORS, "preset": preset, "cuda_graphs": on}))
            results[on] = rollout(fast, given)
            assert bool(replays) == on
            if on:
                assert not [m for g in fast.report().graphs for m in g.misses if m.pattern == "CUDA graphs"]
                rollout(fast, given)  # lengths that came once before are recorded now
                memory = []
                for _ in range(3):
                    first = len(replays)
                    assert relative(rollout(fast, given), results[False]) <= 1e-5
                    calls = fast.rollout.session.stats()["calls"] + chunks - 1
                    assert len(replays) - first == calls, "every step and every context encoding"
                    memory.append(torch.cuda.memory_reserved())
                assert memory[1] == memory[2]
            fast.detach()
            torch._dynamo.reset()
    assert relative(results[True], results[False]) <= 1e-5


@needs_gpu
@pytest.mark.gpu
def test_a_chunk_function_is_replayed(tiny_world, replays):
    from examples.doom_world.model import ChunkSampler

    sampler = ChunkSampler(tiny_world(), steps=3)
    inputs = [[x.cuda() for x in world_inputs(sampler.model, 20, revisit=revisit)] for revisit in (True, False)]
    sampler.cuda()
    config = dict(preset="all", strict=True, context={"fov": (60, 40)}, sparse={"block_size": 16, "tile": (4, 2, 2)})
    with torch.no_grad():
        plain = li_compile.compile(sampler, li_compile.Config(**config))
        want = [plain(*x).clone() for x in inputs]
        torch._dynamo.reset()
        fast = li_compile.compile(sampler, li_compile.Config(**config, cuda_graphs=True))
        for turn in range(4):
            for x, w in zip(inputs, want):
                before = len(replays)
                assert relative(fast(*x), w) <= 1e-5
                assert turn < 2 or len(replays) > before
            if turn == 2:
                memory = torch.cuda.memory_reserved()
    assert torch.cuda.memory_reserved() == memory


@needs_gpu
@pytest.mark.gpu
def test_tables_are_in_no_graphs_memory():
    """What a rehearsal in a graph's pool makes for good would be given to others again."""
    from li_compile.kernels.layout import cached

    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
    device, handed = torch.device("cuda", torch.cuda.current_device()), []
    make = lambda device, n: torch.arange(n, device=device)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool=pool, stream=stream):
        torch.zeros(8, device=device)
    with torch.cuda.stream(stream):
        torch._C._cuda_beginAllocateCurrentThreadToPool(device.index, pool)
        try:
            handed = [cached(make, device, 1000), torch.zeros(1000, device=device)]
        finally:
            torch._C._cuda_endAllocateToPool(device.index, pool)
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)]
    inside = lambda x: any(s["address"] <= x.data_ptr() < s["address"] + s["total_size"] for s in segments)
    assert inside(handed[1]) and not inside(handed[0]) and handed[0].tolist() == list(range(1000))
    del graph

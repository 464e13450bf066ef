"""Whole-chunk graphs from chunk to chunk: the gate, the guard, the predictor across chunks, and all that may go wrong."""

from __future__ import annotations

import math

import pytest
import torch
from samplers import Denoiser, alone, euler, in_two_threads, shifted
from test_policy import forward_back, left_right
from tracing import Traced, dynamic, relative, world_inputs

from li_compile import CacheConfig, Config, Session, regions
from li_compile.memory import ChunkMemory
from li_compile.policy import plan_context

LEVELS = shifted(4)
ALWAYS = {"preset": "cache", "cache__gate": "always"}


def inputs(seed=0, condition=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, generator=generator)
    return [x, torch.randn(3, 1, generator=generator) if condition is None else condition]


@pytest.fixture(scope="module")
def velocity():
    torch.manual_seed(0)
    return alone(Denoiser())


@pytest.fixture(scope="module")
def traced(velocity):
    return Traced(euler(velocity, LEVELS), *inputs())


def session():
    return Session(Config(preset="cache"))


def by_hand(velocity, given, skip=(1, 2)):
    with torch.no_grad():
        return euler(velocity, LEVELS, skip=skip)(*given)


# The authors' counts.


def test_the_authors_calls_of_hy_worldplay(tiny_world, monkeypatch):
    """Pruned context and cached steps: 48 of 64 calls turning left and right, 38 of 64 walking forward and back; counted
    as they are made, by a tiny world on the evaluation trajectories, with upstream's retrieval before ours."""
    from examples.doom_world.model import ChunkSampler

    sampler, calls, real = ChunkSampler(tiny_world(depth=1)), [], regions.CompiledRegion.forward
    monkeypatch.setattr(regions.CompiledRegion, "forward", lambda self, *args: calls.append(self.name) or real(self, *args))
    options = {"preset": "all", "lowering": "eager", "strict": True, "sparse.enabled": False, "cache.guard": None,
               "context.policy": "authors"}
    compiled = torch.compile(sampler, backend="light_interaction", options=options)
    for poses, total in ((left_right(), 48), (forward_back(), 38)):
        calls.clear()
        with Session(Config.from_options(options)) as session, torch.no_grad():
            for start in range(0, 64, 4):
                given = world_inputs(sampler.model, min(start, 20))
                given[3] = poses[start:start + 4].float()[None]
                if start:
                    chosen = list(plan_context(poses[:start], poses[start:start + 4], UPSTREAM).indices)
                    given[9] = poses[chosen].float()[None]
                compiled(*(dynamic(given) if start > 4 else given))
        stats = session.stats()
        assert (stats["calls"], stats["calls_possible"], stats["chunks"]) == (total, 64, 16)
        assert calls.count("li_step") == total


#: What HY-WorldPlay retrieves before anything is accelerated: 20 latents, 12 of them the newest.
UPSTREAM = Config.from_options({"preset": "context", "context.policy": "authors", "context.memory_frames": 20, "context.temporal_frames": 12,
                                "context.threshold": 0.0})


def grid_overlap(reference, candidates):
    """Matrix-Game's overlap: the share of a 10 x 10 x 10 grid in the reference's 90 degree frustum, 0.1 to 30 deep, that
    each candidate sees as well (a picture of 1280 x 720 with focal lengths of half its sides). w2c [4, 4], [N, 4, 4]."""
    z = torch.linspace(0.1, 30, 10, dtype=torch.float64)
    side = torch.linspace(-1, 1, 10, dtype=torch.float64)
    depth, x, y = torch.meshgrid(z, side, side, indexing="ij")
    points = torch.stack([x * depth, y * depth, depth, torch.ones_like(depth)], -1).reshape(-1, 4)
    world = points @ torch.linalg.inv(reference).mT
    seen = torch.einsum("nij,pj->npi", candidates, world)
    u, v = 640 * seen[..., 0] / seen[..., 2] + 640, 360 * seen[..., 1] / seen[..., 2] + 360
    inside = (seen[..., 2] > 0.1) & (seen[..., 2] < 30) & (u >= 0) & (u <= 1280) & (v >= 0) & (v <= 720)
    return inside.double().mean(1)


def matrix_game(step):
    """Camera poses of 8 clips, a frame each: half of them one way, half back. step(i): (yaw in degrees, way) at frame i."""
    frames = []
    for i in range(57 + 7 * 40):
        yaw, z = step(min(i, 57 + 7 * 40 - 1 - i))
        a = math.radians(yaw)
        pose = torch.eye(4, dtype=torch.float64)
        pose[0, 0] = pose[2, 2] = math.cos(a)
        pose[0, 2], pose[2, 0] = math.sin(a), -math.sin(a)
        pose[2, 3] = z
        frames.append(torch.linalg.inv(pose))
    return torch.stack(frames)


@pytest.mark.parametrize(("step", "total"), [(lambda i: (-1.5 * i, 0.0), 20), (lambda i: (0.0, 0.1235 * i), 17)],
                         ids=["left, right", "forward, back"])
def test_the_authors_calls_of_matrix_game(step, total):
    """Three steps a clip, the second reused where all five memory slots overlap by 0.45: 20 and 17 of 24 calls."""
    poses, cache, calls = matrix_game(step), CacheConfig(threshold=0.45), 0
    for clip in range(8):
        end, start = 57 + 40 * clip, 1 + 40 * clip
        scores = [float(grid_overlap(poses[end - back], poses[1:start]).max()) for back in (1, 9, 17, 25, 33)] if clip else []
        reuse = bool(scores) and min(scores) >= cache.threshold
        calls += 3 - (len(cache.skipped(3)) if reuse else 0)
    assert cache.skipped(3) == (1,) and calls == total


# The guard.


def test_the_guard_computes_the_next_chunks(velocity, traced):
    """Drift as it is defined; past the bound, two chunks are computed in full, and then reuse is tried again."""
    compiled = traced.compile(**ALWAYS | {"cache__guard": 1e-6})
    with session() as rollout:
        for i in range(7):
            given = inputs(i)
            got = compiled(*given)
            assert relative(got, by_hand(velocity, given, () if i else (1, 2))) <= 1e-5
    per_chunk = rollout.stats()["per_chunk"]
    assert [c["calls"] for c in per_chunk] == [2, 4, 4, 4, 4, 4, 4]  # a full chunk drifts too, and keeps it waiting
    assert rollout.stats()["guarded_chunks"] == 6 and [c["guarded"] for c in per_chunk] == [False] + [True] * 6
    assert "drifted by" in per_chunk[1]["reason"] and "cache.guard" in per_chunk[1]["reason"]
    x, condition = inputs(0)
    with torch.no_grad():
        first = velocity(x, LEVELS[0], condition)
        last = velocity(x + (LEVELS[3] - LEVELS[0]) * first, LEVELS[3], condition)
    assert per_chunk[0]["drift"] == pytest.approx(float((last - first).abs().sum() / last.abs().sum()), rel=1e-4)


def test_the_guard_lets_go_again():
    memory = ChunkMemory(Config.from_options({"cache.guard": 0.5, "cache.guard_chunks": 2}).cache, across=False)
    decided = []
    for drift in (0.1, 0.6, 0.2, 0.3, 0.7, float("nan"), 0.1, 0.1, 0.1):
        decided.append(memory.begin(True, [])[0])
        memory.end(torch.tensor(drift), [], [])
    assert decided == [True, True, False, False, True, False, False, False, True]


def test_a_bound_that_is_kept_changes_nothing(velocity, traced):
    compiled = traced.compile(**ALWAYS | {"cache__guard": 10.0})
    with session() as rollout:
        for i in range(3):
            assert relative(compiled(*inputs(i)), by_hand(velocity, inputs(i))) <= 1e-5
    assert rollout.stats()["calls"] == 6


def test_outside_of_a_session_nothing_is_watched(velocity, traced):
    compiled = traced.compile(**ALWAYS | {"cache__guard": 1e-6})
    for i in range(3):
        assert relative(compiled(*inputs(i)), by_hand(velocity, inputs(i))) <= 1e-5


# The predictor across chunks.


PREVIOUS = ALWAYS | {"cache__predictor": "previous", "cache__guard": None}


def outputs_of(velocity, given):
    """The outputs of all steps, computed in full."""
    found, (x, condition) = [], given
    with torch.no_grad():
        for sigma, following in zip(LEVELS, LEVELS[1:]):
            found.append(velocity(x, sigma, condition))
            x = x + found[-1] * (following - sigma)
    return found


def changed(velocity, given, before):
    """A chunk whose steps 1 and 2 change as those of an earlier one."""
    x, condition = given
    with torch.no_grad():
        first = velocity(x, LEVELS[0], condition)
        for i, (sigma, following) in enumerate(zip(LEVELS, LEVELS[1:])):
            v = first + before[i] - before[0] if i in (1, 2) else first if i == 0 else velocity(x, sigma, condition)
            x = x + v * (following - sigma)
    return x


def test_changes_of_an_earlier_chunk(velocity, traced):
    compiled, condition = traced.compile(**PREVIOUS), inputs()[1]
    with session() as rollout:
        for i in range(4):
            given = inputs(i, condition)
            want = changed(velocity, given, outputs_of(velocity, inputs(0, condition))) if i else by_hand(velocity, given, ())
            assert relative(compiled(*given), want) <= 1e-5
    assert [c["calls"] for c in rollout.stats()["per_chunk"]] == [4, 2, 2, 2]
    assert "no earlier chunk with the same actions" in rollout.stats()["per_chunk"][0]["reason"]


def test_an_action_vetoes(velocity, traced):
    """The condition is the one input that is no state: it counts as an action."""
    compiled, one, other = traced.compile(**PREVIOUS), *(inputs(i)[1] for i in (0, 1))
    with session() as rollout:
        for i, condition in enumerate([one, one, other, other, one]):
            given, full = inputs(i, condition), i in (0, 2, 4)
            earlier = inputs(i - 1, condition)
            want = by_hand(velocity, given, ()) if full else changed(velocity, given, outputs_of(velocity, earlier))
            assert relative(compiled(*given), want) <= 1e-5
    assert [c["calls"] for c in rollout.stats()["per_chunk"]] == [4, 2, 4, 2, 4]


def test_without_a_session_there_is_no_earlier_chunk(velocity, traced):
    compiled, condition = traced.compile(**PREVIOUS), inputs()[1]
    for i in range(2):
        assert torch.equal(compiled(*inputs(i, condition)), traced(*inputs(i, condition)))


def test_a_variant_that_could_not_be_made_is_not_counted_as_reuse(velocity, traced):
    """Without shared calls there is no earlier chunk to read: refused with its reason, and all steps are computed."""
    compiled, condition = traced.compile(**PREVIOUS, exact__shared_steps=False), inputs()[1]
    with session() as rollout:
        for i in range(3):
            assert relative(compiled(*inputs(i, condition)), by_hand(velocity, inputs(i, condition), ())) <= 1e-5
    stats = rollout.stats()
    assert (stats["calls"], stats["reused_chunks"]) == (12, 0)
    assert "no variant of this graph skips steps" in stats["per_chunk"][-1]["reason"]
    assert "predictor 'previous' reads an earlier chunk, for which the calls of the model must be alike" in compiled.reasons


def test_an_exception_inside_a_chunk_leaves_nothing(velocity, traced, monkeypatch):
    compiled, condition = traced.compile(**PREVIOUS), inputs()[1]
    real = regions.CompiledRegion.forward
    with session() as rollout:
        compiled(*inputs(0, condition))
        count = []

        def failing(self, *args):
            count.append(1)
            if len(count) == 2:
                raise RuntimeError("boom")
            return real(self, *args)

        monkeypatch.setattr(regions.CompiledRegion, "forward", failing)
        with pytest.raises(RuntimeError, match="boom"):
            compiled(*inputs(1, condition))
        monkeypatch.setattr(regions.CompiledRegion, "forward", real)
        assert torch.equal(compiled(*inputs(2, condition)), traced(*inputs(2, condition)))
    assert [c["calls"] for c in rollout.stats()["per_chunk"]] == [4, 4]


def test_a_new_video_starts_from_nothing(velocity, traced):
    compiled, condition = traced.compile(**PREVIOUS), inputs()[1]
    with session() as rollout:
        compiled(*inputs(0, condition))
        rollout.reset()
        assert torch.equal(compiled(*inputs(1, condition)), traced(*inputs(1, condition)))


def test_another_loop_in_between(velocity, traced):
    """Settings that are constants of the graph make another graph: what came before it is no previous chunk any more."""
    other = Traced(euler(velocity, shifted(4, shift=3.0)), *inputs())
    compiled, changed_settings, condition = traced.compile(**PREVIOUS), other.compile(**PREVIOUS), inputs()[1]
    with session() as rollout:
        for i, (fn, plain) in enumerate([(compiled, traced), (changed_settings, other), (compiled, traced)]):
            assert torch.equal(fn(*inputs(i, condition)), plain(*inputs(i, condition)))
    assert rollout.stats()["calls"] == 12


def test_two_sessions_on_one_compiled_function(velocity, traced):
    compiled, condition = traced.compile(**PREVIOUS), inputs()[1]
    one, other = session(), session()
    for i in range(3):
        for rollout, base in ((one, 0), (other, 50)):
            given = inputs(base + i, condition)
            with rollout:
                got = compiled(*given)
            earlier = outputs_of(velocity, inputs(base, condition))
            assert relative(got, changed(velocity, given, earlier) if i else by_hand(velocity, given, ())) <= 1e-5


def test_sessions_in_threads(velocity, traced):
    compiled, condition = traced.compile(**PREVIOUS), inputs()[1]

    def rollout(base, meet):
        earlier = outputs_of(velocity, inputs(base, condition))
        with session():
            for i in range(5):
                given = inputs(base + i, condition)
                meet()
                got = compiled(*given)
                assert relative(got, changed(velocity, given, earlier) if i else by_hand(velocity, given, ())) <= 1e-5

    in_two_threads(rollout)

"""Sessions: poses as they come, records, and no mixing between threads, tasks and nested sessions."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
import torch

from li_compile.config import Config
from li_compile.errors import LightInteractionError, PoseError
from li_compile.policy import plan_context
from li_compile.session import Session


AUTHORS = {"context.policy": "authors"}


def forward(count, first=0):
    """World-to-camera [count, 4, 4] of a camera that moves 0.08 units a latent along z."""
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    poses[:, 2, 3] = -0.08 * torch.arange(first, first + count)
    return poses


def test_rollout_and_stats():
    session = Session(Config.from_options(AUTHORS), family="hy_worldplay")
    session.extend(forward(32))
    for start in range(0, 32, 4):
        plan = session.plan(start)
        assert plan == session.plan(start, 4) == plan_context(forward(start), forward(4, start), session.config)
        session.record(plan, steps=4, seconds=0.5)
    stats = session.stats()
    assert stats["chunks"] == 8 and stats["reused_chunks"] == 5
    assert stats["context_kept"] == 4 + 8 + 5 * 12 and stats["context_possible"] == sum(range(0, 32, 4))
    assert stats["calls"] == 3 * 4 + 5 * 2 and stats["calls_possible"] == 32
    last = stats["per_chunk"][-1]
    assert last["seconds"] == 0.5 and last["reuse"] and last["calls"] == 2 and last["context_kept"] == 12
    assert json.loads(json.dumps(stats)) == stats
    assert session.family == "hy_worldplay" and "hy_worldplay" in repr(session)


def test_poses_as_they_come():
    known, live = Session(), Session()
    known.extend(forward(24))
    for start in range(0, 24, 4):
        with pytest.raises(PoseError, match=f"latents {start} to {start + 3} need poses, {start} are known"):
            live.plan(start)
        live.extend(forward(3, start).float())
        live.extend(forward(1, start + 3)[0])  # a single pose needs no leading dimension
        assert live.plan(start).indices == known.plan(start).indices


def test_bad_poses_leave_the_session_as_it_was():
    session = Session()
    session.extend(forward(4))
    bad = forward(4)
    bad[2, 0, 0] = float("inf")
    with pytest.raises(PoseError, match="frame 6"):
        session.extend(bad)
    assert torch.equal(session.poses, forward(4))


@pytest.mark.parametrize(("start", "size"), [(-4, 4), (0, 0), (2, 4), (4, 3)])
def test_chunks_that_do_not_fit(start, size):
    session = Session()
    session.extend(forward(16))
    with pytest.raises(PoseError):
        session.plan(start, size)


def test_calls_are_unknown_unless_known_for_all():
    session = Session()
    session.extend(forward(8))
    assert session.stats()["calls"] is None and session.stats()["chunks"] == 0
    session.record(session.plan(0), steps=4, calls=3)
    assert session.stats()["calls"] == 3
    session.record(session.plan(4))
    assert session.stats()["calls"] is None


def test_reset():
    session = Session()
    session.extend(forward(8))
    session.record(session.plan(4))
    session.reset()
    assert session.poses.shape == (0, 4, 4) and session.stats()["chunks"] == 0


def test_few_steps_are_all_computed():
    session = Session(Config.from_options(AUTHORS | {"cache.min_steps": 5}))
    session.extend(forward(16))
    plan = session.plan(12)
    assert plan.reuse
    session.record(plan, steps=4)
    assert session.stats()["calls"] == 4


def test_current_session_nests_and_ends():
    outer, inner = Session(), Session()
    assert Session.current() is None
    with outer as entered:
        assert entered is outer and Session.current() is outer
        with pytest.raises(RuntimeError, match="boom"), inner:
            assert Session.current() is inner
            raise RuntimeError("boom")
        assert Session.current() is outer
        with pytest.raises(LightInteractionError, match="innermost"):
            inner.__exit__(None, None, None)
    assert Session.current() is None


def test_threads_do_not_mix():
    barrier, seen = threading.Barrier(2, timeout=20), {}

    def run(name, count):
        assert Session.current() is None  # a thread starts with no session, whatever its maker had entered
        with Session() as session:
            session.extend(forward(count))
            barrier.wait()
            seen[name] = Session.current() is session and len(Session.current().poses) == count
            barrier.wait()

    with Session():
        threads = [threading.Thread(target=run, args=item) for item in (("a", 4), ("b", 8))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert seen == {"a": True, "b": True}


def test_tasks_do_not_mix():
    async def run(count):
        with Session() as session:
            session.extend(forward(count))
            await asyncio.sleep(0.01)
            return Session.current() is session

    async def both():
        return await asyncio.gather(run(4), run(8))

    assert asyncio.run(both()) == [True, True]

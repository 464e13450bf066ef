"""The planning side of sessions: ahead or as it comes, from poses and from latents; saved, restored, drawn."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from li_compile.config import Config
from li_compile.errors import LightInteractionError, PoseError
from li_compile.policies.base import PolicyState
from li_compile.policy import plan_context
from li_compile.session import Session


def turn(yaw: float, x: float = 0.0) -> torch.Tensor:
    a, c2w = math.radians(yaw), torch.eye(4, dtype=torch.float64)
    c2w[:3, :3] = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]], dtype=torch.float64)
    c2w[0, 3] = x
    return torch.linalg.inv(c2w)


def back_and_forth(frames: int = 64) -> torch.Tensor:
    return torch.stack([turn(3.0 * min(i, frames - i)) for i in range(frames)])


def session(**context) -> Session:
    return Session(Config.from_options({f"context.{key}": value for key, value in context.items()}))


def test_a_whole_trajectory_is_planned_ahead():
    """As chunk by chunk, and as the poses come in; the order of asking does not matter."""
    poses = back_and_forth()
    ahead, asked, live = session(), session(), session()
    ahead.extend(poses)
    asked.extend(poses)
    plans = ahead.plan_ahead()
    assert len(plans) == 16 and asked.plan(60) == plans[15] and [asked.plan(s) for s in range(60, -1, -4)] == plans[::-1]
    state = PolicyState()
    for i, start in enumerate(range(0, 64, 4)):
        live.extend(poses[start : start + 4])
        assert live.plan(start) == plans[i] == plan_context(poses[:start], poses[start : start + 4], live.config, state=state)
        state = plans[i].state
    assert ahead.plan_ahead(8)[1].history == 8 and len(ahead.plan_ahead(8)) == 8
    assert session().plan_ahead() == []


def test_hysteresis_goes_from_chunk_to_chunk():
    """A camera that wobbles about the chunk at 0 degrees: overlaps 0.71 to its one side, 0.69 to its other."""
    poses = torch.stack([turn(y) for y in [0] * 4 + [90] * 12 + [-17.4] * 4 + [18.6] * 4])
    with_it, without = session(hysteresis=0.05), session(hysteresis=0.0)
    for s in (with_it, without):
        s.extend(poses)
        assert s.plan(16).reuse and s.plan(20).score == pytest.approx(0.69, abs=5e-3)
    assert with_it.plan(20).reuse and not without.plan(20).reuse


def test_a_teleport_starts_anew_and_keeps_what_is_known():
    poses = torch.stack([turn(0)] * 16 + [turn(0, x=30.0)] * 8 + [turn(0)] * 8)
    s = session(anchor_frames=0)
    s.extend(poses[:10])
    s.extend(poses[10:])
    plans = s.plan_ahead()
    assert [p.teleported for p in plans] == [False] * 4 + [True, False, True, False]
    assert s.planner.teleports == [16, 24]
    assert plans[5].window == 1 and set(plans[5].indices) >= {19}  # the newest after the jump
    assert plans[6].window == 0 and plans[6].coverage == 1.0 and max(plans[6].indices) < 16  # back: seen before the jump
    assert plans[6].state.dynamics is None and not plans[4].reuse
    authors = session(policy="authors")
    authors.extend(poses)
    assert not any(p.teleported for p in authors.plan_ahead())


def test_the_window_follows_what_was_generated():
    s = session(window="dynamics", temporal_frames=4, kappa=1.0, alpha=0.5)
    s.extend(back_and_forth(24))
    assert s.plan(16).window == 4  # nothing observed yet
    latents = torch.zeros(1, 3, 16, 2, 2)
    latents[:, :, 15] = 3.0  # D = 9: a tenth of the window
    s.observe(latents, end=16)
    assert s.plan(16).window == 1 and s.plan(16).state.dynamics == 9.0
    s.observe(torch.cat([latents, latents[:, :, -1:].expand(-1, -1, 4, -1, -1)], 2), end=20)  # nothing moved since
    assert s.plan(20).state.dynamics == 4.5 and s.plan(20).window == 1
    assert s.plan(16).window == 1  # what was planned before stays
    latents[:, :, 15] = torch.inf
    with pytest.raises(PoseError, match="not finite"):
        s.observe(latents, end=16)
    s.observe(latents[:, :, :1], end=16)  # a single latent says nothing


def test_observed_surfaces_hide_what_is_behind():
    s = session(rule="frustum", fov=(90, 70))
    s.extend(back_and_forth(16)[:1].expand(16, 4, 4))
    assert s.plan(12).coverage == 1.0
    s.observe(depth=torch.full((12, 4, 4), 1.0), end=12)
    assert s.plan(12).coverage < 0.7


def test_stats_tell_what_was_decided():
    s = session()
    s.extend(back_and_forth(32))
    for plan in s.plan_ahead():
        s.record(plan)
    chunk = s.stats()["per_chunk"][-1]
    assert chunk["window"] == 1 and chunk["revisit"] is True and 0 < chunk["coverage"] <= 1 and chunk["teleported"] is False
    assert json.loads(json.dumps(s.stats())) == s.stats()


def test_the_plan_in_force():
    s = session()
    s.extend(back_and_forth(16))
    with pytest.raises(RuntimeError, match="boom"), s.chunk(8) as plan:
        assert s.scope.plan is plan is s.plan(8)
        raise RuntimeError("boom")
    assert s.scope is None and s.stats()["chunks"] == 0
    with pytest.raises(PoseError, match="need poses"), s.chunk(16):
        pass


def test_saved_and_restored(tmp_path):
    """What goes on is what would have gone on."""
    poses = back_and_forth()
    whole, first, second = (session(window="dynamics") for _ in range(3))
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 2, 64, 2, 2, generator=random).cumsum(2)
    whole.extend(poses)
    first.extend(poses[:36])
    for s, end in ((whole, 64), (first, 36)):
        for start in range(0, end, 4):
            if start:
                s.observe(latents[:, :, :start], end=start)
            s.record(s.plan(start), steps=4, seconds=0.5)
    first.observe(depth=torch.ones(2, 3, 3))
    first.save(tmp_path / "session.pt")
    second.load(tmp_path / "session.pt")
    assert torch.equal(second.poses, first.poses) and second.stats() == first.stats()
    second.extend(poses[36:])
    for start in range(36, 64, 4):
        second.observe(latents[:, :, :start], end=start)
        second.record(second.plan(start), steps=4, seconds=0.5)
    assert second.stats() == whole.stats()
    assert {k: d.shape for k, d in second.planner.depth.items()} == {34: (3, 3), 35: (3, 3)}


def test_what_cannot_be_restored(tmp_path):
    s = session()
    s.extend(back_and_forth(8))
    s.record(s.plan(4))
    state = s.state_dict()
    with pytest.raises(LightInteractionError, match="saved under other options"):
        session(memory_frames=12).load_state_dict(state)
    with pytest.raises(LightInteractionError, match="format 0, this is format 1"):
        session().load_state_dict(state | {"version": 0})
    for wrong in ({}, [], None, {"version": 1}):
        with pytest.raises(LightInteractionError, match="no state of a session"):
            session().load_state_dict(wrong)
    with pytest.raises(LightInteractionError, match="no file"):
        session().load(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("not a session")
    with pytest.raises(LightInteractionError, match="no saved session"):
        session().load(tmp_path / "text.pt")
    torch.save({"run": print}, tmp_path / "code.pt")
    with pytest.raises(LightInteractionError, match="no saved session"):
        session().load(tmp_path / "code.pt")


def test_a_graphs_chunks_are_planned_one_after_the_other():
    """decide(): for poses that come with a graph's inputs; a chunk that is run again is planned as before."""
    s = session(hysteresis=0.05)
    history = torch.stack([turn(y) for y in [0] * 4 + [90] * 12])
    near, nearer = (torch.stack([turn(y)] * 4) for y in (-18.6, -17.4))
    assert not s.planner.decide(history, near, s.config).reuse
    assert s.planner.decide(history, nearer, s.config).reuse
    assert s.planner.decide(history, near, s.config).reuse  # open, and held open
    assert s.planner.decide(history, near, s.config).reuse
    again = session(hysteresis=0.05)
    again.load_state_dict(s.state_dict())
    assert again.planner.decide(history, near, s.config) == s.planner.decide(history, near, s.config)
    s.reset()
    assert not s.planner.decide(history, near, s.config).reuse


def test_a_picture_of_the_kept_context(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    s = session()
    with pytest.raises(LightInteractionError, match="no chunk was recorded"):
        s.plot(tmp_path / "empty.png")
    s.extend(torch.cat([back_and_forth(32), torch.stack([turn(0, x=40.0)] * 4)]))
    for plan in s.plan_ahead():
        s.record(plan)
    s.plot(tmp_path / "kept.svg")
    drawn = (tmp_path / "kept.svg").read_text()
    assert drawn.startswith("<?xml") and drawn.count("<use") >= s.stats()["context_kept"]  # a mark a kept latent
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LightInteractionError, match=r"pip install 'li_compile\[plot\]'"):
        s.plot(tmp_path / "none.png")

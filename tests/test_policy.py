"""The authors' policy on HY-WorldPlay's two evaluation trajectories, against a plain statement of the algorithm; and what
all policies take for poses. The other policies: test_policies.py."""

from __future__ import annotations

import math

import pytest
import torch

from li_compile.config import Config
from li_compile.errors import PoseError
from li_compile.kernels.view_overlap import view_overlap
from li_compile.policy import check_poses, plan_context

AUTHORS = {"context.policy": "authors"}
LATENTS, CHUNK, STEPS = 64, 4, 4  # 253 frames, a chunk of 4 latents, the distilled model's 4 steps


def left_right():
    """'left-31, right-32': 3 degrees of yaw a latent. World-to-camera [64, 4, 4] float64."""
    return torch.stack([_w2c(yaw=-3.0 * min(i, 62 - i)) for i in range(LATENTS)])


def forward_back():
    """'w-31, s-32': 0.08 units forward a latent."""
    return torch.stack([_w2c(z=0.08 * min(i, 62 - i)) for i in range(LATENTS)])


def _w2c(yaw=0.0, z=0.0):
    a = math.radians(yaw)
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3, :3] = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    c2w[2, 3] = z
    return torch.linalg.inv(c2w)


def rollout(poses, config):
    return [plan_context(poses[:t], poses[t : t + CHUNK], config) for t in range(0, LATENTS, CHUNK)]


def calls(plans):
    return sum(2 if plan.reuse else STEPS for plan in plans)


def test_left_right_all():
    plans = rollout(left_right(), Config.from_options(AUTHORS))
    lengths = [len(plan.indices) for plan in plans]
    assert lengths == [0, 4, 8] + [8] * 5 + [12] * 8 and sum(lengths) == 148
    assert [plan.reuse for plan in plans] == [False] * 8 + [True] * 8 and calls(plans) == 48
    # Yaw alone: overlap is 1 - angle / 60 in closed form; published replays of the released code give 0.579, 0.824,
    # 0.935 and 0.775 with its random points.
    for chunk, exact in ((3, 0.575), (7, 0.575), (8, 0.825), (9, 0.9375), (14, 0.9375), (15, 0.775)):
        assert plans[chunk].score == pytest.approx(exact, abs=2e-3)
    assert plans[3].indices == (0, 1, 2, 3, 8, 9, 10, 11)
    assert "dropped" in plans[3].reason and "0.575" in plans[3].reason
    # Turning back, chunk 9 sees again what the chunk at latent 24 saw; the newest four and the first four stay.
    assert plans[9].indices == (0, 1, 2, 3, 24, 25, 26, 27, 32, 33, 34, 35)


def test_forward_back_all():
    plans = rollout(forward_back(), Config.from_options(AUTHORS))
    lengths = [len(plan.indices) for plan in plans]
    assert lengths == [0, 4, 8] + [12] * 13 and sum(lengths) == 168
    assert [plan.reuse for plan in plans] == [False] * 3 + [True] * 13 and calls(plans) == 38
    for chunk, replayed in ((3, 0.782), (7, 0.782), (8, 0.912), (9, 0.968), (14, 0.968), (15, 0.884)):
        assert plans[chunk].score == pytest.approx(replayed, abs=0.01)  # the replay's points are random


@pytest.mark.parametrize(("trajectory", "first", "total"), [(left_right, 9, 50), (forward_back, 8, 48)])
def test_cache_alone(trajectory, first, total):
    """Pruning off: everything is kept, and upstream's window (20, 12) bounds the gate's candidates."""
    plans = rollout(trajectory(), Config.from_options({"preset": "cache"} | AUTHORS))
    assert [len(plan.indices) for plan in plans] == list(range(0, LATENTS, CHUNK))
    assert [plan.reuse for plan in plans] == [False] * first + [True] * (16 - first) and calls(plans) == total
    assert not plans[4].scores and list(plans[5].scores) == [4]


@pytest.mark.parametrize("preset", ["context", "sparse", "exact", "off"])
def test_reuse_needs_the_cache(preset):
    poses = forward_back()
    plan = plan_context(poses[:40], poses[40:44], Config.from_options({"preset": preset} | AUTHORS))
    assert plan.score > 0.9 and not plan.reuse


@pytest.mark.parametrize("trajectory", [left_right, forward_back])
def test_against_the_algorithm_spelled_out(trajectory):
    """A.1.3 of the released selector, pair by pair, without our batching."""
    poses, config = trajectory(), Config.from_options(AUTHORS)
    for t in (0, 8, 12, 32, 48):
        plan = plan_context(poses[:t], poses[t : t + CHUNK], config)
        if t < 12:
            assert plan.indices == tuple(range(t)) and plan.scores == {} and plan.score == 0.0
            continue
        scores = {
            j: sum(
                float(view_overlap(poses[q : q + 1], poses[h : h + 1])) / 2 for q in range(t, t + 4) for h in (j, j + 2)
            )
            / 4
            for j in range(4, t - 4, 4)
        }
        assert plan.scores == pytest.approx(scores, abs=1e-6)
        memory = [0, 1, 2, 3]
        if max(scores.values()) >= 0.7:
            for j, _ in sorted(plan.scores.items(), key=lambda item: -item[1]):
                if len(memory) >= 8:
                    break
                memory += range(j, j + 4)
        assert plan.indices == tuple(sorted({*memory, *range(t - 4, t)}))


def upstream_retrieval(poses, t):
    """What HY-WorldPlay itself passes on: everything up to 20 latents, then first chunk, best of the old, newest 12."""
    if t <= 20:
        return list(range(t))
    scores = {
        j: float(view_overlap(poses[t : t + 4], poses[[j, j + 2]]).mean()) for j in range(4, t - 12, 4)
    }
    best = max(scores, key=scores.get)
    return sorted({*range(4), *range(best, best + 4), *range(t - 12, t)})


def wandering(seed):
    g = torch.Generator().manual_seed(seed)
    yaw, z, out = 0.0, 0.0, []
    for _ in range(LATENTS // CHUNK):
        turn, step = (torch.rand(2, generator=g) * 2 - 1).tolist()
        for _ in range(CHUNK):
            out.append(_w2c(yaw, z))
            yaw, z = yaw + 6 * turn, z + 0.2 * step
    return torch.stack(out)


@pytest.mark.parametrize("preset", ["all", "cache"])
@pytest.mark.parametrize("poses", [left_right(), forward_back(), wandering(0)], ids=["lr", "fb", "any"])
def test_upstreams_selection_is_enough(poses, preset):
    """Planned over upstream's 20 latents or over all so far: the same latents, the same gate."""
    config = Config.from_options({"preset": preset} | AUTHORS)
    for t in range(12, LATENTS, 2 * CHUNK):
        over_all = plan_context(poses[:t], poses[t : t + 4], config)
        given = upstream_retrieval(poses, t)
        over_given = plan_context(poses[given], poses[t : t + 4], config)
        assert over_given.score == pytest.approx(over_all.score, abs=1e-6) and over_given.reuse == over_all.reuse
        assert over_given.history == len(given) and over_all.history == t
        if config.context.enabled:
            assert tuple(given[i] for i in over_given.indices) == over_all.indices


def test_more_memory_takes_more_chunks_best_first():
    poses = left_right()
    plan = plan_context(poses[:40], poses[40:44], Config.from_options(AUTHORS | {"context.memory_frames": 20}))
    assert len(plan.indices) == 20
    best = sorted(plan.scores, key=plan.scores.get, reverse=True)[:3]
    assert set(plan.indices) == {*range(4), *range(36, 40), *(i for j in best for i in range(j, j + 4))}


def test_no_candidates():
    config = Config.from_options(AUTHORS | {"context.temporal_frames": 8})
    plan = plan_context(left_right()[:12], left_right()[12:16], config)
    assert plan.indices == tuple(range(12)) and not plan.scores and not plan.reuse and plan.score == 0.0
    assert "no candidates" in plan.reason


def test_threshold_is_inclusive_and_chunks_may_be_short():
    still = _w2c().expand(LATENTS, 4, 4)
    config = Config.from_options(AUTHORS | {"context.threshold": 1, "cache.threshold": 1, "context.chunk_frames": 1})
    plan = plan_context(still[:30], still[30:31], config)
    assert plan.score == 1.0 and plan.reuse and len(plan.indices) == 12


@pytest.mark.parametrize("policy", ["authors", "chunks", "coverage"])
def test_frame_of_reference_and_dtype_do_not_matter(policy):
    poses, config = left_right(), Config.from_options({"context.policy": policy})
    elsewhere = poses @ _w2c(yaw=77, z=3)
    for t in (12, 36, 60):
        plan = plan_context(poses[:t], poses[t : t + 4], config)
        for other in (elsewhere, poses.float(), poses.numpy()):
            moved = plan_context(other[:t], other[t : t + 4], config)
            assert (moved.indices, moved.reuse) == (plan.indices, plan.reuse)


def _broken(frame, change):
    poses = left_right()[:16].clone()
    change(poses[frame])
    return poses


@pytest.mark.parametrize("policy", ["authors", "chunks", "coverage", "slots"])
@pytest.mark.parametrize(
    ("history", "words"),
    [
        (_broken(5, lambda p: p.__setitem__((0, 3), float("nan"))), "history pose of frame 5 .* not finite"),
        (_broken(6, lambda p: p[:3, :3].mul_(1.1)), "history pose of frame 6 .* off orthonormal"),
        (_broken(7, lambda p: p[0].neg_()), "history pose of frame 7 .* mirrors"),
        (_broken(8, lambda p: p.__setitem__((3, 3), 2.0)), "history pose of frame 8 .* last row"),
        (left_right()[:15], "15 history poses .* chunks of 4 .*whole chunks"),
        (left_right()[None, :16], r"\[1, 16, 4, 4\].*drop the batch"),
        (torch.zeros(16, 3, 4), r"\[16, 3, 4\]"),
        ("poses", "history poses are str"),
    ],
)
def test_poses_that_do_not_fit(history, words, policy):
    if policy == "slots" and "whole chunks" in words:
        return  # takes any number of video frames
    with pytest.raises(PoseError, match=words):
        plan_context(history, left_right()[16:20], Config.from_options({"context.policy": policy}))


def test_current_poses_that_do_not_fit():
    with pytest.raises(PoseError, match="3 current poses"):
        plan_context(left_right()[:16], left_right()[16:19], Config())
    with pytest.raises(PoseError, match="no poses"):
        plan_context(left_right()[:16], left_right()[:0], Config())


def test_half_precision_poses_pass():
    assert check_poses(left_right().bfloat16(), "given").dtype == torch.float64

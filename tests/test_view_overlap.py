"""View overlap: identities, disjoint views, invariance, and the authors' ball sampling as the reference."""

from __future__ import annotations

import math

import pytest
import torch

from li_compile.kernels.view_overlap import view_overlap


def pose(yaw=0.0, pitch=0.0, roll=0.0, at=(0.0, 0.0, 0.0)):
    """World-to-camera [4, 4] float64 of a camera at ``at``; angles in degrees, yaw turns x towards z's place."""
    y, p, r = (math.radians(a) for a in (yaw, pitch, roll))
    turn_y = torch.tensor([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    turn_x = torch.tensor([[1, 0, 0], [0, math.cos(p), math.sin(p)], [0, -math.sin(p), math.cos(p)]])
    turn_z = torch.tensor([[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1]])
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3, :3] = (turn_y @ turn_x @ turn_z).double()
    c2w[:3, 3] = torch.tensor(at)
    return torch.linalg.inv(c2w)


def random_poses(count, seed, *, turn=25.0, move=1.0):
    g = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, 6, generator=g, dtype=torch.float64)
    return torch.stack([pose(*(row[:3] * turn).tolist(), at=(row[3:] * move).tolist()) for row in draw])


def angles(v):
    return torch.atan2(v[..., 0], v[..., 2]), torch.atan2(v[..., 1], torch.hypot(v[..., 0], v[..., 2]))


def in_view(points, centre, axis, fov):
    """The released test of a view, with angles."""
    (azimuth, elevation), (yaw, pitch) = angles(points - centre), angles(axis)
    off_h = torch.remainder(azimuth - yaw + math.pi, 2 * math.pi) - math.pi
    off_v = torch.remainder(elevation - pitch + math.pi, 2 * math.pi) - math.pi
    return (off_h.abs() < math.radians(fov[0] / 2)) & (off_v.abs() < math.radians(fov[1] / 2))


def ball_rule(queries, histories, fov, radius, count):
    """[Q, H] by the released rule: random points in a ball about the query, counted in its view and in both."""
    g = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(count, 3, generator=g), dim=1)
    points *= radius * torch.rand(count, 1, generator=g).pow(1 / 3)
    points = points[in_view(points, torch.zeros(3), torch.tensor([0.0, 0.0, 1.0]), fov)]  # same for every query
    overlap = torch.empty(len(queries), len(histories))
    for i, query in enumerate(queries):
        for j, history in enumerate(histories):
            camera = (query @ torch.linalg.inv(history)).float()  # history camera to world, the world being the query's
            near = torch.linalg.vector_norm(points - camera[:3, 3], dim=-1) < radius
            overlap[i, j] = (in_view(points, camera[:3, 3], camera[:3, 2], fov) & near).float().mean()
    return overlap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_view_overlaps_itself_wholly(dtype):
    poses = random_poses(32, 0, turn=90).to(dtype)
    overlap = view_overlap(poses, poses)
    assert overlap.dtype == torch.float32 and overlap.shape == (32, 32)
    assert torch.equal(overlap.diagonal(), torch.ones(32))
    assert overlap.min() >= 0 and overlap.max() <= 1


def test_turning_on_the_spot_is_linear_and_ends():
    here = pose()[None]
    turned = torch.stack([pose(yaw=a) for a in (15, 30, 59.9, 60.1, 90, 180, -30, 375)])
    expected = torch.tensor([0.75, 0.5, 0.1 / 60, 0, 0, 0, 0.5, 0.75])
    torch.testing.assert_close(view_overlap(here, turned)[0], expected, atol=2e-3, rtol=0)
    assert view_overlap(here, turned)[0, 3:6].eq(0).all()
    assert view_overlap(here, pose(pitch=40)[None]).item() == 0


def test_out_of_reach_is_not_seen():
    assert view_overlap(pose()[None], pose(at=(0, 0, -16.1))[None]).item() == 0
    assert view_overlap(pose()[None], pose(at=(0, 0, -7.9))[None]).item() < 0.01


def test_roll_of_the_history_plays_no_part():
    """The rule looks at forward axes only; the released code does too."""
    here, there = pose()[None], {"yaw": 20, "at": (0.5, 0, 1)}
    assert view_overlap(here, pose(**there)[None]) == view_overlap(here, pose(**there, roll=70)[None])


def test_rigid_motion_changes_nothing():
    query, history = random_poses(6, 1), random_poses(9, 2)
    motion = pose(yaw=123, pitch=31, roll=-77, at=(5, -3, 11))
    moved = view_overlap(query @ motion, history @ motion)
    torch.testing.assert_close(moved, view_overlap(query, history), atol=1e-3, rtol=0)


def test_repeats_exactly_and_ignores_the_global_generator():
    query, history = random_poses(4, 3), random_poses(8, 4)
    torch.manual_seed(1)
    first = view_overlap(query, history)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(view_overlap(query, history), first)
    assert torch.equal(torch.get_rng_state(), state)
    rows = torch.cat([view_overlap(query[i : i + 1], history) for i in range(4)])
    assert torch.equal(rows, first)


def test_converges():
    query, history = random_poses(6, 5), random_poses(12, 6)
    dense = view_overlap(query, history, samples=30_000)
    error = [(view_overlap(query, history, samples=n) - dense).abs() for n in (256, 2048)]
    assert error[1].mean() < 0.005 and error[1].max() < 0.02
    assert error[1].mean() < error[0].mean() / 2


@pytest.mark.parametrize(
    ("fov", "radius", "count"),
    [((60.0, 35.0), 8.0, 300_000), ((105.0, 75.0), 3.0, 100_000), ((200.0, 150.0), 5.0, 30_000)],
)
def test_agrees_with_the_ball_rule(fov, radius, count):
    query, history = random_poses(3, 7, turn=10, move=0.5), random_poses(6, 8, turn=10, move=0.5)
    overlap = view_overlap(query, history, fov=fov, radius=radius, samples=20_000)
    assert overlap.max() > 0.3  # or the comparison says little
    torch.testing.assert_close(overlap, ball_rule(query, history, fov, radius, count), atol=0.015, rtol=0)


def test_looking_straight_up():
    up = pose(pitch=-90)[None]
    assert view_overlap(up, up).item() == 1
    assert view_overlap(pose()[None], up).item() == 0


def test_no_cameras():
    assert view_overlap(random_poses(3, 9), torch.empty(0, 4, 4, dtype=torch.float64)).shape == (3, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_w2c": torch.eye(4)}, "query_w2c"),
        ({"history_w2c": torch.zeros(2, 3, 4)}, "history_w2c"),
        ({"history_w2c": None}, "NoneType"),
        ({"query_w2c": torch.eye(4).long()[None]}, "floating"),
        ({"history_w2c": torch.empty(1, 4, 4, device="meta")}, "two devices"),
        ({"fov": (0, 35)}, "fov"),
        ({"fov": (60, 181)}, "fov"),
        ({"radius": -1.0}, "radius"),
        ({"samples": 0}, "samples"),
    ],
)
def test_errors(change, words):
    arguments = {"query_w2c": torch.eye(4)[None], "history_w2c": torch.eye(4)[None]} | change
    with pytest.raises(ValueError, match=words):
        view_overlap(arguments.pop("query_w2c"), arguments.pop("history_w2c"), **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_as_on_the_cpu():
    query, history = random_poses(4, 10), random_poses(32, 11)
    there = view_overlap(query.cuda(), history.cuda())
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), view_overlap(query, history), atol=2e-3, rtol=0)

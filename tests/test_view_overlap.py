"""View overlap: identities, disjoint views, invariance, and the authors' ball sampling as the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from li_compile.kernels.view_overlap import RULES, view_overlap, view_visibility


def pose(yaw=0.0, pitch=0.0, roll=0.0, at=(0.0, 0.0, 0.0)):
    """World-to-camera [4, 4] float64 of a camera at ``at``; angles in degrees, yaw turns x towards z's place."""
    y, p, r = (math.radians(a) for a in (yaw, pitch, roll))
    turn_y = torch.tensor([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]], dtype=torch.float64)
    turn_x = torch.tensor([[1, 0, 0], [0, math.cos(p), math.sin(p)], [0, -math.sin(p), math.cos(p)]], dtype=torch.float64)
    turn_z = torch.tensor([[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1]], dtype=torch.float64)
    c2w = torch.eye(4, dtype=torch.float64)
    c2w[:3, :3] = turn_y @ turn_x @ turn_z
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


# All rules.

VIEWS = {"sphere": {"fov": (90.0, 70.0), "radius": 6.0}, "frustum": {"fov": (90.0, 70.0), "radius": 6.0, "near": 0.3},
         "grid": {"radius": 30.0}}
angle, length = st.floats(-180, 180), st.floats(-2, 2)
somewhere = st.builds(lambda y, p, r, a, b, c: pose(y, p / 3, r, (a, b, c)), angle, angle, angle, length, length, length)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40, deadline=None)
@given(a=somewhere, b=somewhere, motion=somewhere)
def test_properties(rule, a, b, motion):
    """A camera sees all of its own view; shares are shares; moving the world and both cameras changes nothing."""
    view = {"rule": rule} | VIEWS[rule]
    itself = view_overlap(a[None], a[None], **view).item()
    assert itself == (pytest.approx(0.8) if rule == "grid" else 1.0)
    there = view_overlap(a[None], b[None], **view)
    assert 0 <= there.item() <= 1
    moved = view_overlap((a @ motion)[None], (b @ motion)[None], **view)
    assert abs(moved - there).item() <= 2e-3


@pytest.mark.parametrize("rule", RULES)
def test_mirrored_motion_gives_the_same(rule):
    """Left and right, up and down are alike: the views are symmetric (to the quadrature's error)."""
    here, view = pose()[None], {"rule": rule} | VIEWS[rule]
    for one, other in (({"yaw": 25}, {"yaw": -25}), ({"pitch": 15}, {"pitch": -15}), ({"at": (0.5, 0.0, 0.0)}, {"at": (-0.5, 0.0, 0.0)})):
        torch.testing.assert_close(view_overlap(here, pose(**one)[None], **view), view_overlap(here, pose(**other)[None], **view),
                                   atol=5e-3, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_turned_past_the_field_of_view_nothing_is_shared(rule):
    behind = torch.stack([pose(yaw=a) for a in (91, 120, 180, -100)])
    assert view_overlap(pose()[None], behind, rule=rule, **VIEWS[rule]).eq(0).all()


def test_a_frustum_knows_roll_and_its_own_intrinsics():
    here, rolled = pose()[None], pose(roll=90)[None]
    wide = {"rule": "frustum", "fov": (90.0, 45.0), "radius": 6.0}
    # Turned by a right angle, tan 22.5 / tan 45 of the image's width is left.
    assert view_overlap(here, rolled, **wide).item() == pytest.approx(math.tan(math.radians(22.5)), abs=0.01)
    square = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])
    assert view_overlap(here, rolled, rule="frustum", intrinsics=square).item() == 1
    # The same field of view, written either way.
    poses, others = random_poses(4, 21), random_poses(6, 22)
    focal = [0.5 / math.tan(math.radians(a / 2)) for a in (90, 45)]
    given_as = torch.tensor([[focal[0], 0, 0.5], [0, focal[1], 0.5], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(view_overlap(poses, others, **wide), view_overlap(poses, others, rule="frustum", intrinsics=given_as, radius=6.0))


def test_intrinsics_of_each_camera_and_off_centre():
    here = pose()[None]
    k = lambda f, c: torch.tensor([[f, 0, c], [0, 0.5, 0.5], [0, 0, 1]])
    twice = view_overlap(here, here, rule="frustum", intrinsics=k(0.5, 0.5), history_intrinsics=k(1.0, 0.5))
    assert twice.item() == pytest.approx(0.5, abs=5e-3)  # twice the focal length sees half the width
    shifted = view_overlap(here, here, rule="frustum", intrinsics=k(0.5, 0.5), history_intrinsics=k(0.5, 0.75))
    assert shifted.item() == pytest.approx(0.75, abs=5e-3)
    both = torch.stack([k(1.0, 0.5), k(0.5, 0.75)])
    pair = view_overlap(here, here.expand(2, 4, 4), rule="frustum", intrinsics=k(0.5, 0.5), history_intrinsics=both)
    torch.testing.assert_close(pair, torch.cat((twice, shifted), 1))


def test_depth_says_what_there_is_to_see():
    """A wall at depth 2: what counts is the wall alone, and a step to the side loses a strip of it."""
    here, aside = pose()[None], pose(at=(1.0, 0.0, 0.0))[None]
    wall = torch.full((1, 12, 16), 2.0)
    view = {"rule": "frustum", "fov": (90.0, 90.0), "radius": 6.0}
    assert view_overlap(here, here, depth=wall, **view).item() == 1
    # The wall is 4 wide in the image; a step of 1 takes a fourth of it out of view.
    assert view_overlap(here, aside, depth=wall, **view).item() == pytest.approx(0.75, abs=5e-3)
    half = wall.clone()
    half[:, :, :8] = 0.0  # nothing known of the left half: the right one alone counts, and it stays in view
    assert view_overlap(here, aside, depth=half, **view).item() == pytest.approx(1.0, abs=5e-3)
    seen, known = view_visibility(here, aside, depth=half, **view)
    assert known.float().mean().item() == pytest.approx(0.5, abs=0.01) and not (seen & ~known[:, None]).any()
    assert view_overlap(here, here, depth=torch.full_like(wall, torch.nan), **view).item() == 0  # nothing known at all


def test_what_lies_behind_a_surface_was_not_seen():
    view = {"rule": "frustum", "fov": (90.0, 90.0), "radius": 8.0, "near": 0.1, "samples": 4096}
    here = pose()[None]
    free, walled = view_overlap(here, here, **view), view_overlap(here, here, history_depth=torch.full((1, 9, 9), 2.0), **view)
    # Depth is log-uniform between near and radius: the share in front of a wall at 2.
    assert free.item() == 1 and walled.item() == pytest.approx(math.log(2 * 1.05 / 0.1) / math.log(80), abs=0.01)
    left = torch.full((1, 9, 10), 0.05)
    left[:, :, 5:] = 0.0  # hidden on the left, unknown on the right: unknown hides nothing
    assert view_overlap(here, here, history_depth=left, **view).item() == pytest.approx(0.5, abs=0.01)
    surface = torch.full((1, 9, 9), 2.0)  # a surface that both see hides itself from neither
    assert view_overlap(here, here, depth=surface, history_depth=surface, **view).item() == 1


def frustum_rule(queries, histories, fov, near, far, count):
    """[Q, H] by drawing: uniform over the image, log-uniform in depth, by the definition of a pinhole camera."""
    g = torch.Generator().manual_seed(0)
    u = torch.rand(count, 3, generator=g, dtype=torch.float64)
    half = [math.tan(math.radians(a / 2)) for a in fov]
    z = near * (far / near) ** u[:, 2]
    points = torch.stack([(2 * u[:, 0] - 1) * half[0] * z, (2 * u[:, 1] - 1) * half[1] * z, z, torch.ones_like(z)])
    overlap = torch.empty(len(queries), len(histories))
    for i, query in enumerate(queries):
        for j, history in enumerate(histories):
            x, y, z, _ = history @ torch.linalg.inv(query) @ points
            overlap[i, j] = ((z > 0) & (z < far) & (x.abs() < half[0] * z) & (y.abs() < half[1] * z)).float().mean()
    return overlap


def test_a_frustum_converges_to_a_dense_reference():
    query, history = random_poses(3, 23, turn=15, move=0.6), random_poses(8, 24, turn=15, move=0.6)
    want = frustum_rule(query, history, (90, 70), 0.2, 6.0, 400_000)
    error = [(view_overlap(query, history, rule="frustum", fov=(90, 70), near=0.2, radius=6.0, samples=n) - want).abs() for n in (128, 2048, 32768)]
    assert want.max() > 0.3
    assert error[1].max() < 0.02 and error[2].max() < 5e-3 and error[1].mean() < error[0].mean() / 2


def test_matrix_games_lattice():
    """Its rule, pair by pair: 1,000 points at ten depths, inside the image with both edges, strictly between the depths."""
    side, depth = torch.linspace(-1, 1, 10, dtype=torch.float64), torch.linspace(0.1, 30, 10, dtype=torch.float64)
    x, y, z = (g.flatten() for g in torch.meshgrid(side, side, depth, indexing="ij"))
    points = torch.stack([x * z, y * z, z, torch.ones_like(z)])
    query, history = random_poses(3, 25, turn=30, move=1.0), random_poses(7, 26, turn=30, move=1.0)
    got = view_overlap(query, history, rule="grid", radius=30.0)
    for i, a in enumerate(query):
        for j, b in enumerate(history):
            x, y, z, _ = b @ torch.linalg.inv(a) @ points
            inside = (z > 0.1) & (z < 30) & (x.abs() <= z) & (y.abs() <= z)
            assert got[i, j].item() == pytest.approx(inside.double().mean().item(), abs=2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_visibility_is_overlap_point_by_point(rule):
    query, history, view = random_poses(3, 27), random_poses(40, 28), {"rule": rule} | VIEWS[rule]
    seen, known = view_visibility(query, history, **view)
    assert seen.dtype == torch.bool and seen.shape[:2] == (3, 40) and known is None
    torch.testing.assert_close(seen.float().mean(-1), view_overlap(query, history, **view))
    assert view_visibility(query, history[:0], **view)[0].shape == (3, 0, seen.shape[-1])


def test_the_operator_is_sound():
    query, history = random_poses(2, 29), random_poses(5, 30)
    square = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])
    torch.library.opcheck(torch.ops.li.view_overlap.default, (query, history, square), {"rule": "frustum", "samples": 64})
    assert torch.equal(torch.ops.li.view_overlap(query, history), view_overlap(query, history))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "cone"}, "one of sphere, frustum, grid"),
        ({"rule": "frustum", "fov": (180, 90)}, "below 180"),
        ({"rule": "frustum", "near": 9.0}, "near must lie between 0 and radius"),
        ({"intrinsics": torch.eye(3)}, "intrinsics is for rule 'frustum'"),
        ({"rule": "grid", "depth": torch.ones(1, 2, 2)}, "depth is for rule 'frustum'"),
        ({"rule": "frustum", "intrinsics": torch.eye(4)}, r"intrinsics must be a tensor \[3, 3\] or \[1, 3, 3\]"),
        ({"rule": "frustum", "intrinsics": torch.tensor([[640.0, 0, 640], [0, 360, 360], [0, 0, 1]])}, "found pixels"),
        ({"rule": "frustum", "depth": torch.ones(2, 4, 4)}, r"depth must be a floating tensor \[1, height, width\]"),
        ({"rule": "frustum", "history_depth": torch.ones(1, 4)}, "history_depth"),
        ({"tolerance": -1}, "tolerance"),
    ],
)
def test_errors_of_views(change, words):
    with pytest.raises(ValueError, match=words):
        view_overlap(torch.eye(4)[None], torch.eye(4)[None], **change)


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

"""How much of one camera's view another camera saw: deterministic, batched, on any device.

Fixed points stand for what a query camera may show; counted is the share of them that lies in a history camera's view.
Three rules say what a view is:

``"sphere"``
    The rule that HY-WorldPlay retrieves its memory by and that Light Interaction (arXiv 2605.31158) gates on, there
    called S_FOV. A view is an angular window about the camera's forward axis, not a pinhole frustum: azimuth within half
    the horizontal field of view, elevation within half the vertical one, both measured in the query camera's axes (so
    the roll of the history camera plays no part), and no farther than a radius. Points are uniform by volume.
    Two things differ from the authors' code, neither in meaning. The points are fixed, where theirs are drawn from the
    unseeded global generator, which makes decisions near a threshold random from run to run. And they are laid straight
    into the query's view: theirs fill the whole ball, of which a 60 x 35 degree view holds 5 %, and the other 95 % never
    count.
``"grid"``
    The rule of Matrix-Game-3.0's memory (``select_memory_idx_fov``): a lattice of 1,000 points in a 90 degree pinhole
    view, counted where they project into the other image at a depth strictly between near and far. A camera and itself
    give 0.8, because the lattice's first and last layers lie on those bounds (upstream's rounding: 0.8 to 0.9).
``"frustum"``
    A pinhole view with any intrinsics, roll included. Points are uniform over the image and log-uniform in depth, so
    that every pixel and every scale counts alike; where a depth map of the query is given, on its surfaces instead.
    Where depth maps of the history are given, what lies behind their surfaces is not seen (occlusion).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .view_points import ball_points, depth_points, frustum_points, grid_points, pinhole

__all__ = ["RULES", "view_overlap", "view_visibility"]

RULES = ("sphere", "frustum", "grid")
SLACK = 1e-5  # points on a view's edge are inside, on its depth bounds outside, however poses and points were rounded
_BLOCK = 32767  # elements an operation: one less than torch's grain size, from which it starts threads


def view_overlap(query_w2c: torch.Tensor, history_w2c: torch.Tensor, **view) -> torch.Tensor:
    """Share of each query camera's view that each history camera saw.

    Args:
        query_w2c: ``[Q, 4, 4]`` rigid world-to-camera matrices, any floating dtype. Axes: x right, y down, z forward.
        history_w2c: ``[H, 4, 4]`` likewise, on the same device.
        view: what a camera sees, as in :func:`view_visibility`.

    Returns:
        ``[Q, H]`` float32 in [0, 1] on the inputs' device; 1 for a camera and itself (0.8 under "grid"), 0 if the views
        are disjoint or no surface is known of the query. Not symmetric in general. Invariant under one rigid motion of
        both sets.

    Raises:
        ValueError: a shape, device, angle, length or count that does not fit; the message names it.

    Source: Light Interaction section 3.1, eq. 4 (S_pose := S_FOV); released ``retrieval_context.py``; Matrix-Game-3.0
    ``cam_utils.py``.
    """
    counts, known, samples = _look(query_w2c, history_w2c, _count, **view)
    return counts.float() / (samples if known is None else known.sum(-1).clamp(min=1)[:, None])


def view_visibility(query_w2c: torch.Tensor, history_w2c: torch.Tensor, **view) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which points of each query camera's view each history camera saw.

    Args:
        query_w2c, history_w2c: as in :func:`view_overlap`.
        view: what a camera sees::

            rule: "sphere" (default), "frustum" or "grid", see the module.
            fov: full horizontal and vertical angle of view, degrees, (60, 35); up to (360, 180) for the sphere, below
                180 for a frustum without intrinsics, not used by the grid.
            radius: how far a camera sees, 8.0, in the units of the poses' translations (Matrix-Game: 30).
            near: least depth of a point, 0.1, for "frustum" and "grid".
            samples: points laid into each query's view, 2048 (the grid has its own 1,000). At 2048 the answer is off by
                0.0025 on average over random pairs of cameras and by 0.01 at worst; the released code's 50,000 random
                points leave some 2,500 in the view, a standard deviation of up to 0.01.
            intrinsics: [3, 3] or [Q, 3, 3], normalised by the image's width and height (fx / width, cy / height, ...),
                in place of fov. Only "frustum". history_intrinsics: [3, 3] or [H, 3, 3]; None: those of the queries,
                which must then be one for all.
            depth: [Q, h, w] z of the surface in each pixel of the queries, in pose units; not positive or NaN where
                unknown. history_depth: [H, h, w]; not positive or NaN where nothing hides anything. Only "frustum".
            tolerance: share of the depth, 0.05, by which a point may lie behind a surface and still count as that surface.

    Returns:
        ``(seen, known)``: bool ``[Q, H, S]``; bool ``[Q, S]``, which points stand for a surface (``seen`` is false
        elsewhere), or None if all do.

    Raises:
        ValueError: as :func:`view_overlap`.
    """
    seen, known, _ = _look(query_w2c, history_w2c, _as_it_is, **view)
    return seen, known


def _count(seen: torch.Tensor) -> torch.Tensor:
    return seen.sum(-1)


def _as_it_is(seen: torch.Tensor) -> torch.Tensor:
    return seen


@torch.no_grad()
def _look(
    query_w2c: torch.Tensor,
    history_w2c: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor],
    *,
    rule: str = "sphere",
    fov: tuple[float, float] = (60.0, 35.0),
    radius: float = 8.0,
    near: float = 0.1,
    samples: int = 2048,
    intrinsics: torch.Tensor | None = None,
    history_intrinsics: torch.Tensor | None = None,
    depth: torch.Tensor | None = None,
    history_depth: torch.Tensor | None = None,
    tolerance: float = 0.05,
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """(what is seen [Q, H, S], reduced over the points; which points are known; S). See :func:`view_visibility`."""
    _check(query_w2c, history_w2c, rule, fov, radius, near, samples, tolerance)
    query, history = query_w2c.double(), history_w2c.double()
    device = query.device
    if rule != "frustum":
        given = {"intrinsics": intrinsics, "history_intrinsics": history_intrinsics, "depth": depth, "history_depth": history_depth}
        for name, x in given.items():
            if x is not None:
                raise ValueError(f"{name} is for rule 'frustum'; the rule is {rule!r}, which knows a centred view without surfaces")
    if rule == "sphere":
        points = ball_points(samples, float(fov[0]), float(fov[1]), device) * radius
        return _sphere(points, query, history, fov, radius, reduce), None, samples
    if rule == "grid":
        points = grid_points(near, radius, device)
        seen = _project(points, None, query, history, pinhole((90.0, 90.0), device), (near, radius), None, tolerance, reduce)
        return seen, None, points.shape[-1]

    mine = _intrinsics(intrinsics, fov, len(query), "intrinsics", device)
    if history_intrinsics is None and len(mine) > 1:
        raise ValueError("history_intrinsics is needed where the queries have intrinsics of their own each")
    theirs = mine if history_intrinsics is None else _intrinsics(history_intrinsics, fov, len(history), "history_intrinsics", device)
    known = None
    if depth is None:
        points = frustum_points(samples, mine, near, radius)
    else:
        _check_depth(depth, len(query), "depth", device)
        points, known = depth_points(samples, mine.expand(len(query), 3, 3), depth, radius)
    if history_depth is not None:
        _check_depth(history_depth, len(history), "history_depth", device)
    bounds = 0.0, radius * (1 + 3 * SLACK)  # a camera sees all of its points
    return _project(points, known, query, history, theirs, bounds, history_depth, tolerance, reduce), known, samples


def _sphere(points: torch.Tensor, query: torch.Tensor, history: torch.Tensor, fov: tuple[float, float], radius: float,
            reduce) -> torch.Tensor:
    """Seen ``[Q, H, S]`` under the angular rule; points ``[3, S]`` in query axes, the same for all queries."""
    rotation = history[:, :3, :3]
    centre = -(rotation.mT @ history[:, :3, 3:]).squeeze(-1)  # [H, 3] in the world; a rigid inverse is a transpose
    axes = torch.stack((centre, rotation[:, 2]), 1)  # [H, 2, 3]: position and forward axis, third column of the transpose
    axes = torch.einsum("qij,haj->qhai", query[:, :3, :3], axes)
    axes[:, :, 0] += query[:, None, :3, 3]
    position, forward = axes.flatten(0, 1).unbind(1)  # [Q * H, 3] each, in query axes

    # The angular tests need no arc tangent. With h the horizontal length of the forward axis and rho that of the ray,
    #   |azimuth difference|   < half  <=>  (ray_x, ray_z) . (fwd_x, fwd_z) / h  > cos(half) * rho
    #   |elevation difference| < half  <=>  rho * h + ray_y * fwd_y              > cos(half) * |ray|
    # which also does the wrapping, since a cosine does not see full turns.
    horizontal = torch.linalg.vector_norm(forward[:, ::2], dim=-1, keepdim=True)
    azimuth = forward[:, ::2] / horizontal
    # Straight up there is no azimuth: atan2(0, 0) is 0, the query's own.
    azimuth = torch.where(horizontal == 0, torch.tensor([0.0, 1.0], dtype=torch.float64, device=azimuth.device), azimuth)
    pairs = torch.cat((position, azimuth, forward[:, 1:2], horizontal), 1).float()  # [Q * H, 7]
    limits = math.cos(math.radians(fov[0] / 2)), math.cos(math.radians(fov[1] / 2)), radius
    # On the CPU in blocks that stay in cache and below the size from which torch starts threads: a host that is busy
    # feeding a GPU would wait for them at every operation.
    seen = [reduce(_in_window(points, part, *limits)) for part in pairs.split(_rows(pairs, points.shape[-1]))]
    return torch.cat(seen).unflatten(0, (len(query), len(history)))


def _in_window(points: torch.Tensor, pairs: torch.Tensor, cos_h: float, cos_v: float, radius: float) -> torch.Tensor:
    """Which of ``points`` [3, S] each history camera of ``pairs`` [P, 7] sees: [P, S]. Buffers are reused in place."""
    px, py, pz, sin_yaw, cos_yaw, sin_pitch, cos_pitch = pairs.unsqueeze(-1).unbind(1)
    x, y, z = points[0] - px, points[1] - py, points[2] - pz  # [P, S]: rays from the history camera
    ahead = torch.mul(x, sin_yaw).addcmul_(z, cos_yaw)
    rho2 = x.mul_(x).addcmul_(z, z)
    rho = torch.rsqrt(rho2, out=z).mul_(rho2)  # not sqrt, which starts threads from 2048 elements
    # Margins, all three positive in the view; one comparison of the least costs a third of three.
    least = ahead.sub_(rho, alpha=cos_h)
    ahead = rho.mul_(cos_pitch).addcmul_(y, sin_pitch).clamp_min_(0)
    length2 = rho2.addcmul_(y, y)
    # Compared in squares, for cos_v is not negative: the vertical half angle is at most a right one.
    torch.minimum(least, ahead.mul_(ahead).sub_(length2, alpha=cos_v * cos_v), out=least)
    return torch.minimum(least, length2.neg_().add_(radius * radius), out=least) > 0


def _project(points: torch.Tensor, known: torch.Tensor | None, query: torch.Tensor, history: torch.Tensor,
             intrinsics: torch.Tensor, bounds: tuple[float, float], depth: torch.Tensor | None, tolerance: float,
             reduce) -> torch.Tensor:
    """Seen ``[Q, H, S]`` by projection; points ``[1 or Q, 3, S]`` in query axes; depth strictly within bounds."""
    rotation = query[:, :3, :3].mT
    # Query axes to history axes, scaled so that an image is -z ... z along both: relative[q, h] = K (H Q^-1).
    relative = history[None] @ _homogeneous(rotation, -(rotation @ query[:, :3, 3:]))[:, None]  # [Q, H, 4, 4]
    window = torch.zeros(len(intrinsics), 3, 3, dtype=torch.float64, device=query.device)
    window[:, 0, 0], window[:, 1, 1], window[:, 2, 2] = 2 * intrinsics[:, 0, 0], 2 * intrinsics[:, 1, 1], 1
    window[:, :2, 2] = 2 * intrinsics[:, :2, 2] - 1
    relative = (window @ relative[:, :, :3]).to(points.dtype)  # [Q, H, 3, 4]
    seen = []
    for i, pairs in enumerate(relative):
        own = points[i if len(points) > 1 else 0]
        for start in range(0, max(1, len(pairs)), step := _rows(pairs, 3 * own.shape[-1])):
            part = pairs[start : start + step]
            image = torch.baddbmm(part[..., 3:], part[..., :3], own.expand(len(part), -1, -1))  # [P, 3, S]
            z = image[:, 2]
            inside = (z > bounds[0] * (1 + SLACK)) & (z < bounds[1] * (1 - SLACK))
            if depth is not None:
                inside &= _unhidden(image, depth[start : start + step], tolerance)
            edge = (z * (1 + SLACK))[:, None]
            inside &= (image[:, :2].abs() <= edge).all(1)
            seen.append(reduce(inside if known is None else inside & known[i]))
    return torch.cat(seen).unflatten(0, (len(query), len(history)))


def _unhidden(image: torch.Tensor, depth: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Whether points ``[P, 3, S]`` (x and y within -z ... z, z) are not behind the surfaces of depth maps ``[P, h, w]``."""
    height, width = depth.shape[1:]
    at = (image[:, :2] / image[:, 2:].clamp(min=1e-9) + 1) / 2
    column, row = ((at[:, i] * n).long().clamp(0, n - 1) for i, n in ((0, width), (1, height)))
    surface = depth.flatten(1).gather(1, row * width + column).to(image.dtype)
    return ~(image[:, 2] > surface * (1 + tolerance)) | ~(surface > 0)  # NaN hides nothing


def _homogeneous(rotation: torch.Tensor, translation: torch.Tensor) -> torch.Tensor:
    pose = torch.zeros(len(rotation), 4, 4, dtype=rotation.dtype, device=rotation.device)
    pose[:, :3, :3], pose[:, :3, 3:], pose[:, 3, 3] = rotation, translation, 1
    return pose


def _rows(pairs: torch.Tensor, samples: int) -> int:
    return max(1, _BLOCK // samples) if pairs.device.type == "cpu" else max(1, len(pairs))


def _intrinsics(given, fov, count: int, name: str, device) -> torch.Tensor:
    if given is None:
        if max(fov) >= 180:
            raise ValueError(f"fov must be below 180 degrees for a pinhole view, found {tuple(fov)}; rule 'sphere' takes wider ones")
        return pinhole((float(fov[0]), float(fov[1])), device)
    if not isinstance(given, torch.Tensor) or tuple(given.shape) not in ((3, 3), (1, 3, 3), (count, 3, 3)):
        found = list(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"{name} must be a tensor [3, 3] or [{count}, 3, 3], found {found}")
    if given.device != device:
        raise ValueError(f"{name} on {given.device}, poses on {device}: move one of them")
    k = given.double().reshape(-1, 3, 3)
    if device.type == "cpu" and not (k.isfinite().all() and (k[:, [0, 1], [0, 1]] > 0).all() and (k[:, :2, 2].abs() <= 4).all()):
        raise ValueError(f"{name} must be finite, normalised by the image's size: fx / width, fy / height above 0, cx / width and "
                         "cy / height near 0.5; found pixels or another order")
    return k


def _check_depth(depth, count: int, name: str, device) -> None:
    if not isinstance(depth, torch.Tensor) or depth.ndim != 3 or len(depth) != count or not depth.is_floating_point() or 0 in depth.shape[1:]:
        found = f"{depth.dtype} {list(depth.shape)}" if isinstance(depth, torch.Tensor) else type(depth).__name__
        raise ValueError(f"{name} must be a floating tensor [{count}, height, width], one map a camera, found {found}")
    if depth.device != device:
        raise ValueError(f"{name} on {depth.device}, poses on {device}: move one of them")


def _check(query, history, rule, fov, radius, near, samples, tolerance) -> None:
    for name, poses in (("query_w2c", query), ("history_w2c", history)):
        if not isinstance(poses, torch.Tensor) or poses.ndim != 3 or tuple(poses.shape[1:]) != (4, 4):
            found = list(poses.shape) if isinstance(poses, torch.Tensor) else type(poses).__name__
            raise ValueError(f"{name} must be a tensor [frames, 4, 4] of world-to-camera matrices, found {found}")
        if not poses.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, found {poses.dtype}")
    if query.device != history.device:
        raise ValueError(f"poses on two devices, {query.device} and {history.device}: move one of them")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, found {rule!r}")
    if not (0 < fov[0] <= 360 and 0 < fov[1] <= 180):
        raise ValueError(f"fov must be (horizontal in (0, 360], vertical in (0, 180]) degrees, found {tuple(fov)}")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be a positive, finite length in pose units, found {radius}")
    if rule != "sphere" and not 0 < near < radius:
        raise ValueError(f"near must lie between 0 and radius ({radius:g}), found {near}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, found {samples}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, found {tolerance}")


@torch.library.custom_op(
    "li::view_overlap",
    mutates_args=(),
    schema="(Tensor query_w2c, Tensor history_w2c, Tensor? intrinsics=None, Tensor? history_intrinsics=None, Tensor? depth=None, "
    "Tensor? history_depth=None, *, str rule='sphere', float[] fov=[60.0, 35.0], float radius=8.0, float near=0.1, "
    "int samples=2048, float tolerance=0.05) -> Tensor",
)
def _operator(query_w2c, history_w2c, intrinsics=None, history_intrinsics=None, depth=None, history_depth=None, **view):
    """:func:`view_overlap` as ``torch.ops.li.view_overlap``, for graphs that plan on the device."""
    return view_overlap(query_w2c, history_w2c, intrinsics=intrinsics, history_intrinsics=history_intrinsics, depth=depth,
                        history_depth=history_depth, **view)


@_operator.register_fake
def _(query_w2c, history_w2c, *args, **view):
    return query_w2c.new_empty((query_w2c.shape[0], history_w2c.shape[0]), dtype=torch.float32)

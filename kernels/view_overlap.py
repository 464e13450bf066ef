"""How much of one camera's view another camera saw: deterministic, batched, on any device.

The rule is the one HY-WorldPlay retrieves its memory by and Light Interaction (arXiv 2605.31158) gates on, there called
S_FOV: points are spread uniformly in a ball around the query camera; of those inside the query's view, count the share
that is also inside the history's view. A view is an angular window about the camera's forward axis, not a pinhole
frustum: azimuth within half the horizontal field of view, elevation within half the vertical one, both measured in the
query camera's axes (so the roll of the history camera plays no part), and no farther than the ball's radius.

Two things differ from the authors' code, neither in meaning:

- The points are fixed, a low-discrepancy sequence, where theirs are drawn from the unseeded global generator, which
  makes decisions near a threshold random from run to run.
- The points are laid straight into the query's view. Theirs fill the whole ball, of which a 60 x 35 degree view holds
  5 %; the answer is a ratio over the view alone, so the other 95 % never count. The denominator is then a constant.
"""

from __future__ import annotations

import functools
import math

import torch

__all__ = ["view_overlap"]

_BLOCK = 32767  # elements an operation: one less than torch's grain size, from which it starts threads


@torch.no_grad()
def view_overlap(
    query_w2c: torch.Tensor,
    history_w2c: torch.Tensor,
    *,
    fov: tuple[float, float] = (60.0, 35.0),
    radius: float = 8.0,
    samples: int = 2048,
) -> torch.Tensor:
    """Share of each query camera's view that each history camera saw.

    Args:
        query_w2c: ``[Q, 4, 4]`` rigid world-to-camera matrices, any floating dtype. Axes: x right, z forward.
        history_w2c: ``[H, 4, 4]`` likewise, on the same device.
        fov: full horizontal and vertical angle of view in degrees; in (0, 360] and (0, 180].
        radius: how far a camera sees, in the units of the poses' translations.
        samples: points laid into each query's view. At 2048 the answer is off by 0.0025 on average over random pairs
            of cameras and by 0.01 at worst; the released code's 50,000 random points leave some 2,500 in the view,
            a standard deviation of up to 0.01.

    Returns:
        ``[Q, H]`` float32 in [0, 1] on the inputs' device; 1 for a camera and itself, 0 if the views are disjoint.
        Not symmetric in general. Invariant under one rigid motion of both sets.

    Raises:
        ValueError: a shape, device, angle, radius or sample count that does not fit; the message names it.

    Source: Light Interaction section 3.1, eq. 4 (S_pose := S_FOV); released code ``retrieval_context.py``.
    """
    _check(query_w2c, history_w2c, fov, radius, samples)
    device = query_w2c.device
    points = _view_points(samples, float(fov[0]), float(fov[1]), device) * radius  # [3, S], in query axes
    position, forward = _relative(query_w2c.double(), history_w2c.double())  # [Q, H, 3] each, in query axes

    # The angular tests need no arc tangent. With h the horizontal length of the forward axis and rho that of the ray,
    #   |azimuth difference|   < half  <=>  (ray_x, ray_z) . (fwd_x, fwd_z) / h  > cos(half) * rho
    #   |elevation difference| < half  <=>  rho * h + ray_y * fwd_y              > cos(half) * |ray|
    # which also does the wrapping, since a cosine does not see full turns.
    horizontal = torch.linalg.vector_norm(forward[..., ::2], dim=-1)
    straight_up = horizontal == 0  # no azimuth: atan2(0, 0) is 0, the query's own
    safe = torch.where(straight_up, torch.ones_like(horizontal), horizontal)
    sin_yaw = torch.where(straight_up, torch.zeros_like(safe), forward[..., 0] / safe)
    cos_yaw = torch.where(straight_up, torch.ones_like(safe), forward[..., 2] / safe)

    numbers = (*position.unbind(-1), sin_yaw, cos_yaw, forward[..., 1], horizontal)
    pairs = torch.stack([number.flatten() for number in numbers], 1).float()  # [Q * H, 7]
    # On the CPU in blocks that stay in cache and below the size from which torch starts threads: a host that is busy
    # feeding a GPU would wait for them at every operation.
    block = max(1, _BLOCK // samples) if device.type == "cpu" else max(1, len(pairs))
    limits = math.cos(math.radians(fov[0] / 2)), math.cos(math.radians(fov[1] / 2)), radius
    counts = [_count(points, part, *limits) for part in pairs.split(block)]
    return (torch.cat(counts).float() / samples).view(query_w2c.shape[0], history_w2c.shape[0])


def _count(points: torch.Tensor, pairs: torch.Tensor, cos_h: float, cos_v: float, radius: float) -> torch.Tensor:
    """How many of ``points`` [3, S] each history camera of ``pairs`` [P, 7] sees: [P]. Buffers are reused in place."""
    px, py, pz, sin_yaw, cos_yaw, sin_pitch, cos_pitch = pairs.unsqueeze(-1).unbind(1)
    x, z = points[0] - px, points[2] - pz  # [P, S]: rays from the history camera
    ahead = torch.mul(x, sin_yaw).addcmul_(z, cos_yaw)
    rho = x.hypot_(z)  # not sqrt, which starts threads from 2048 elements
    seen = ahead.sub_(rho, alpha=cos_h) > 0
    y = torch.sub(points[1], py, out=z)
    ahead = torch.mul(rho, cos_pitch, out=ahead).addcmul_(y, sin_pitch)
    length2 = rho.mul_(rho).addcmul_(y, y)
    seen &= length2 < radius * radius
    # Compared in squares, for cos_v is not negative: the vertical half angle is at most a right one.
    seen &= ahead.clamp_min_(0).mul_(ahead).sub_(length2, alpha=cos_v * cos_v) > 0
    return seen.sum(-1)


def _relative(query: torch.Tensor, history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Position and forward axis ``[Q, H, 3]`` of each history camera in each query camera's axes (float64)."""
    rotation = history[:, :3, :3]
    centre = -(rotation.mT @ history[:, :3, 3:]).squeeze(-1)  # [H, 3] in the world; a rigid inverse is a transpose
    forward = rotation[:, 2]  # third column of the transpose
    position = torch.einsum("qij,hj->qhi", query[:, :3, :3], centre) + query[:, None, :3, 3]
    return position, torch.einsum("qij,hj->qhi", query[:, :3, :3], forward)


@functools.lru_cache(maxsize=16)
def _view_points(samples: int, horizontal: float, vertical: float, device: torch.device) -> torch.Tensor:
    """``[3, samples]`` float32 points, uniform by volume in the view of the unit ball about +z.

    The R3 sequence (multiples of the powers of 1/g, g the real root of g**4 = g + 1) fills the unit cube evenly at any
    count and needs no table. The map to the ball keeps volume: cube root for the distance, sine for the elevation.
    """
    g = 1.2207440846057596
    step = torch.tensor([g**-1, g**-2, g**-3], dtype=torch.float64)
    u = (0.5 + torch.arange(1, samples + 1, dtype=torch.float64)[:, None] * step).remainder(1.0)
    azimuth = (u[:, 0] - 0.5) * math.radians(horizontal)
    sin_elevation = (2 * u[:, 1] - 1) * math.sin(math.radians(vertical / 2))
    cos_elevation = (1 - sin_elevation.square()).sqrt()
    direction = torch.stack((cos_elevation * azimuth.sin(), sin_elevation, cos_elevation * azimuth.cos()))
    return (direction * u[:, 2].pow(1 / 3)).float().to(device)


def _check(query, history, fov, radius, samples) -> None:
    for name, poses in (("query_w2c", query), ("history_w2c", history)):
        if not isinstance(poses, torch.Tensor) or poses.ndim != 3 or tuple(poses.shape[1:]) != (4, 4):
            found = list(poses.shape) if isinstance(poses, torch.Tensor) else type(poses).__name__
            raise ValueError(f"{name} must be a tensor [frames, 4, 4] of world-to-camera matrices, found {found}")
        if not poses.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, found {poses.dtype}")
    if query.device != history.device:
        raise ValueError(f"poses on two devices, {query.device} and {history.device}: move one of them")
    if not (0 < fov[0] <= 360 and 0 < fov[1] <= 180):
        raise ValueError(f"fov must be (horizontal in (0, 360], vertical in (0, 180]) degrees, found {tuple(fov)}")
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be a positive, finite length in pose units, found {radius}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, found {samples}")

"""Fixed quadratures of a camera's view: where the points lie that view overlap counts.

All points are in the camera's own axes (x right, y down, z forward). The same call gives the same points on any device;
nothing is random. Tables are cached and shared: don't write to them.
"""

from __future__ import annotations

import functools
import math

import torch

__all__ = ["ball_points", "depth_points", "frustum_points", "grid_points", "pinhole"]


def unit_points(samples: int) -> torch.Tensor:
    """``[samples, 3]`` float64 points that fill the unit cube evenly at any count.

    The R3 sequence: multiples of the powers of 1/g, g the real root of g**4 = g + 1. It needs no table.
    """
    g = 1.2207440846057596
    step = torch.tensor([g**-1, g**-2, g**-3], dtype=torch.float64)
    return (0.5 + torch.arange(1, samples + 1, dtype=torch.float64)[:, None] * step).remainder(1.0)


@functools.lru_cache(maxsize=16)
def ball_points(samples: int, horizontal: float, vertical: float, device: torch.device) -> torch.Tensor:
    """``[3, samples]`` float32, uniform by volume in the angular window of the unit ball about +z (angles in degrees).

    The map from the cube keeps volume: cube root for the distance, sine for the elevation.
    """
    u = unit_points(samples)
    azimuth = (u[:, 0] - 0.5) * math.radians(horizontal)
    sin_elevation = (2 * u[:, 1] - 1) * math.sin(math.radians(vertical / 2))
    cos_elevation = (1 - sin_elevation.square()).sqrt()
    direction = torch.stack((cos_elevation * azimuth.sin(), sin_elevation, cos_elevation * azimuth.cos()))
    return (direction * u[:, 2].pow(1 / 3)).float().to(device)


@functools.lru_cache(maxsize=16)
def _image_points(samples: int, near: float, far: float, device: torch.device) -> torch.Tensor:
    """``[3, samples]`` float32 rows (u, v, z): uniform over the image in 0 ... 1, log-uniform in depth."""
    u = unit_points(samples)
    return torch.stack((u[:, 0], u[:, 1], near * (far / near) ** u[:, 2])).float().to(device)


def frustum_points(samples: int, intrinsics: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """``[N, 3, samples]`` float32 points of N pinhole frusta with intrinsics ``[N, 3, 3]``, as :func:`_image_points`."""
    return _unproject(_image_points(samples, near, far, intrinsics.device)[None], intrinsics)


def depth_points(samples: int, intrinsics: torch.Tensor, depth: torch.Tensor, far: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on the surfaces that N depth maps show, and which of them are real.

    Args:
        intrinsics: ``[N, 3, 3]``. depth: ``[N, h, w]``, z in pose units; beyond far (sky): put at far; zero, negative
            or NaN: no surface known there.

    Returns:
        float32 ``[N, 3, samples]``; bool ``[N, samples]``, false where no surface is known.
    """
    pixels = _image_points(samples, 1.0, far, depth.device)[:2]
    row, column = (pixels[1] * depth.shape[1]).long(), (pixels[0] * depth.shape[2]).long()
    z = depth[:, row, column].float()
    known = z > 0  # false for NaN
    z = torch.where(known, z.clamp(max=far), torch.ones_like(z))
    return _unproject(torch.cat((pixels.expand(len(z), 2, -1), z[:, None]), 1), intrinsics), known


@functools.lru_cache(maxsize=4)
def grid_points(near: float, far: float, device: torch.device) -> torch.Tensor:
    """``[1, 3, 1000]`` float64: Matrix-Game-3.0's 10 x 10 x 10 lattice of a 90 degree view, edges and both ends included."""
    z, side = torch.linspace(near, far, 10, dtype=torch.float64), torch.linspace(-1, 1, 10, dtype=torch.float64)
    x, y, z = torch.meshgrid(side, side, z, indexing="ij")
    return torch.stack((x * z, y * z, z)).reshape(1, 3, -1).to(device)


def pinhole(fov: tuple[float, float], device: torch.device) -> torch.Tensor:
    """Intrinsics ``[1, 3, 3]`` float64, normalised by the image's size, of a centred pinhole with this field of view."""
    focal = [0.5 / math.tan(math.radians(angle / 2)) for angle in fov]
    return torch.tensor([[[focal[0], 0, 0.5], [0, focal[1], 0.5], [0, 0, 1]]], dtype=torch.float64, device=device)


def _unproject(image: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Rows (u, v, z) ``[1 or N, 3, S]`` to points ``[N, 3, S]`` float32."""
    focal_x, focal_y, centre_x, centre_y = (intrinsics[:, i, j, None].float() for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    z = image[:, 2]
    return torch.stack(((image[:, 0] - centre_x) / focal_x * z, (image[:, 1] - centre_y) / focal_y * z, z.expand(len(focal_x), -1)), 1)

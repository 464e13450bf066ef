"""Camera poses as they come from a user: checked before anything is decided from them."""

from __future__ import annotations

from typing import Any

import torch

from li_compile.errors import PoseError

__all__ = ["check_poses"]


def check_poses(w2c: Any, name: str, *, multiple: int = 1, first: int = 0) -> torch.Tensor:
    """Poses as float64 ``[N, 4, 4]`` on the CPU, known to be finite and rigid.

    Args:
        w2c: world-to-camera matrices; a tensor or anything that ``torch.as_tensor`` takes.
        name: what to call them in an error. first: number of the first frame, for errors.
        multiple: N must be a multiple of this.

    Raises:
        PoseError: what is wrong, in which frame, and what to do.
    """
    try:
        given = torch.as_tensor(w2c)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PoseError(f"{name} poses are {type(w2c).__name__}, not an array of [frames, 4, 4]: {error}") from None
    if given.ndim != 3 or tuple(given.shape[1:]) != (4, 4):
        raise PoseError(
            f"{name} poses have the shape {list(given.shape)}; give [frames, 4, 4] world-to-camera matrices "
            "(one sample at a time: drop the batch dimension)"
        )
    if given.shape[0] % multiple:
        raise PoseError(
            f"{given.shape[0]} {name} poses are no whole number of chunks of {multiple} latents; give a pose a latent "
            "(not one a video frame), whole chunks only, or set context.chunk_frames"
        )
    poses = given.detach().to("cpu", torch.float64)
    # Half-precision poses are off by rounding alone: up to 2**-8 an entry in bfloat16.
    tolerance = 3e-2 if given.dtype in (torch.bfloat16, torch.float16) else 1e-3
    x, y, z = poses[:, :3, :3].unbind(1)
    skew = (poses[:, :3, :3] @ poses[:, :3, :3].mT - _identity(3)).abs().amax((1, 2))
    last_row = (poses[:, 3] - _identity(4)[3]).abs().amax(1)
    right_handed = (torch.linalg.cross(x, y) * z).sum(1)
    fine = (skew <= tolerance) & (last_row <= tolerance) & (right_handed > 0) & poses[:, :3, 3].isfinite().all(1)
    if not bool(fine.all()):
        _complain(poses, name, first, int((~fine).nonzero()[0]), tolerance, skew, last_row)
    return poses


def _identity(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def _complain(poses: torch.Tensor, name: str, first: int, frame: int, tolerance: float, skew: torch.Tensor,
              last_row: torch.Tensor) -> None:
    if not poses[frame].isfinite().all():
        raise PoseError(f"{name} pose of frame {first + frame} has values that are not finite; check what made it")
    if last_row[frame] > tolerance:
        what = "its last row is not (0, 0, 0, 1)"
    elif skew[frame] > tolerance:
        what = f"its rotation is off orthonormal by {float(skew[frame]):.2g}"
    else:
        what = "it mirrors"
    raise PoseError(
        f"{name} pose of frame {first + frame} is no rigid motion: {what}; give [R | t; 0 1] without scale "
        "(intrinsics are not part of it)"
    )

"""Where the demo's trajectories come from: a name, a file, or typed keys; all checked before anything is computed."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import zipfile
import zlib

import torch

from li_compile.errors import LightInteractionError, PoseError
from li_compile.policy import check_poses

from . import keys
from .data import Trajectory, load_trajectory, trajectory_folder

CHUNK = 4  # frames generated together
MOST = 16  # chunks; the model was not trained for longer walks
SIZE = (96, 128)  # of a frame, pixels


class TrajectoryError(LightInteractionError, ValueError):
    """A trajectory that is unknown, cannot be read, or does not fit the model."""


def names() -> list[str]:
    return sorted(path.stem for path in trajectory_folder().glob("*.npz"))


def load(spec: str, chunks: int | None = None) -> Trajectory:
    """The trajectory that ``spec`` means: one of ``names()``, a path to an .npz, or typed keys (see keys.py).

    chunks: play only so many. Frames are [T, 96, 128, 3] with the ground truth, [1, 96, 128, 3] for typed keys, which
    start where ``revisit`` does. Raises TrajectoryError, KeysError or PoseError.
    """
    if spec in names():
        trajectory = _read(trajectory_folder() / f"{spec}.npz")
    elif spec.endswith(".npz") or "/" in spec:
        trajectory = _read(pathlib.Path(spec).expanduser())
    else:
        trajectory = _typed(spec)
    return _cut(trajectory, chunks)


def has_truth(trajectory: Trajectory) -> bool:
    """Whether there is a rendered frame for each pose."""
    return len(trajectory.frames) == len(trajectory.action)


def _typed(text: str) -> Trajectory:
    try:
        actions = keys.parse(text)
    except keys.KeysError as error:
        near = difflib.get_close_matches(text, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise keys.KeysError(f"--trajectory {text!r} is none of {', '.join(names())}, no path to an .npz, and no keys. "
                             f"{hint}As keys: {error}") from None
    most = MOST * CHUNK - 1
    if len(actions) > most:
        raise keys.KeysError(f"{len(actions)} keys were typed; at most {most} fit into {MOST} chunks of {CHUNK} frames "
                             "(frame 0 is given)")
    frames = max(2 * CHUNK, -(-(1 + len(actions)) // CHUNK) * CHUNK)
    actions += [0] * (frames - 1 - len(actions))  # stand still to the end of the last chunk
    start = _read(trajectory_folder() / "revisit.npz")
    w2c = keys.integrate(start.w2c[0].numpy(), actions)
    return Trajectory("keys", start.frames[:1], torch.from_numpy(w2c), start.intrinsics, torch.tensor([0, *actions]),
                      start.level, "keys", start.split)


def _read(path: pathlib.Path) -> Trajectory:
    try:
        trajectory = load_trajectory(path)
    except FileNotFoundError:
        raise TrajectoryError(f"there is no file {path}; known trajectories are {', '.join(names())}") from None
    except (OSError, ValueError, KeyError, IndexError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise TrajectoryError(f"{path} cannot be read as a trajectory ({type(error).__name__}: {error}); "
                              "render.py writes such files") from error
    return _checked(trajectory, path)


def _checked(trajectory: Trajectory, path: pathlib.Path) -> Trajectory:
    count = len(trajectory.frames)
    if not len(trajectory.w2c) == len(trajectory.action) == count:
        raise PoseError(f"{path} holds {count} frames, {len(trajectory.w2c)} poses and {len(trajectory.action)} actions; "
                        "give one pose and one action a frame")
    if trajectory.frames.shape[1:] != (*SIZE, 3):
        raise TrajectoryError(f"{path} holds frames of {list(trajectory.frames.shape[1:])}; give {[*SIZE, 3]}")
    if trajectory.intrinsics.shape != (3, 3) or not bool(trajectory.intrinsics.isfinite().all()):
        raise TrajectoryError(f"{path}: K must be one finite [3, 3] matrix, normalised by the image size")
    actions = trajectory.action
    if actions.is_floating_point() or actions.ndim != 1 or bool(((actions < 0) | (actions > 80)).any()):
        raise TrajectoryError(f"{path}: actions must be whole numbers 0 ... 80, one a frame")
    check_poses(trajectory.w2c, f"{path.name}'s")
    return trajectory


def _cut(trajectory: Trajectory, chunks: int | None) -> Trajectory:
    whole, rest = divmod(len(trajectory.action), CHUNK)
    if rest:
        raise TrajectoryError(f"{trajectory.name} holds {len(trajectory.action)} frames; give a multiple of {CHUNK}, the "
                              "frames of a chunk")
    if chunks is None and whole > MOST:
        raise TrajectoryError(f"{trajectory.name} holds {whole} chunks; at most {MOST} are played, so give --chunks {MOST}")
    if whole < 2 or (chunks or 0) > whole:
        raise TrajectoryError(f"{trajectory.name} holds {whole} chunks, {chunks or 2} are needed"
                              + (f"; give --chunks {whole} or fewer" if whole >= 2 else ""))
    end = (chunks or whole) * CHUNK
    keep = lambda x: x[:end]
    return dataclasses.replace(trajectory, frames=keep(trajectory.frames), w2c=keep(trajectory.w2c).float(),
                               action=keep(trajectory.action))

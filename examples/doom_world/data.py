"""Reading Doom World's data: the packed training set and the single demo trajectories."""

from __future__ import annotations

import dataclasses
import io
import pathlib

import numpy as np
import torch
from torch import Tensor


def decode_image(data: bytes) -> np.ndarray:
    """WebP bytes -> uint8 [H, W, 3]."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@dataclasses.dataclass
class Trajectory:
    """One first-person trajectory: frames uint8 [T, H, W, 3], w2c float32 [T, 4, 4], K [3, 3], action int64 [T]."""

    name: str
    frames: np.ndarray | None
    w2c: Tensor
    intrinsics: Tensor
    action: Tensor
    level: str = ""
    kind: str = ""
    split: str = ""


def load_trajectory(path: str | pathlib.Path) -> Trajectory:
    """Read a demo trajectory as written by ``render.py`` (an .npz holding WebP bytes, poses and labels)."""
    path = pathlib.Path(path)
    with np.load(path, allow_pickle=False) as z:
        data, offset = z["webp"].tobytes(), z["offset"]
        frames = np.stack([decode_image(data[a:b]) for a, b in zip(offset[:-1], offset[1:])])
        return Trajectory(path.stem, frames, torch.from_numpy(z["w2c"]), torch.from_numpy(z["K"]),
                          torch.from_numpy(z["action"]), str(z["level"]), str(z["kind"]), str(z["split"]))


def trajectory_folder() -> pathlib.Path:
    return pathlib.Path(__file__).parent / "trajectories"

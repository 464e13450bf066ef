"""The pictures of docs/gallery.md: Doom World dense and accelerated, free-running, beside the rendered truth.

    python benchmarks/gallery.py

Nothing is timed and nothing goes through Inductor: what is shown is what the rewrites do to the picture.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import numpy as np
import torch
import typer

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from doom_world import media  # noqa: E402
from doom_world.data import load_trajectory, trajectory_folder  # noqa: E402
from doom_world.model import ChunkSampler  # noqa: E402
from doom_world.rollout import FOV, rollout  # noqa: E402
from doom_world.weights import load_world  # noqa: E402
from PIL import Image  # noqa: E402


def main(trajectory: str = "revisit", chunks: int = 16, out: pathlib.Path = ROOT / "docs" / "gallery", quality: int = 55) -> None:
    model, codec = load_world()
    film = load_trajectory(trajectory_folder() / f"{trajectory}.npz")
    count = chunks * model.config.chunk
    film = dataclasses.replace(film, **{name: getattr(film, name)[:count] for name in ("frames", "w2c", "action")})
    frames = torch.from_numpy(np.ascontiguousarray(film.frames)).permute(0, 3, 1, 2).float().div(255)
    sampler = ChunkSampler(model)
    fast = torch.compile(sampler, backend="light_interaction", options={"preset": "all", "context.fov": FOV, "lowering": "eager"})
    shown = {"rendered truth": film.frames}
    with torch.no_grad():
        truth = codec.encode(frames)
        for name, run in {"dense": sampler, "accelerated (all)": fast}.items():
            latents = rollout(model, run, truth, film.w2c, film.intrinsics, film.action)
            shown[name] = (codec.decode(latents) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    out.mkdir(parents=True, exist_ok=True)
    media.contact_sheet(out / f"{trajectory}_sheet.webp", shown, every=4)
    pictures = [Image.fromarray(frame) for frame in media.side_by_side(shown, upscale=2)]
    pictures[0].save(out / f"{trajectory}.webp", save_all=True, append_images=pictures[1:], duration=115, loop=0, quality=quality, method=6)


if __name__ == "__main__":
    typer.run(main)

"""Inputs for a look at Doom World's graphs: ``li-compile explain doom_world.example:chunk``."""

from __future__ import annotations

import torch

from .data import load_trajectory, trajectory_folder
from .model import ChunkSampler, WorldConfig, WorldModel


def chunk(context: int = 20, regional: bool = True) -> tuple[torch.nn.Module, tuple]:
    """(whole-chunk function, its arguments) of an untrained model, after so many context frames of ``revisit``."""
    config = WorldConfig()
    film = load_trajectory(trajectory_folder() / "revisit.npz")
    model = WorldModel(config, regional).eval()
    size = (1, config.channels, config.chunk, config.height, config.width)
    now = slice(context, context + config.chunk)
    with torch.no_grad():
        text = model.prefix(torch.randn(1, config.channels, config.height, config.width))
    prompt = torch.zeros(1, config.channels + 1, *size[2:])
    past = (torch.randn(1, config.channels, context, *size[3:]), film.action[None, :context], film.w2c[None, :context])
    return ChunkSampler(model), (torch.randn(size), prompt, film.action[None, now], film.w2c[None, now],
                                 film.intrinsics[None], *text, *past)

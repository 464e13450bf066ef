"""The image codec of Doom World: frames 96 x 128 to latents of 16 channels at 12 x 16, frame by frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Codec(nn.Module):
    """Convolutional autoencoder, 8x down in space; latents are normalised to unit variance a channel."""

    def __init__(self, channels: int = 16, width: int = 32):
        super().__init__()
        w = width
        self.encoder = nn.Sequential(
            nn.Conv2d(3 * 4, w, 3, padding=1), Residual(w),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1), Residual(2 * w),
            nn.Conv2d(2 * w, 3 * w, 4, stride=2, padding=1), Residual(3 * w), nn.Conv2d(3 * w, channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 3 * w, 3, padding=1), Residual(3 * w), Residual(3 * w),
            nn.Conv2d(3 * w, 4 * 2 * w, 3, padding=1), nn.PixelShuffle(2), Residual(2 * w), Residual(2 * w),
            nn.Conv2d(2 * w, 4 * w, 3, padding=1), nn.PixelShuffle(2), Residual(w), Residual(w),
            nn.Conv2d(w, 3 * 4, 3, padding=1), nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def encode_raw(self, frames: Tensor) -> Tensor:
        return self.encoder(F.pixel_unshuffle(frames * 2 - 1, 2))

    def decode_raw(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * 0.5 + 0.5

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames [N, 3, H, W] in 0..1 -> normalised latents [N, channels, H/8, W/8]."""
        return (self.encode_raw(frames) - self.mean[:, None, None]) / self.std[:, None, None]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [N, channels, h, w] -> frames [N, 3, 8h, 8w] in 0..1."""
        return self.decode_raw(latents * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)

"""HY-WorldPlay's video decoder beside the rollout: each chunk is decoded as soon as its latents are final.

Upstream's causal decoder takes one latent at a time and keeps features of earlier ones, so that decoding chunk by chunk gives
the frames that decoding everything at the end gives. On a GPU it runs in a stream of its own.
"""

from __future__ import annotations

import contextlib

import torch


def can_stream(vae) -> bool:
    """Whether it is the causal decoder with its cache, and decodes whole pictures."""
    return all(hasattr(vae, name) for name in ("decoder", "clear_cache", "config")) and not getattr(vae, "use_spatial_tiling", False)


class StreamedDecoding:
    def __init__(self, pipeline) -> None:
        self.pipeline, self.vae, self.whole = pipeline, pipeline.vae, pipeline.vae.decode
        self.latents: list[torch.Tensor] = []
        self.frames: list[torch.Tensor] = []
        self.stream: torch.cuda.Stream | None = None

    def add(self, latents: torch.Tensor, first: bool) -> None:
        """Decode final latents [1, C, n, H, W], the next of a video or the first of one."""
        if first:
            self.latents, self.frames = [], []
            self.vae.clear_cache()
        config = self.vae.config
        z = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        with self._beside(z):
            for i in range(z.shape[2]):
                self.vae._conv_idx = [0]
                start = {"first_chunk": True} if first and i == 0 else {}
                self.frames.append(self.vae.decoder(z[:, :, i:i + 1], feat_cache=self.vae._feat_map, feat_idx=self.vae._conv_idx, **start))
        self.latents.append(z)

    @contextlib.contextmanager
    def _beside(self, z: torch.Tensor):
        pipe = self.pipeline
        cast = torch.autocast("cuda", dtype=pipe.vae_dtype, enabled=pipe.vae_autocast_enabled)
        if not z.is_cuda:
            with cast:
                yield
            return
        self.stream = self.stream or torch.cuda.Stream(z.device)
        self.stream.wait_stream(torch.cuda.current_stream(z.device))
        z.record_stream(self.stream)
        with torch.cuda.stream(self.stream), cast:
            yield

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator=None):
        """``vae.decode``: the frames decoded already, if these are the latents that they were decoded from."""
        done, self.latents = self.latents, []
        if return_dict or not done or sum(d.shape[2] for d in done) != z.shape[2] or not torch.equal(torch.cat(done, 2), z):
            return self.whole(z, return_dict=return_dict, generator=generator)
        frames, self.frames = self.frames, []
        self.vae.clear_cache()
        if self.stream is not None:
            torch.cuda.current_stream(z.device).wait_stream(self.stream)
            for f in frames:
                f.record_stream(torch.cuda.current_stream(z.device))
        return (torch.cat(frames, 2),)

"""Playing Doom World: chunk after chunk, with the context that upstream's own retrieval would choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from li_compile.config import Config
from li_compile.errors import PoseError
from li_compile.policy import plan_context

from .model import WorldConfig, WorldModel

FOV = (90.0, 70.0)  # degrees, horizontal and vertical, of the rendered frames

# What the model was trained with, before anything is accelerated: 20 latents, 12 of them the newest (upstream's rule).
RETRIEVAL = Config.from_options({"preset": "context", "context.policy": "authors", "context.memory_frames": 20,
                                 "context.temporal_frames": 12, "context.threshold": 0.0, "context.fov": FOV})


def first_prompt(image: Tensor, config: WorldConfig) -> Tensor:
    """Prompt of the first chunk: image latent [B, C, H, W] given in frame 0 -> [B, C + 1, chunk, H, W]."""
    batch, channels, height, width = image.shape
    prompt = image.new_zeros(batch, channels + 1, config.chunk, height, width)
    prompt[:, :channels, 0] = image
    prompt[:, channels, 0] = 1
    return prompt


@torch.no_grad()
def play(model: WorldModel, sampler: Callable[..., Tensor], truth: Tensor, w2c: Tensor, intrinsics: Tensor,
         action: Tensor, teacher_forced: bool = False, seed: int = 0,
         dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Generate a trajectory, chunk by chunk: the latents so far, [T, C, H, W], after each chunk (always one tensor).

    truth: latents [T, C, H, W] of the rendered frames, or [1, C, H, W]; only frame 0 is used, as the prompt image,
    unless teacher_forced, where the context of each chunk is the truth. w2c [T, 4, 4]; intrinsics [3, 3]; action [T];
    T a multiple of the chunk. sampler: a ``ChunkSampler``, compiled or not. Frame 0 becomes the prompt image.
    """
    config, device = model.config, truth.device
    dtype = dtype or next(model.parameters()).dtype
    frames = w2c.shape[0]
    if frames % config.chunk:
        raise PoseError(f"the trajectory has {frames} frames; give a multiple of {config.chunk}")
    if action.shape[0] != frames or truth.shape[0] < (frames if teacher_forced else 1):
        raise PoseError(f"{frames} poses, {action.shape[0]} actions and {truth.shape[0]} true frames were given; give one "
                        "of each a frame (of true frames, the first alone is enough unless teacher-forced)")
    generator = torch.Generator("cpu").manual_seed(seed)
    truth = truth.contiguous()  # one layout for either source of context, or the compiled sampler is compiled again
    image = truth[:1]
    text = [t.to(dtype) for t in model.prefix(image.to(dtype))]
    camera = w2c.float()
    poses = camera.cpu()
    k = intrinsics.float()[None]
    done = torch.empty(frames, *truth.shape[1:], device=device)
    for s in range(0, frames, config.chunk):
        now = slice(s, s + config.chunk)
        noise = torch.randn(1, config.channels, config.chunk, *truth.shape[-2:], generator=generator).to(device, dtype)
        prompt = first_prompt(image, config) if s == 0 else image.new_zeros(1, config.channels + 1, config.chunk, *truth.shape[-2:])
        args = [noise, prompt.to(dtype), action[None, now], camera[None, now], k, *text]
        if s:
            chosen = torch.tensor(plan_context(poses[:s], poses[now], RETRIEVAL).indices, device=device)
            source = truth if teacher_forced else done
            args += [source[chosen].transpose(0, 1)[None].to(dtype), action[chosen][None], camera[chosen][None]]
        done[now] = sampler(*args)[0].transpose(0, 1).float()
        if s == 0:
            done[0] = image[0]
        yield done


def rollout(*args, **options) -> Tensor:
    """``play`` to the end, with the same arguments: latents [T, C, H, W]."""
    *_, done = play(*args, **options)
    return done

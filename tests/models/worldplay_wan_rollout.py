"""The reduced Wan kind of HY-WorldPlay with the pipeline around it that its family meets: one chunk a call, its state kept in between,
all of our own code, under upstream's names.

Written from a description of what is computed, not from the code.
"""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor

from li_compile import Config
from li_compile.patterns.families.hy_wan_rollout import MODEL, PIPELINE
from li_compile.policy import plan_context

from . import worldplay_wan as wan
from .parts import DIM
from .worldplay_rollout import Scheduler

CHUNK, LENGTH, LATENTS = 4, 16, 64  # of a chunk; of history, up to which all of it is context; of the video
LATENT = (wan.CHANNELS, 2 * wan.ROWS, 2 * wan.COLUMNS)
UPSTREAM = Config.from_options({"preset": "context", "context.policy": "authors", "context.memory_frames": 16, "context.temporal_frames": 12,
                                "context.anchor_frames": 0, "context.threshold": 0.0})


def select_mem_frames_wan(w2c_list, current_frame_idx, memory_frames, temporal_context_size, pred_latent_size, points_local=None, device=None):
    assert (memory_frames, temporal_context_size, pred_latent_size) == (16, 12, CHUNK)
    poses = torch.as_tensor(w2c_list, dtype=torch.float64)
    return list(plan_context(poses[:current_frame_idx], poses[current_frame_idx:current_frame_idx + CHUNK], UPSTREAM).indices)


class Pipeline:
    def __init__(self, transformer: torch.nn.Module):
        self.transformer, self.scheduler, self.ctx = transformer, Scheduler(), None
        self.parallel_run, self.points_local, self.interrupted = False, None, False

    def set_times(self, count: int) -> Tensor:
        self.scheduler.set_timesteps(count)
        return torch.cat([self.scheduler.timesteps, torch.zeros(1)])

    def begin(self, latents, prompt_embeds, count, few_step, first_chunk_size, image_path, context_window_length):
        frames = latents.shape[2]
        self.ctx = dict(
            latents=latents.clone(), prompt_embeds=prompt_embeds, viewmats=torch.zeros(1, frames, 4, 4), Ks=torch.zeros(1, frames, 3, 3),
            action=torch.zeros(1, frames), first=first_chunk_size, image=None, length=context_window_length, few_step=few_step,
            timesteps=torch.tensor([1000.0, 960.0, 888.9, 727.3, 0.0]) if few_step else self.set_times(count), count=count,
            kv_cache=[{"k": None, "v": None} for _ in self.transformer.blocks])
        if image_path is not None:  # what the image encoder makes of it
            self.ctx["image"] = torch.randn(latents[:, :, :1].shape, generator=torch.Generator().manual_seed(len(image_path)))
            self.ctx["latents"][:, :, :1] = self.ctx["image"]

    @torch.no_grad()
    def __call__(self, latents=None, prompt_embeds=None, num_inference_steps=4, callback_on_step_end=None, few_step=False, first_chunk_size=1,
                 image_path=None, viewmats=None, Ks=None, action=None, use_memory=True, context_window_length=None, chunk_i=0):
        if chunk_i == 0:
            self.begin(latents, prompt_embeds, num_inference_steps, few_step, first_chunk_size, image_path, context_window_length)
        ctx, start, self.interrupted = self.ctx, CHUNK * chunk_i, False
        for name, x in (("viewmats", viewmats), ("Ks", Ks), ("action", action)):
            ctx[name][:, start:start + CHUNK] = x
        if chunk_i and not ctx["few_step"]:
            self.set_times(ctx["count"])
        chosen = list(range(start)) if use_memory else None
        if use_memory and chunk_i and start >= ctx["length"]:
            chosen = select_of(self)(ctx["viewmats"][0].numpy(), start, memory_frames=16, temporal_context_size=12, pred_latent_size=CHUNK,
                                     points_local=self.points_local, device="cpu")
        stop = start + (CHUNK if chunk_i else ctx["first"])
        x, levels = ctx["latents"][:, :, :stop].to(ctx["prompt_embeds"].dtype).clone(), ctx["timesteps"] / 1000
        held = 1 if chunk_i == 0 and ctx["image"] is not None else 0  # latents of the chunk that are the image's
        caches = ctx["kv_cache"]
        for i, t in enumerate(ctx["timesteps"][:-1]):
            if self.interrupted:
                continue
            if chunk_i and i == 0:
                caches = ctx["kv_cache"] = self.call(x, chosen, torch.full((len(chosen),), 14.0), 0, caches, True)
            now = list(range(start, stop))
            times = torch.full((len(now),), float(t))
            times[:held] = 14.0
            velocity, current = self.call(x, now, times, len(chosen), caches, False)[0], x[:, :, start:]
            new = current + (levels[i + 1] - levels[i]) * velocity if ctx["few_step"] else self.scheduler.step(velocity, t, current)[0]
            x[:, :, start + held:] = new[:, :, held:]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {})
        ctx["latents"][:, :, :stop] = x
        return None, None

    def call(self, x, frames, times, before, caches, keep):
        ctx = self.ctx
        return self.transformer(
            hidden_states=x[:, :, frames].to(self.transformer.dtype), timestep=times, encoder_hidden_states=ctx["prompt_embeds"],
            current_start=before * wan.TOKENS, current_end=(before + len(frames)) * wan.TOKENS, kv_cache=caches, is_cache=keep,
            window_frames=ctx["latents"].shape[2], **{name: ctx[name][:, frames] for name in ("viewmats", "Ks", "action")})


def select_of(pipeline):
    """As upstream looks it up: in the module of its pipeline."""
    return sys.modules[PIPELINE.rpartition(".")[0]].select_mem_frames_wan


def install(monkeypatch) -> tuple[type[torch.nn.Module], type[Pipeline]]:
    """Both classes under upstream's names, in modules of upstream's names, for one test."""
    place, _, name = MODEL.rpartition(".")
    monkeypatch.setitem(sys.modules, place, wan)
    transformer = type(name, (wan.WanWorld,), {"__module__": place})
    place, _, name = PIPELINE.rpartition(".")
    module = types.ModuleType(place)
    module.select_mem_frames_wan, module.CHUNK_SIZE = select_mem_frames_wan, CHUNK
    monkeypatch.setitem(sys.modules, place, module)
    pipeline = type(name, (Pipeline,), {"__module__": place})
    setattr(module, name, pipeline)
    return transformer, pipeline


def pipeline(monkeypatch, depth: int = wan.DEPTH) -> Pipeline:
    """A pipeline with random weights, the same each time."""
    transformer, kind = install(monkeypatch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(transformer(depth).eval().requires_grad_(False))


def inputs(poses: Tensor, latent=LATENT, words=(wan.WORDS, DIM), seed: int = 0) -> tuple[dict, dict]:
    """(what every call is given, what each is given its chunk of): along these poses [n, 4, 4], of latents of this [C, H, W]."""
    g, frames = torch.Generator().manual_seed(seed), len(poses)
    common = dict(latents=torch.randn(1, latent[0], frames, *latent[1:], generator=g), prompt_embeds=torch.randn(1, *words, generator=g), few_step=True,
                  first_chunk_size=CHUNK, use_memory=True, context_window_length=LENGTH)
    return common, dict(viewmats=poses[None].float(), Ks=torch.tensor([[0.505, 0, 0.5], [0, 0.898, 0.5], [0, 0, 1]]).repeat(1, frames, 1, 1),
                        action=torch.randint(0, 81, (1, frames), generator=g).float())

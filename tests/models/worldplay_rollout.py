"""The reduced HY-WorldPlay with everything around it that its family meets: upstream's calling convention, the text streams, the
scheduler and a pipeline with an autoregressive rollout, all of our own code, under upstream's names.

Written from a description of what is computed, not from the code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from li_compile import Config
from li_compile.patterns.families.hy_worldplay import MODEL, PIPELINE
from li_compile.policy import plan_context

from .worldplay import Block, Mlp, RMSNorm, Size, WorldPlay, rope_table, sinusoid

SIZE = Size(depth=2, height=4, width=4)
TEXT, GLYPHS, PATCHES, WIDTH = 10, 3, 9, 24
CHUNK, STEPS = 4, 4


class DoubleBlock(Block):
    """The vision block with a text stream beside it, which attends to itself only."""

    def __init__(self, size: Size):
        super().__init__(size)
        c, d = size.channels, size.head_dim
        self.txt_mod, self.txt_qkv, self.txt_out, self.txt_mlp = nn.Linear(c, 6 * c), nn.Linear(c, 3 * c), nn.Linear(c, c), Mlp(c)
        self.txt_q_norm, self.txt_k_norm = RMSNorm(d), RMSNorm(d)

    @property
    def img_attn_prope_proj(self):
        return self.camera_out

    def text(self, x: Tensor, vec: Tensor):
        """x [1, T, C], vec [1, C]; returns x and its keys and values [1, H, T, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.txt_mod(F.silu(vec))[:, None].chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        q, k, v = self.txt_qkv(h).unflatten(-1, (3, self.size.heads, -1)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (self.txt_q_norm(q), self.txt_k_norm(k), v))
        x = x + gate1 * self.txt_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.txt_mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2), k, v


class Transformer(WorldPlay):
    def __init__(self, size: Size = SIZE):
        super().__init__(size, block=DoubleBlock)
        self.double_blocks, self.action_in = self.blocks, self.action
        self.attn_param = {"win_type": "fixed"}
        self.txt_in, self.byt5_in, self.vision_in = (nn.Linear(WIDTH, size.channels) for _ in range(3))

    def get_rotary_pos_embed(self, sizes):
        assert tuple(sizes[1:]) == (self.size.height, self.size.width)
        return rope_table(self.size, sizes[0])

    def forward(self, bi_inference=True, ar_txt_inference=False, ar_vision_inference=False, **given):
        if bi_inference:
            raise NotImplementedError("the reduced model is autoregressive")
        return self.forward_txt(**given) if ar_txt_inference else self.forward_vision(**given)

    def forward_txt(self, timestep_txt, text_states, encoder_attention_mask, vision_states, extra_kwargs, **_):
        states = ((vision_states, self.vision_in, torch.ones(vision_states.shape[:2])),
                  (extra_kwargs["byt5_text_states"], self.byt5_in, extra_kwargs["byt5_text_mask"]), (text_states, self.txt_in, encoder_attention_mask))
        x = torch.cat([embed(s)[mask.bool()] for s, embed, mask in states])[None]
        vec, cache = self.time(sinusoid(timestep_txt)), []
        for block in self.blocks:
            x, k, v = block.text(x, vec)
            cache.append({"k_vision": None, "v_vision": None, "k_txt": k, "v_txt": v})
        return cache

    def forward_vision(self, hidden_states, timestep, action, viewmats, Ks, kv_cache, cache_vision=False, rope_temporal_size=4,
                       start_rope_start_idx=0, freqs_cos=None, freqs_sin=None, **_):
        self.attn_param["thw"] = [hidden_states.shape[2], self.size.height, self.size.width]
        cache = [{"k": e["k_vision"], "v": e["v_vision"], "k_text": e["k_txt"], "v_text": e["v_txt"]} for e in kv_cache]
        out = super().forward(hidden_states, timestep, action, viewmats, Ks, cache, cache_vision, rope_temporal_size, start_rope_start_idx,
                              None if freqs_cos is None else (freqs_cos, freqs_sin))
        if not cache_vision:
            return out, None
        return [{"k_vision": e["k"], "v_vision": e["v"], "k_txt": e["k_text"], "v_txt": e["v_text"]} for e in out]


class Scheduler:
    """Flow matching, Euler, shift 5; finds out where it is from the time it is given, unless told."""

    order = 1

    def __init__(self):
        self.begin = self.index = None
        self.set_timesteps(STEPS)

    def set_timesteps(self, count, device=None):
        levels = torch.linspace(1, 0, count + 1)
        self.sigmas = 5 * levels / (1 + 4 * levels)
        self.timesteps, self.index = (1000 * self.sigmas[:-1]).to(device), None

    def set_begin_index(self, index=0):
        self.begin = index

    def step(self, velocity, time, x, return_dict=True):
        if self.index is None:
            self.index = int((self.timesteps == time).nonzero()) if self.begin is None else self.begin
        self.index += 1
        return (x.float() + velocity.float() * (self.sigmas[self.index] - self.sigmas[self.index - 1]),)


UPSTREAM = Config.from_options({"preset": "context", "context.policy": "authors", "context.memory_frames": 20, "context.temporal_frames": 12,
                                "context.threshold": 0.0})


def select_aligned_memory_frames(w2c_list, current_frame_idx, memory_frames, temporal_context_size, pred_latent_size, points_local=None, device=None):
    assert (memory_frames, temporal_context_size, pred_latent_size) == (20, 12, 4)
    poses = torch.as_tensor(w2c_list, dtype=torch.float64)
    return list(plan_context(poses[:current_frame_idx], poses[current_frame_idx:current_frame_idx + 4], UPSTREAM).indices)


class Pipeline:
    def __init__(self, transformer: Transformer, chunks: int):
        self.transformer, self.scheduler, self.guidance_scale = transformer, Scheduler(), 1.0
        self.chunk_num, self.chunk_latent_frames, self.num_inference_steps = chunks, CHUNK, STEPS
        self.target_dtype, self.autocast_enabled, self.enable_offloading, self.points_local = torch.float32, False, False, None

    @property
    def do_classifier_free_guidance(self):
        return self.guidance_scale > 1

    def progress_bar(self, total):
        return contextlib.nullcontext(types.SimpleNamespace(update=lambda: None))

    def ar_rollout(self, latents, timesteps, prompt_embeds, prompt_mask, vision_states, cond_latents, task_type, extra_kwargs, viewmats, Ks,
                   action, device, transformer_resident=False):
        return self._ar_rollout_inner(latents, timesteps, prompt_embeds, prompt_mask, vision_states, cond_latents, task_type, extra_kwargs,
                                      viewmats, Ks, action, device)

    def _ar_rollout_inner(self, latents, timesteps, prompt_embeds, prompt_mask, vision_states, cond_latents, task_type, extra_kwargs, viewmats,
                          Ks, action, device):
        rows = (1, 0) if self.do_classifier_free_guidance else (0,)
        caches = [self.transformer(bi_inference=False, ar_txt_inference=True, timestep_txt=torch.zeros(1), text_states=prompt_embeds[r, None],
                                   encoder_attention_mask=prompt_mask[r, None], vision_states=vision_states[r, None], kv_cache=[], cache_txt=True,
                                   extra_kwargs={k: v[r, None] for k, v in extra_kwargs.items()}) for r in rows]
        call = lambda cache, frames, time, keep, before: self.transformer(
            bi_inference=False, ar_vision_inference=True, hidden_states=torch.cat([latents[:, :, frames], cond_latents[:, :, frames]], 1),
            timestep=torch.full((len(frames),), time), viewmats=viewmats[:, frames].float(), Ks=Ks[:, frames].float(),
            action=action[:, frames].float(), kv_cache=cache, cache_vision=keep, rope_temporal_size=before + len(frames), start_rope_start_idx=before)
        for start in range(0, self.chunk_num * CHUNK, CHUNK):
            chosen = []
            if start:
                chosen = select_aligned_memory_frames(viewmats[0].numpy(), start, 20, 12, 4)
                caches = [call(c, chosen, 14.0, True, 0) for c in caches]
                self.scheduler.set_timesteps(STEPS)
            now = list(range(start, start + CHUNK))
            for t in timesteps:
                velocity, *other = [call(c, now, float(t), False, len(chosen))[0] for c in caches]
                velocity = velocity if not other else other[0] + self.guidance_scale * (velocity - other[0])
                latents[:, :, now] = self.scheduler.step(velocity, t, latents[:, :, now])[0]
        return latents


def install(monkeypatch) -> tuple[type[Transformer], type[Pipeline]]:
    """Both classes under upstream's names, in modules of upstream's names, for one test."""
    made = []
    for cls, path in ((Transformer, MODEL), (Pipeline, PIPELINE)):
        place, _, name = path.rpartition(".")
        module = types.ModuleType(place)
        made.append(type(name, (cls,), {"__module__": place}))
        setattr(module, name, made[-1])
        monkeypatch.setitem(sys.modules, place, module)
    module.select_aligned_memory_frames = select_aligned_memory_frames
    return tuple(made)


def pipeline(monkeypatch, chunks: int, **size) -> Pipeline:
    """A pipeline with random weights, the same each time."""
    transformer, kind = install(monkeypatch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(transformer(dataclasses.replace(SIZE, **size)).eval().requires_grad_(False), chunks)


def inputs(chunks: int, poses: Tensor, latent: int = SIZE.latent, grid=(SIZE.height, SIZE.width), widths=(WIDTH, WIDTH, WIDTH), rows: int = 1,
           seed: int = 0) -> dict:
    """Arguments of a rollout along these poses [n, 4, 4]; widths: of text, glyph and vision states; rows: 2 with guidance."""
    g, frames = torch.Generator().manual_seed(seed), CHUNK * chunks
    random = lambda *shape: torch.randn(*shape, generator=g)
    ones = lambda valid, length: (torch.arange(length) < valid).long().expand(rows, -1).contiguous()
    return dict(
        latents=random(1, latent, frames, *grid), cond_latents=0.3 * random(1, latent + 1, frames, *grid), timesteps=Scheduler().timesteps,
        prompt_embeds=random(rows, TEXT + 4, widths[0]), prompt_mask=ones(TEXT, TEXT + 4), vision_states=random(rows, PATCHES, widths[2]),
        task_type="i2v", extra_kwargs={"byt5_text_states": random(rows, GLYPHS + 2, widths[1]), "byt5_text_mask": ones(GLYPHS, GLYPHS + 2)},
        viewmats=poses[None, :frames].clone(), Ks=torch.tensor([[0.505, 0, 0.5], [0, 0.898, 0.5], [0, 0, 1]]).repeat(1, frames, 1, 1),
        action=torch.randint(0, 81, (1, frames), generator=g).float(), device=torch.device("cpu"))

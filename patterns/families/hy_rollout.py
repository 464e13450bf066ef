"""HY-WorldPlay's autoregressive rollout, with its chunks planned, steps reused and old keys and values released in time.

::

    text K/V of every block                                                      once
    for each chunk of 4 latents:
        context = plan(chunk)                                                    on the host, from the poses
        K/V of the context, labelled time 14, positions 0 ... n - 1              the last chunk's are gone by then
        for each step: velocity of the chunk at positions n ... n + 3; Euler     some velocities are held

Written from a description of what upstream's rollout computes. With nothing approximate switched on it gives upstream's result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys

import torch

from ..parking import Parked
from ..recognise import qualified
from .hy_decoding import StreamedDecoding, can_stream

MODEL = "hyvideo.models.transformers.worldplay_1_5_transformer.HunyuanVideo_1_5_DiffusionTransformer"
PIPELINE = "hyvideo.pipelines.worldplay_video_pipeline.HunyuanVideo_1_5_Pipeline"
INNER, OUTER, SELECT = "_ar_rollout_inner", "ar_rollout", "select_aligned_memory_frames"
INPUTS = ("latents", "timesteps", "prompt_embeds", "prompt_mask", "vision_states", "cond_latents", "task_type", "extra_kwargs", "viewmats", "Ks",
          "action", "device")
ENCODING_TIME = 14.0  # the time that clean context latents are labelled with
UNPRUNED = {"memory_frames": 20, "temporal_context_size": 12, "pred_latent_size": 4}
TEXT_INPUTS = ("txt_in", "byt5_in", "vision_in")  # and what begins with txt_ in a block


def attach(pipeline, patch, rollout) -> None:
    check(pipeline, rollout)
    decoding = StreamedDecoding(pipeline) if rollout.config.stream else None
    patch(pipeline, INNER, ArRollout(pipeline, rollout, decoding))
    if decoding is not None:
        patch(pipeline.vae, "decode", decoding.decode)
    outer = getattr(pipeline, OUTER)
    patch(pipeline, OUTER, lambda **given: outer(**{**given, "transformer_resident": True}))


def check(pipeline, rollout) -> None:
    """Refuse what would be silently wrong."""
    if isinstance(getattr(pipeline, INNER, None), ArRollout):
        rollout.refuse("this pipeline is compiled already; call detach() on what li_compile.compile gave for it first")
    takes = {name: tuple(inspect.signature(method).parameters) for name in (INNER, OUTER) if callable(method := getattr(pipeline, name, None))}
    if takes.get(INNER) != INPUTS or takes.get(OUTER, ())[:len(INPUTS)] != INPUTS or "transformer_resident" not in takes[OUTER]:
        rollout.refuse(f"this is another version of upstream's pipeline than the one known: {INNER} takes "
                       f"({', '.join(takes.get(INNER, ())) or 'nothing, it is missing'}). Compile the model alone, pipe.transformer = "
                       "li_compile.compile(pipe.transformer), or use upstream's revision da2d0c2")
    if selection() is None:
        rollout.refuse(f"the pipeline's module has no {SELECT}: this is not upstream's tree, or another version of it")
    model = pipeline.transformer
    refuse_model(rollout, model, MODEL, "HunyuanVideo 1.5", "create_pipeline(action_ckpt=...)", hasattr(model, "action_in"),
                 lambda: [block.img_attn_prope_proj for block in model.double_blocks])
    state = getattr(sys.modules.get("hyvideo.commons.infer_state"), "get_infer_state", lambda: None)()
    if getattr(state, "enable_torch_compile", False):
        rollout.refuse("--enable_torch_compile wraps each block in a torch.compile of its own; leave it off")
    if getattr(state, "enable_sageattn", False):
        rollout.refuse("--use_sageattn replaces the attention by one that cannot be read; leave it off")
    if rollout.config.stream and (pipeline.enable_offloading or not can_stream(pipeline.vae)):
        rollout.refuse("stream=True decodes latent by latent beside the rollout: it needs the VAE on the device (--offloading false), without "
                       "tiles (--use_vae_parallel false), and with upstream's causal decoder and its cache")


def refuse_model(rollout, model, name: str, base: str, load: str, has_actions: bool, projections) -> None:
    """Refuse a transformer that is not upstream's of this name, or whose weights were not loaded. base: what it is without those of its
    actions; load: what loads them; projections(): those of the camera's branch, zero before."""
    if qualified(type(model)) != name:
        rollout.refuse(f"pipe.transformer is a {qualified(type(model))}, not upstream's {name}: take off what was put around it "
                       "(torch.compile, li_compile.compile), or compile the model alone")
    if not has_actions:
        rollout.refuse(f"the transformer has no action parameters: this is {base}, and WorldPlay's action checkpoint was not loaded ({load})")
    if any(p.is_meta for p in model.parameters()):
        rollout.refuse("the transformer has no weights: they are on the meta device. Load a checkpoint before compiling")
    if not any(projection.weight.any() for projection in projections()):
        rollout.refuse(f"the camera projections of all blocks are zero, as they are before WorldPlay's action checkpoint is loaded ({load})")


def refuse_parallel(rollout, count: int) -> None:
    rollout.refuse(f"sequence parallelism over {count} GPUs is not supported: its exchange of tokens stands between the attention and what is "
                   "rewritten. Run one process, or give the pipeline back with detach()")


def selection():
    """Upstream's own selection of context, or None."""
    return getattr(sys.modules.get(PIPELINE.rpartition(".")[0]), SELECT, None)


def text_streams(model) -> list[torch.nn.Module]:
    """The modules that nothing but the text pass runs."""
    inside = [m for block in model.double_blocks for name, m in block.named_children() if name.startswith("txt_")]
    return [*inside, *(m for name in TEXT_INPUTS if isinstance(m := getattr(model, name, None), torch.nn.Module))]


class ArRollout:
    """What stands for the pipeline's rollout. Called with the same arguments, it gives the same latents."""

    def __init__(self, pipeline, rollout, decoding=None) -> None:
        self.pipeline, self.rollout, self.decoding = pipeline, rollout, decoding
        self.model = rollout.compile(pipeline.transformer)
        self.idle = Parked(text_streams(pipeline.transformer))  # of no use once the text is encoded

    def __call__(self, latents, timesteps, prompt_embeds, prompt_mask, vision_states, cond_latents, task_type, extra_kwargs, viewmats, Ks, action,
                 device):
        pipe, session, size = self.pipeline, self.rollout.session, self.pipeline.chunk_latent_frames
        parallel = getattr(sys.modules.get("hyvideo.commons.parallel_states"), "get_parallel_state", lambda: None)()
        if getattr(parallel, "sp_enabled", False):
            refuse_parallel(self.rollout, parallel.sp)
        session.reset()
        session.extend(viewmats[0])
        times = timesteps.tolist()
        poses = viewmats, {"viewmats": viewmats.to(device, pipe.target_dtype), "Ks": Ks.to(device, pipe.target_dtype),
                           "action": action.to(device, pipe.target_dtype)}
        guided = pipe.do_classifier_free_guidance
        with session, torch.autocast("cuda", dtype=pipe.target_dtype, enabled=pipe.autocast_enabled):
            pick = lambda x, row: x[row, None]
            text = [self.encode_text(task_type, pick(prompt_embeds, row), pick(prompt_mask, row), pick(vision_states, row),
                                     {name: pick(extra_kwargs[name], row) for name in ("byt5_text_states", "byt5_text_mask")}, latents, device)
                    for row in ((1, 0) if guided else (0,))]
            with self.idle.away() if self.rollout.config.offload else contextlib.nullcontext():
                for start in range(0, pipe.chunk_num * size, size):
                    self.chunk(start, size, latents, cond_latents, timesteps, times, poses, text, task_type, device)
                    if self.decoding is not None:
                        self.decoding.add(latents[:, :, start:start + size], first=start == 0)
        return latents

    def encode_text(self, task_type, states, mask, vision_states, extra, latents, device):
        """Keys and values of the text streams, a dict a block. The labels of a prompt are at time 0."""
        return self.model(bi_inference=False, ar_txt_inference=True, ar_vision_inference=False, text_states=states, encoder_attention_mask=mask,
                          timestep_txt=torch.zeros(1, dtype=latents.dtype, device=device), vision_states=vision_states, mask_type=task_type,
                          extra_kwargs=extra, kv_cache=[], cache_txt=True)

    def plan(self, start, size, viewmats, device):
        """The chunk's plan; where context is not pruned, of the latents that upstream selects."""
        plan = self.rollout.session.plan(start, size)
        if start == 0 or self.rollout.config.context.enabled:
            return plan
        cameras = viewmats[0].cpu().numpy()
        chosen = {i for first in range(start, start + size, UNPRUNED["pred_latent_size"])
                  for i in selection()(cameras, first, points_local=self.pipeline.points_local, device=device, **UNPRUNED)}
        return dataclasses.replace(plan, indices=tuple(sorted(i for i in chosen if i < start)))

    def chunk(self, start, size, latents, cond_latents, timesteps, times, poses, text, task_type, device):
        pipe, cameras = self.pipeline, poses[1]
        self.rollout.begin()
        plan = self.plan(start, size, poses[0], device)
        count = len(plan.indices)
        at = lambda index: {name: x.index_select(1, index) for name, x in cameras.items()}
        vision = dict(bi_inference=False, ar_txt_inference=False, ar_vision_inference=True, timestep_r=None, mask_type=task_type, return_dict=False)
        caches = text  # the last chunk's have no name any more
        if count:
            kept = torch.tensor(plan.indices, device=device)
            context = dict(vision, **at(kept), cache_vision=True, rope_temporal_size=count, start_rope_start_idx=0,
                           hidden_states=torch.cat([x.index_select(2, kept) for x in (latents, cond_latents)], 1),
                           timestep=torch.full((count,), ENCODING_TIME, device=device, dtype=timesteps.dtype))
            caches = [self.model(kv_cache=cache, **context) for cache in text]
        now = torch.arange(start, start + size, device=device)
        step = dict(vision, **at(now), cache_vision=False, rope_temporal_size=count + size, start_rope_start_idx=count)
        pipe.scheduler.set_timesteps(pipe.num_inference_steps, device=device)
        pipe.scheduler.set_begin_index(0)  # or it would look up the first time on the device, and wait
        with pipe.progress_bar(total=len(times)) as bar, self.rollout.steps(plan, times, (step["action"],)) as steps:
            for i, t in enumerate(times):
                x = latents[:, :, start:start + size]
                time = torch.full((size,), t, device=device, dtype=timesteps.dtype)
                velocity = steps.output(i, lambda: self.velocity(torch.cat([x, cond_latents[:, :, start:start + size]], 1), time, caches, step))
                latents[:, :, start:start + size] = pipe.scheduler.step(velocity, timesteps[i], x, return_dict=False)[0]
                bar.update()

    def velocity(self, x, time, caches, step):
        """The model's velocity; with guidance, of the prompt and then of the negative prompt."""
        with_prompt, *without = [self.model(hidden_states=x, timestep=time, kv_cache=cache, **step)[0] for cache in caches]
        return with_prompt if not without else without[0] + self.pipeline.guidance_scale * (with_prompt - without[0])

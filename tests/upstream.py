"""Upstream's HY-WorldPlay at tiny size, where its tree is at hand: ``LI_COMPILE_HY_WORLDPLAY=path``. Nothing of it is copied.

Packages that it imports and that its models do not need are replaced by stand-ins if they are missing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types

import pytest
import torch

from examples.matrix_game_3.upstream import Configured, remember_config

TREE = os.environ.get("LI_COMPILE_HY_WORLDPLAY", "")
needs_upstream = pytest.mark.skipif(not TREE, reason="set LI_COMPILE_HY_WORLDPLAY to upstream's tree")

TINY = dict(
    patch_size=[1, 1, 1], in_channels=8, out_channels=8, concat_condition=True, hidden_size=128, heads_num=2, mlp_width_ratio=4.0,
    mlp_act_type="gelu_tanh", mm_double_blocks_depth=2, mm_single_blocks_depth=0, rope_dim_list=[16, 24, 24], qkv_bias=True, qk_norm=True,
    qk_norm_type="rms", guidance_embed=False, use_meanflow=False, text_projection="single_refiner", use_attention_mask=True, text_states_dim=96,
    text_states_dim_2=None, text_pool_type=None, rope_theta=256, attn_mode="flash", glyph_byT5_v2=True, vision_projection="linear",
    vision_states_dim=64, is_reshape_temporal_channels=False, use_cond_type_embedding=True, ideal_resolution="480p", ideal_task="i2v")
WIDTHS = (96, 1472, 64)
#: What differs at released size.
FULL = dict(in_channels=32, out_channels=32, hidden_size=2048, heads_num=16, mm_double_blocks_depth=54, rope_dim_list=[16, 56, 56],
            text_states_dim=3584, vision_states_dim=1152)
FULL_WIDTHS = (3584, 1472, 1152)


class _Model(torch.nn.Module):
    dtype = property(lambda self: next(self.parameters()).dtype)
    device = property(lambda self: next(self.parameters()).device)


class _Pipeline:
    def progress_bar(self, total=None):
        return contextlib.nullcontext(types.SimpleNamespace(update=lambda: None))


KNOWN = {"ModelMixin": _Model, "ConfigMixin": Configured, "register_to_config": remember_config, "DiffusionPipeline": _Pipeline,
         "SchedulerMixin": type("SchedulerMixin", (), {}), "BaseOutput": dict, "_is_group_offload_enabled": lambda module: False}


class _Anything(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: list = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = KNOWN.get(name) or type(name, (), {"__init__": lambda self, *a, **k: None, "getLogger": staticmethod(lambda *a: None),
                                                  "get_logger": staticmethod(lambda *a: None)})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


@functools.cache
def load():
    """(module of the transformer, module of the pipeline)"""
    pytest.importorskip("einops")
    absent = [n for n in ("diffusers", "transformers", "loguru", "torchvision", "sageattention", "imageio", "openai", "safetensors", "huggingface_hub")
              if importlib.util.find_spec(n) is None]
    sys.meta_path.append(_Finder(absent))
    sys.path.insert(0, TREE)
    importlib.import_module("hyvideo")
    parallel = importlib.import_module("hyvideo.commons.parallel_states")
    setattr(parallel, "__parallel_dims", types.SimpleNamespace(sp=1, sp_enabled=False, sp_rank=0, sp_group=None))
    importlib.import_module("hyvideo.commons.infer_state").initialize_infer_state(types.SimpleNamespace(
        sage_blocks_range="0-53", use_sageattn=False, enable_torch_compile=False, use_fp8_gemm=False, quant_type="fp8-per-block",
        include_patterns="double_blocks", use_vae_parallel=False))
    return (importlib.import_module("hyvideo.models.transformers.worldplay_1_5_transformer"),
            importlib.import_module("hyvideo.pipelines.worldplay_video_pipeline"))


def transformer(device="cpu", dtype=torch.float32, **changes) -> torch.nn.Module:
    """The transformer with random weights everywhere: upstream's are zero where training would begin."""
    with torch.device("meta"):
        model = load()[0].HunyuanVideo_1_5_DiffusionTransformer(**(TINY | changes))
        model.add_action_parameters()
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.01 if name.endswith("bias") else 0.02
            p.normal_(0.0 if p.ndim > 1 or name.endswith("bias") else 1.0, std, generator=generator)
    return model.eval().requires_grad_(False)


def pipeline(model, chunks: int, steps: int = 4, autocast: bool = False):
    """Upstream's pipeline class around the transformer, as it is when its rollout begins."""
    module = load()[1]
    pipe = module.HunyuanVideo_1_5_Pipeline.__new__(module.HunyuanVideo_1_5_Pipeline)
    scheduler = module.FlowMatchDiscreteScheduler(shift=5.0)
    device = next(model.parameters()).device
    scheduler.set_timesteps(steps, device=device)
    for name, given in dict(transformer=model, scheduler=scheduler, chunk_num=chunks, chunk_latent_frames=4, num_inference_steps=steps,
                            target_dtype=next(model.parameters()).dtype, autocast_enabled=autocast, enable_offloading=False, execution_device=device, num_warmup_steps=0, _guidance_scale=1.0,
                            _internal_dict={},  # the config, where diffusers is installed
                            points_local=module.generate_points_in_sphere(50_000, 8.0).to(device)).items():
        object.__setattr__(pipe, name, given)
    return pipe

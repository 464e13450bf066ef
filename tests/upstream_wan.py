"""Upstream's Wan kind of HY-WorldPlay at tiny size, where its tree and diffusers are at hand: ``LI_COMPILE_HY_WORLDPLAY=path``.

Nothing of it is copied. SageAttention is replaced by what it approximates, what its call asks of a GPU by nothing, and the
number of tokens in a latent and of blocks, which it has written out, by those of a tiny model.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pathlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import upstream

MODEL, PIPELINE = "wan.models.dits.arwan_w_action_w_mem_relative_rope", "wan.inference.pipeline_wan_w_mem_relative_rope"
there = bool(upstream.TREE) and (pathlib.Path(upstream.TREE) / f"{PIPELINE.replace('.', '/')}.py").is_file()
needs_upstream = pytest.mark.skipif(not there or importlib.util.find_spec("diffusers") is None,
                                    reason="set LI_COMPILE_HY_WORLDPLAY to upstream's tree with its wan folder, and install diffusers 0.35.0")

NAMES = ("wan", "models", "inference", "distributed", "platforms", "utils", "logging_utils", "third_party")  # of its packages: others' too
TINY = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64,
            num_layers=2, cross_attn_norm=True)
LATENT, WORDS, TOKENS = (4, 6, 8), (5, 16), 12


@contextlib.contextmanager
def own_names():
    """Upstream's packages under their names, and others' of these names again afterwards."""
    def taken():
        return {name: m for name, m in sys.modules.items() if name.partition(".")[0] in NAMES}

    others = taken()
    for name in others:
        del sys.modules[name]
    sys.path[:0] = [upstream.TREE, f"{upstream.TREE}/wan"]
    sys.modules["models"] = types.ModuleType("models")  # upstream's has no __init__.py: the one beside this file would win
    sys.modules["models"].__path__ = [f"{upstream.TREE}/wan/models"]
    try:
        yield
    finally:
        del sys.path[:2]
        for name in taken():
            if name not in (MODEL, PIPELINE):
                del sys.modules[name]
        sys.modules.update(others)


def written_out(function, released: int, tiny: int) -> None:
    """Put the tiny model's number in the place of one that upstream has written out."""
    numbers = function.__code__.co_consts
    assert released in numbers
    function.__code__ = function.__code__.replace(co_consts=tuple(tiny if n == released and type(n) is int else n for n in numbers))


@functools.cache
def load():
    """(module of the transformer, module of the pipeline)"""
    absent = [n for n in ("transformers", "sageattention", "imageio", "cloudpickle", "remote_pdb", "loguru") if importlib.util.find_spec(n) is None]
    sys.meta_path.append(upstream._Finder(absent))
    with own_names():
        importlib.import_module("hyvideo")
        sys.modules |= {name: upstream._Anything(name) for name in ("platforms", "platforms.interface")}  # a CPU's cannot be imported
        model, pipeline = importlib.import_module(MODEL), importlib.import_module(PIPELINE)
        parallel = sys.modules["distributed.parallel_state"]
        parallel._SP = object.__new__(parallel.GroupCoordinator)  # of one process
        vars(parallel._SP).update(world_size=1, rank_in_group=0, local_rank=0)
    model.sageattn = lambda q, k, v, tensor_layout, is_causal: F.scaled_dot_product_attention(q, k, v)
    written_out(pipeline.WanPipeline.__call__.__wrapped__, 880, TOKENS)  # without no_grad
    written_out(model.WanTransformer3DModel.forward, 30, TINY["num_layers"])
    return model, pipeline


def transformer(dtype=torch.float32) -> torch.nn.Module:
    """The transformer with random weights everywhere: upstream's are zero where training would begin."""
    model = load()[0].WanTransformer3DModel(**TINY)
    model.add_discrete_action_parameters()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.01 if name.endswith("bias") else 0.02
            p.normal_(0.0 if p.ndim > 1 or name.endswith("bias") else 1.0, std, generator=generator)
    return model.to(dtype).eval().requires_grad_(False)


def pipeline(monkeypatch, model):
    """Upstream's pipeline class around the transformer; its text encoder, tokenizer and decoder are not needed for latents."""
    for name in ("synchronize", "nvtx.range_push", "nvtx.range_pop"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *a: None)
    module = load()[1]
    scheduler = importlib.import_module("diffusers").FlowMatchEulerDiscreteScheduler(shift=5.0)
    latent = types.SimpleNamespace(latents_mean=[0.0] * TINY["in_channels"], latents_std=[1.0] * TINY["in_channels"], z_dim=TINY["in_channels"])

    class Vae(torch.nn.Module):
        config, dtype = types.SimpleNamespace(**vars(latent), scale_factor_temporal=4, scale_factor_spatial=16), torch.float32

        def encode(self, video, return_dict):
            """What upstream's makes of an image, of the right size; random, and the same for the same image."""
            g = torch.Generator().manual_seed(int(video.double().sum().abs() * 1000) % 2**31)
            return [types.SimpleNamespace(sample=lambda: torch.randn(1, *LATENT[:1], 1, *LATENT[1:], generator=g))]

    pipe = module.WanPipeline(tokenizer=None, text_encoder=None, vae=Vae(), scheduler=scheduler, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    pipe.dist_vae = types.SimpleNamespace(pipe=types.SimpleNamespace(config=latent, dtype=torch.float32))
    return pipe

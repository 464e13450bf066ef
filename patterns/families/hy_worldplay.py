"""HY-WorldPlay 1.5, the transformer that is based on HunyuanVideo 1.5.

Upstream keeps its attention from the compiler and asks inside of the forward pass which attention packages can be imported:
a graph would break at each. Where both are out of the way, a context encoding and a denoising step are one graph each. Its
blocks become regions that are handed tensors alone, their own entries of the cache: from torch 2.13 on one block is traced,
and with any torch one is compiled, in place of all 54.
"""

from __future__ import annotations

import sys

import torch

from .._compat import undisabled
from ..registry import Family, register_family

PACKAGE = "hyvideo"
DISABLED = ("attention", "parallel_attention", "sequence_parallel_attention_txt", "sequence_parallel_attention_vision")
CHOICE = "maybe_fallback_attn_mode"
MODES = ("flash", "flash2", "flash3", "torch")
BLOCK, STATE = "MMDoubleStreamBlock", "get_infer_state"


def prepare(model, patch) -> None:
    for module in [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == PACKAGE]:
        for name in DISABLED:
            original = undisabled(vars(module).get(name))
            if original is not None:
                patch(module, name, original)
        if callable(choose := vars(module).get(CHOICE)):
            patch(module, CHOICE, pinned(choose))
        block, state = vars(module).get(BLOCK), vars(module).get(STATE, lambda: None)
        if block is not None and block.__module__ == module.__name__:
            patch(block, "forward_vision", region(block.forward_vision, "img", "vision", state))
            patch(block, "forward_txt", region(block.forward_txt, "txt", "txt", state))


def pinned(choose):
    """``choose(mode, infer_state, block)`` with its answers taken now, where they do not depend on the block."""
    answers = {mode: choose(mode) for mode in MODES}

    def answer(attn_mode, infer_state=None, block_idx=None):
        if attn_mode in answers and not getattr(infer_state, "enable_sageattn", False):
            return answers[attn_mode]
        return choose(attn_mode, infer_state, block_idx)

    return answer


def region(forward, stream, kind, infer_state):
    """A block's ``forward`` for one stream ("img" or "txt") as a nested compile region.

    Every block gets its own entry of the cache as block 0: a list of all of them would make the blocks differ. What it
    returns for the cache crosses the border as bare tensors, as Dynamo uses a trace again only where nothing else does.
    """
    kept, written = f"cache_{kind}", (f"k_{kind}", f"v_{kind}")

    @torch.compiler.nested_compile_region
    def block(self, x, keep, names, tensors, entries, cached):
        options = dict(zip(names, tensors)) | {kept: keep, "block_idx": 0, "kv_cache": [dict(zip(entries, cached))] if entries else None}
        x, new = forward(self, **{stream: x}, attn_param=None, **options)
        return (x, *(new[name] for name in written)) if keep else (x,)

    def forward_as_region(self, *args, attn_param=None, block_idx=None, kv_cache=None, **options):
        state = infer_state()
        if args or getattr(state, "enable_sageattn", False):  # the choice of attention then depends on the block
            return forward(self, *args, attn_param=attn_param, block_idx=block_idx, kv_cache=kv_cache, **options)
        x, keep = options.pop(stream), options.pop(kept, False)
        entry = kv_cache[block_idx] if kv_cache is not None else {}
        x, *new = block(self, x, keep, tuple(options), tuple(options.values()), tuple(entry), tuple(entry.values()))
        return x, dict(zip(written, new)) if keep else None

    return forward_as_region


FAMILY = register_family(Family(
    name="hy_worldplay",
    description="HY-WorldPlay 1.5 (HunyuanVideo 1.5, 8B): attention made visible to the compiler",
    modules=(f"{PACKAGE}.models.transformers.worldplay_1_5_transformer.HunyuanVideo_1_5_DiffusionTransformer",),
    prepare=prepare,
))

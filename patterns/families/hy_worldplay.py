"""HY-WorldPlay 1.5, the transformer that is based on HunyuanVideo 1.5.

Upstream keeps its attention from the compiler and asks inside of the forward pass which attention packages can be imported:
a graph would break at each. Where both are out of the way, a context encoding and a denoising step are one graph each.
"""

from __future__ import annotations

import sys

from .._compat import undisabled
from ..registry import Family, register_family

PACKAGE = "hyvideo"
DISABLED = ("attention", "parallel_attention", "sequence_parallel_attention_txt", "sequence_parallel_attention_vision")
CHOICE = "maybe_fallback_attn_mode"
MODES = ("flash", "flash2", "flash3", "torch")


def prepare(model, patch) -> None:
    for module in [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == PACKAGE]:
        for name in DISABLED:
            original = undisabled(vars(module).get(name))
            if original is not None:
                patch(module, name, original)
        if callable(choose := vars(module).get(CHOICE)):
            patch(module, CHOICE, pinned(choose))


def pinned(choose):
    """``choose(mode, infer_state, block)`` with its answers taken now, where they do not depend on the block."""
    answers = {mode: choose(mode) for mode in MODES}

    def answer(attn_mode, infer_state=None, block_idx=None):
        if attn_mode in answers and not getattr(infer_state, "enable_sageattn", False):
            return answers[attn_mode]
        return choose(attn_mode, infer_state, block_idx)

    return answer


FAMILY = register_family(Family(
    name="hy_worldplay",
    description="HY-WorldPlay 1.5 (HunyuanVideo 1.5, 8B): attention made visible to the compiler",
    modules=(f"{PACKAGE}.models.transformers.worldplay_1_5_transformer.HunyuanVideo_1_5_DiffusionTransformer",),
    prepare=prepare,
))

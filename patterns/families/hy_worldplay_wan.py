"""HY-WorldPlay 1.5, the transformer that is based on Wan 2.2 (5B).

Upstream calls SageAttention, which a graph cannot see into, compiles each block by itself, and makes the rotary table of the whole
video at every call, to slice it by numbers. Attention becomes PyTorch's (which rounds less: SageAttention works in 8 bits), blocks
are compiled with the model, and the slice of the table comes from outside.
"""

from __future__ import annotations

import sys
import types
import weakref

import torch.nn.functional as F

from .._compat import undisabled
from ..registry import Family, register_family
from .hy_wan_rollout import MODEL, PIPELINE, attach
from .hy_worldplay import free_lengths, of_any_length

_TABLES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> the table of the call that is made


def attention(q, k, v, tensor_layout: str = "HND", is_causal: bool = False, **_):
    """What SageAttention approximates. q, k, v: [B, H, L, D] ("HND"), the only layout that upstream uses."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def prepare(model, patch) -> None:
    module = sys.modules[type(model).__module__]
    if callable(vars(module).get("sageattn")):
        patch(module, "sageattn", attention)
    for block in {type(b) for b in model.blocks}:
        if (forward := undisabled(block.forward)) is not None:
            patch(block, "forward", forward)
    if model not in _TABLES:  # else it is prepared a second time: upstream's own ``forward`` may be replaced already
        _TABLES[model] = types.SimpleNamespace(cos=None, sin=None, known={}, make=model.rope.forward)
    table = _TABLES[model]
    patch(model.rope, "forward", lambda hidden_states: (table.cos, table.sin))


def arguments(model, args, kwargs):
    """A call with its slice of the rotary table handed over, and the lengths of context and cache free."""
    if args or "is_cache" not in kwargs:
        return None
    given, table = dict(kwargs), _TABLES[model]
    x, keep = given["hidden_states"], given["is_cache"]
    tokens = (x.shape[3] // model.config.patch_size[1]) * (x.shape[4] // model.config.patch_size[2])
    key = given.pop("current_start"), given.pop("current_end"), tuple(x.shape[3:]), x.device
    if key not in table.known:
        start, end, *_ = key
        video = x.new_empty(1).expand(1, 1, -(-end // tokens) * model.config.patch_size[0], *x.shape[3:])
        table.known[key] = tuple(t[:, :, start:end].contiguous() for t in table.make(video))
    table.cos, table.sin = (of_any_length(t, 2) if keep else t for t in table.known[key])
    given |= {"current_start": 0, "current_end": None, "window_frames": 0}  # all of what comes from outside
    return (), given, free_lengths(given, keep, ("k", "v"), tokens)


FAMILY = register_family(Family(
    name="hy_worldplay_wan",
    description="HY-WorldPlay 1.5 (Wan 2.2, 5B): transformer and autoregressive rollout",
    modules=(MODEL,),
    prepare=prepare,
    arguments=arguments,
    pipelines=(PIPELINE,),
    attach=attach,
))

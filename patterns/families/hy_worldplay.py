"""HY-WorldPlay 1.5, the transformer that is based on HunyuanVideo 1.5.

Upstream keeps its attention from the compiler and asks inside of the forward pass which attention packages can be imported:
a graph would break at each. Where both are out of the way, a context encoding and a denoising step are one graph each. Its
blocks become regions that are handed tensors alone, their own entries of the cache: one block is traced and compiled in place
of all 54.
"""

from __future__ import annotations

import sys
import weakref

import torch

from .._compat import settle_sizes, undisabled
from ..registry import Family, register_family
from ..trace_once import traced_once
from .hy_rollout import MODEL, PIPELINE, attach

PACKAGE = "hyvideo"
DISABLED = ("attention", "parallel_attention", "sequence_parallel_attention_txt", "sequence_parallel_attention_vision")
CHOICE = "maybe_fallback_attn_mode"
NOTES = ("thw", "layer-name")
MODES = ("flash", "flash2", "flash3", "torch")
FRAMES = {"hidden_states": 2, "viewmats": 1, "Ks": 1, "action": 1, "timestep": 0}  # argument -> its dimension of latents
BLOCK, STATE = "MMDoubleStreamBlock", "get_infer_state"


def prepare(model, patch) -> None:
    if isinstance(notes := getattr(model, "attn_param", None), dict):
        # What the forward pass notes there is there from the start: a graph is compiled for the number of notes.
        patch(model, "attn_param", {**{name: None for name in NOTES}, **notes})
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

    @traced_once
    def block(self, x, keep, names, tensors, entries, cached):
        options = dict(zip(names, tensors)) | {kept: keep, "block_idx": 0, "kv_cache": [dict(zip(entries, cached))] if entries else None}
        x, new = forward(self, **{stream: x}, attn_param=None, **options)
        return (x, *(new[name] for name in written)) if keep else (x,)

    def forward_as_region(self, *args, attn_param=None, block_idx=None, kv_cache=None, **options):
        state = infer_state()
        if args or getattr(state, "enable_sageattn", False):  # the choice of attention then depends on the block
            return forward(self, *args, attn_param=attn_param, block_idx=block_idx, kv_cache=kv_cache, **options)
        x, keep = options.pop(stream).contiguous(), options.pop(kept, False)  # block 0 is handed a transposed view
        entry = kv_cache[block_idx] if kv_cache else {}  # the text pass of a rollout is given an empty list
        x, *new = block(self, x, keep, tuple(options), tuple(options.values()), tuple(entry), tuple(entry.values()))
        return x, dict(zip(written, new)) if keep else None

    return forward_as_region


_TABLES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> its rotary tables by position and device


def rotary_table(model, total: int, start: int, frames: int, grid: tuple[int, int], device: torch.device):
    """cos and sin, [frames * rows * columns, head_dim] fp32, of latents ``start ...`` out of ``total``: upstream's own numbers, which
    it would make on the CPU at every call and move in every block."""
    known = _TABLES.setdefault(model, {})
    key = total, start, frames, grid, device
    if key not in known:
        area = grid[0] * grid[1]
        known[key] = tuple(t[start * area:(start + frames) * area].to(device) for t in model.get_rotary_pos_embed((total, *grid)))
    return known[key]


def arguments(model, args, kwargs):
    """A vision call with its rotary table as tensors and the lengths of context and cache free; None for the text pass, whose
    masks break a graph and which is run once a rollout, and for the bidirectional mode."""
    if args or not kwargs.get("ar_vision_inference") or kwargs.get("bi_inference", True):
        return None
    given = dict(kwargs)
    x, keep = given["hidden_states"], given.get("cache_vision", False)
    if given.get("freqs_cos") is None:
        sizes = given.pop("rope_temporal_size", 4), given.pop("start_rope_start_idx", 0)
        given["freqs_cos"], given["freqs_sin"] = rotary_table(model, *sizes, x.shape[2], tuple(x.shape[3:]), x.device)
    frames = free_lengths(given, keep, ("k_vision", "v_vision"), x.shape[3] * x.shape[4])
    given |= {name: sized(given[name], 0 if keep else None) for name in ("freqs_cos", "freqs_sin")}
    return (), given, frames


def handed_on(given) -> list[torch.Tensor]:
    """Keys and values of latents that a vision call reads, by its arguments, or returned."""
    if isinstance(given, dict):
        given = () if given.get("cache_vision") else given.get("kv_cache") or ()
    return [e[name] for e in given if isinstance(e, dict) for name in ("k_vision", "v_vision") if e.get(name) is not None]


def free_lengths(given: dict, keep: bool, cached: tuple[str, str], tokens: int) -> int:
    """Let a call's lengths of context and cache change from call to call, in place; the number of latents of context that it reads or
    encodes. keep: it encodes; cached: names of a cache entry's keys and values of latents; tokens: in a latent."""
    given |= {name: sized(given[name], dim if keep else None) for name, dim in FRAMES.items()}
    # A context encoding reads no cached latents, and does not hold on to what it replaces.
    given["kv_cache"] = [{**entry, **dict.fromkeys(cached)} if keep else dict(entry) for entry in given["kv_cache"]]
    if keep:
        return given["hidden_states"].shape[2]
    for entry in given["kv_cache"]:
        entry |= {name: of_any_length(entry[name], 2) for name in cached if entry[name] is not None}
    keys = given["kv_cache"][0][cached[0]]
    return 0 if keys is None else keys.shape[2] // tokens


def sized(x: torch.Tensor, free: int | None) -> torch.Tensor:
    """Plain strides, and sizes that a graph is compiled for but for one, if any: a chunk's are no sizes to learn from other calls."""
    x = plain(x)
    if free is not None:
        return of_any_length(x, free)
    settle_sizes(x, None)
    return x


def of_any_length(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A view with a size that the graph is not compiled for; the mark is not left on the caller's tensor, where a step would see it."""
    x = x.view(x.shape)
    torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def plain(x: torch.Tensor) -> torch.Tensor:
    """The tensor with the strides of its shape also along dimensions of one: a graph is compiled for its inputs' strides."""
    return x.reshape(-1).view(x.shape)


FAMILY = register_family(Family(
    name="hy_worldplay",
    description="HY-WorldPlay 1.5 (HunyuanVideo 1.5, 8B): transformer and autoregressive rollout",
    modules=(MODEL,),
    prepare=prepare,
    arguments=arguments,
    handed_on=handed_on,
    pipelines=(PIPELINE,),
    attach=attach,
))

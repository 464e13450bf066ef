"""Matrix-Game-3.0, the interactive world model that is based on Wan2.2-TI2V-5B.

Upstream keeps the sizes of its tokens in tensors, and reads them back in every block: a graph breaks at each, inside the loop
over the blocks, and nothing of the model is left in one piece. Here they are numbers. Its attention is called through a
package that may be missing, its sequence is padded to one length whatever it holds, and importing it makes Dynamo hide errors.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types

import torch
import torch.nn.functional as F

from .._compat import dynamo_config
from ..registry import Family, register_family
from ..trace_once import traced_once
from .matrix_game_3_clip import IMAGE, PAST

PACKAGE = "wan.modules"
PADDED = 20  # latents that upstream's pipeline pads every sequence to: 15 of a first clip and 5 of memory
HALF = (torch.float16, torch.bfloat16)
#: Argument of the model -> dimension along which it holds memory latents.
MEMORY = {"x_memory": 2, "timestep_memory": 1, "mouse_cond_memory": 1, "keyboard_cond_memory": 1, "plucker_emb": 2, "memory_latent_idx": 0}


class Sizes:
    """Whole numbers, as far as upstream asks a tensor of them: one row (tokens of a sample), or rows of (frames, rows, columns)."""

    def __init__(self, rows):
        self.rows = rows

    def tolist(self):
        return [r.tolist() if isinstance(r, Sizes) else r for r in self.rows]

    def clone(self):
        return Sizes([r.clone() if isinstance(r, Sizes) else r for r in self.rows])

    def max(self):
        return max(self.rows)

    def prod(self):
        return Number(product(self.rows))

    def __getitem__(self, at):
        return Sizes([row[at[1]] for row in self.rows]) if isinstance(at, tuple) else self.rows[at]

    def __setitem__(self, at, new):
        for i, row in enumerate(self.rows):
            row.rows[at[1]] = new.rows[i] if isinstance(new, Sizes) else new

    def __sub__(self, other):
        return Sizes([n - other for n in self.rows])


class Number:
    """One of them, to be asked for with ``item``."""

    def __init__(self, n):
        self.n = n

    def item(self):
        return self.n


def product(numbers):
    """As ``math.prod``, which Dynamo does not follow with sizes that are symbols."""
    result = 1
    for n in numbers:
        result = result * n
    return result


def tensor(data, *args, device=None, **kwargs):
    """``torch.tensor``, but for sizes, which stay numbers."""
    if device is None and isinstance(data, (torch.Size, tuple, list)) and all(isinstance(n, (int, torch.SymInt)) for n in data):
        return Sizes(list(data))
    return torch.tensor(data, *args, device=device, **kwargs)


def stack(tensors, *args, **kwargs):
    return Sizes(list(tensors)) if all(isinstance(t, Sizes) for t in tensors) else torch.stack(tensors, *args, **kwargs)


def cat(tensors, dim=0, **kwargs):
    """``torch.cat``, but where all tensors but one are empty, as what upstream pads with is here. Inductor drops such a
    concatenation, and with it the strides that a region was traced for."""
    full = [t for t in tensors if t.shape[dim] != 0]
    if len(full) == 1 < len(tensors):
        return full[0].clone(memory_format=torch.contiguous_format)
    return torch.cat(tensors, dim, **kwargs)


def rotate(x, grid_sizes, freqs, t_indices=None):
    """Rotary embedding of [B, L, heads, head_dim] at frames ``t_indices``, which are counted from 0 if None; rows and columns are.

    freqs: cosines and sines [2, heads or 1, positions, head_dim / 2], those of frames, rows and columns side by side.
    """
    frames, rows, columns = grid_sizes.tolist()[0]
    if x.shape[1] != frames * rows * columns:
        raise NotImplementedError(f"{x.shape[1]} tokens for {frames} frames of {rows} x {columns}; li_compile prepares batches of one length only; "
                                  "call detach() to run this with upstream's own")
    third = x.shape[3] // 2 // 3
    over_frames, over_rows, over_columns = freqs.split([x.shape[3] // 2 - 2 * third, third, third], dim=3)
    over_frames = over_frames[:, :, :frames] if t_indices is None else over_frames[:, :, torch.as_tensor(t_indices, device=x.device)]
    places = (over_frames[:, :, :, None, None], over_rows[:, :, None, :rows, None], over_columns[:, :, None, None, :columns])
    table = torch.cat([p.expand(-1, -1, frames, rows, columns, -1) for p in places], dim=5).flatten(2, 4).transpose(1, 2)
    cos, sin = table[0], table[1]
    even, odd = x.float().unflatten(3, (-1, 2)).unbind(4)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], 4).flatten(3)


def action_positions(self, video_length, height, width, head_dim, rope_dim_list=None):
    """Cosines and sines [frames, head_dim] of the action modules, which turn by frames only: their rows and columns are one."""
    turned, device = (rope_dim_list or [head_dim // 3])[0], self.t_qkv.weight.device
    rates = 1.0 / self.rope_theta ** (torch.arange(0, turned, 2, device=device).float() / turned)
    angles = torch.outer(torch.arange(video_length, device=device).float(), rates).repeat_interleave(2, dim=1)
    return F.pad(angles.cos(), (0, head_dim - turned), value=1.0), F.pad(angles.sin(), (0, head_dim - turned))


def attention(q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None, causal=False, window_size=(-1, -1),
              deterministic=False, dtype=torch.bfloat16, version=None):
    """Attention of [B, L, heads, head_dim] over the first ``k_lens`` keys, in half precision whatever autocast says.

    dtype: computed in, of queries, keys and values that are not in half precision; the result has the queries' own.
    """
    if q_lens is not None or dropout_p or q_scale is not None or tuple(window_size) != (-1, -1):
        raise NotImplementedError("li_compile prepares Matrix-Game-3.0's attention over whole sequences, without dropout, window or "
                                  "scaled queries; call detach() to run this with upstream's own")
    if k_lens is not None:
        lengths = k_lens.tolist()
        if any(n != lengths[0] for n in lengths):
            raise NotImplementedError(f"samples of {lengths} tokens; li_compile prepares batches of one length only; "
                                      "call detach() to run this with upstream's own")
        k, v = k[:, : lengths[0]], v[:, : lengths[0]]
    own = q.dtype
    q, k, v = (x if x.dtype in HALF else x.to(dtype) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(*(x.to(v.dtype).transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2).to(own)


def prepare(model, patch) -> None:
    upstream, actions = (sys.modules[f"{PACKAGE}.{name}"] for name in ("model", "action_module"))
    patch(upstream, "torch", with_own(upstream.torch, cat=cat, tensor=tensor, stack=stack))
    patch(upstream, "flash_attention", attention)
    patch(upstream, "rope_apply_with_indices", rotate)
    patch(actions.ActionModule, "get_rotary_pos_embed", action_positions)
    patch(actions, "flash_attn_ops", None)  # then it calls PyTorch's attention
    patch(model, "freqs", real_table(model.freqs, model.patch_embedding.weight.device))
    for block in model.blocks:
        patch(block, "forward", types.MethodType(as_region(type(block).forward), block))
    patch(model, "forward", types.MethodType(unpadded(type(model).forward, model.patch_size), model))
    patch(dynamo_config(), "suppress_errors", False)  # importing upstream's VAE sets it, which hides a backend that fails


def real_table(freqs, device):
    """Complex rates [positions, head_dim / 2] or one such a head as cosines and sines; what is that already, as it is."""
    if not freqs.is_complex():
        return freqs
    table = freqs if freqs.dim() == 3 else freqs[None]
    return torch.view_as_real(table.to(device, torch.complex64)).movedim(3, 0).contiguous()


@functools.cache
def as_region(forward):
    """A block's forward, as a region that is compiled once for all blocks of a kind."""
    run = traced_once(lambda block, x, given: forward(block, x, **given))

    def region_forward(self, x, **given):
        return run(self, x, given)

    return region_forward


def with_own(module, **names):
    """A copy of a module with some names standing for something else."""
    own = types.ModuleType(module.__name__)
    vars(own).update(vars(module), **names)
    return own


def unpadded(forward, patch_size):
    """forward, of sequences that are as long as what they hold, and not padded to ``seq_len``."""

    @functools.wraps(forward)
    def unpadded_forward(self, x, t, context, seq_len, y=None, mouse_cond=None, keyboard_cond=None, x_memory=None, *args, **kwargs):
        memory = 0 if x_memory is None else x_memory.shape[2]
        rows, columns = (n // p for n, p in zip(x.shape[3:], patch_size[1:]))
        if x_memory is not None:
            check_memory(kwargs, memory, x.shape[2], rows * columns)
        frames = (memory + x.shape[2]) // patch_size[0]
        return forward(self, x, t, context, frames * rows * columns, y, mouse_cond, keyboard_cond, x_memory, *args, **kwargs)

    return unpadded_forward


def check_memory(given, memory, window, tokens) -> None:
    """Say at once where inputs hold different numbers of memory latents; where these are symbols, they are one from here on."""
    for name, size in (("timestep_memory", memory * tokens), ("plucker_emb", memory + window), ("mouse_cond_memory", memory),
                       ("keyboard_cond_memory", memory), ("memory_latent_idx", memory)):
        held = given.get(name)
        if isinstance(held, torch.Tensor) and held.shape[MEMORY[name]] != size:
            raise ValueError(f"{name} is of shape {tuple(held.shape)}, for {memory} memory latents")


def arguments(model, args, kwargs):
    """Latent indices as tensors, which are no constants of a graph: they change from clip to clip."""
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    given, device = dict(given), given["x"].device
    for name in ("mouse_cond", "keyboard_cond"):  # windows of all actions so far, which have other strides in every clip
        if given.get(name) is not None:
            given[name] = given[name].clone(memory_format=torch.contiguous_format)
    window, memory = given.get("predict_latent_idx"), given.get("memory_latent_idx")
    if window is None:
        window = range(given["x"].shape[2])
    elif isinstance(window, tuple) and len(window) == 2:
        window = range(*window)
    given["predict_latent_idx"] = torch.as_tensor(list(window) if isinstance(window, range) else window, device=device)
    if given.get("x_memory") is not None:
        memory = range(given["x_memory"].shape[2]) if memory is None else memory
        given["memory_latent_idx"] = torch.as_tensor(list(memory) if isinstance(memory, range) else memory, device=device)
    return (), given, None


def window_and_memory(shapes):
    """Latents of the window, None where no input is one, and of memory."""
    window = next((shape[2] for name, shape in shapes.items() if name in ("l_x_", "l_latents_") and len(shape) == 5), None)
    return window, next((shape[2] for name, shape in shapes.items() if "x_memory" in name and len(shape) == 5), 0)


def current(shapes) -> int | None:
    """New latents: of a clip's window, which follows the memory, all but those that the window begins with."""
    window, memory = window_and_memory(shapes)
    known = IMAGE if isinstance(memory, int) and memory == 0 else PAST
    return window - known if isinstance(window, int) and window > known else None


def padded(shapes) -> tuple[int, int] | None:
    """Latents of a sequence, and those that upstream's pipeline pads it to."""
    window, memory = window_and_memory(shapes)
    return None if window is None else (window + memory, PADDED)


def attach(pipeline, patch, rollout) -> None:
    from . import matrix_game_3_rollout

    matrix_game_3_rollout.attach(pipeline, patch, rollout)


FAMILY = register_family(Family(
    name="matrix_game_3",
    description="Matrix-Game-3.0 (Wan2.2-TI2V-5B with memory): sizes as numbers, attention made visible, no padding",
    modules=(f"{PACKAGE}.model.WanModel",),
    requires=(f"{PACKAGE}.action_module.ActionModule",),  # other models that are based on Wan have a class of that name
    prepare=prepare,
    arguments=arguments,
    pipelines=("pipeline.inference_interactive_pipeline.MatrixGame3Pipeline",),
    attach=attach,
    holds=MEMORY,
    roles={"positions": "memory_latent_idx"},
    positions="keep",
    current=current,
    padded=padded,
    never_padded=("action attention",),
    groups={"cross-attention": ".cross_attn", "action attention": ".action_model"},
    opt_out=("cross-attention", "action attention"),
))

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

PACKAGE = "wan.modules"
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


def linspace(start, end, steps, **kwargs):
    """``torch.linspace``, which makes a constant of its number of steps; whole numbers can be counted without."""
    if isinstance(end, (int, torch.SymInt)) and end - start == steps - 1:
        return torch.arange(start, end + 1, **kwargs)
    return torch.linspace(start, end, steps, **kwargs)


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
            raise NotImplementedError(f"samples of {lengths} tokens; li_compile prepares batches of one length only")
        k, v = k[:, : lengths[0]], v[:, : lengths[0]]
    own = q.dtype
    q, k, v = (x if x.dtype in HALF else x.to(dtype) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(*(x.to(v.dtype).transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=softmax_scale)
    return out.transpose(1, 2).to(own)


def prepare(model, patch) -> None:
    upstream, actions, positions = (sys.modules[f"{PACKAGE}.{name}"] for name in ("model", "action_module", "posemb_layers"))
    patch(upstream, "torch", with_own(upstream.torch, tensor=tensor, stack=stack))
    patch(upstream, "flash_attention", attention)
    patch(positions, "torch", with_own(positions.torch, linspace=linspace))
    if actions.flash_attn_ops is not None:
        patch(actions, "flash_attn_ops", None)  # then it calls PyTorch's attention
    patch(model, "freqs", model.freqs.to(model.patch_embedding.weight.device))
    patch(model, "forward", types.MethodType(unpadded(type(model).forward, model.patch_size), model))
    patch(dynamo_config(), "suppress_errors", False)  # importing upstream's VAE sets it, which hides a backend that fails


def with_own(module, **functions):
    """A module with some functions in the place of its own."""
    own = types.ModuleType(module.__name__)
    vars(own).update(vars(module), **functions)
    return own


def unpadded(forward, patch_size):
    """forward, of sequences that are as long as what they hold, and not padded to ``seq_len``."""

    @functools.wraps(forward)
    def unpadded_forward(self, x, t, context, seq_len, y=None, mouse_cond=None, keyboard_cond=None, x_memory=None, *args, **kwargs):
        frames = x.shape[2] + (0 if x_memory is None else x_memory.shape[2])
        tokens = product([n // p for n, p in zip((frames, *x.shape[3:]), patch_size)])
        return forward(self, x, t, context, tokens, y, mouse_cond, keyboard_cond, x_memory, *args, **kwargs)

    return unpadded_forward


def arguments(model, args, kwargs):
    """Latent indices as tensors, which are no constants of a graph: they change from clip to clip."""
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    given, device = dict(given), given["x"].device
    window, memory = given.get("predict_latent_idx"), given.get("memory_latent_idx")
    if window is None:
        window = range(given["x"].shape[2])
    elif isinstance(window, tuple) and len(window) == 2:
        window = range(*window)
    given["predict_latent_idx"] = torch.as_tensor(list(window) if isinstance(window, range) else window, device=device)
    if given.get("x_memory") is not None:
        memory = range(given["x_memory"].shape[2]) if memory is None else memory
        given["memory_latent_idx"] = torch.as_tensor(list(memory) if isinstance(memory, range) else memory, device=device)
    return (), given


FAMILY = register_family(Family(
    name="matrix_game_3",
    description="Matrix-Game-3.0 (Wan2.2-TI2V-5B with memory): sizes as numbers, attention made visible, no padding",
    modules=(f"{PACKAGE}.model.WanModel",),
    requires=(f"{PACKAGE}.action_module.ActionModule",),  # other models that are based on Wan have a class of that name
    prepare=prepare,
    arguments=arguments,
    holds=MEMORY,
    roles={"positions": "memory_latent_idx"},
    positions="keep",
    groups={"cross-attention": ".cross_attn", "action attention": ".action_model"},
    opt_out=("cross-attention", "action attention"),
))

"""Attention behind an opaque call: which call, how its tensors lie, how it is told which keys are valid.

::

    register_attention("fast", call="fast_attn::forward", layout="BSHD")
    register_attention("packed", call="fast_attn::varlen", layout="SHD")    # no B: samples one behind the other, cu_seqlens

A call is read if what it computes is provably softmax(scale * q k^T) v over keys that a slice can give: lengths that
are constants and equal for all samples, a mask that is a constant and a prefix, no window, no bias, no dropout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch.fx import Node

from .binding import bind, names_of_call
from .constants import constant
from .graph import Miss, known, shape
from .spelling import Spelling, refuse, replaced_by

#: What an argument is for -> names that it goes by.
ROLES: dict[str, tuple[str, ...]] = {
    "query": ("query", "q"), "key": ("key", "k"), "value": ("value", "v"),
    "scale": ("scale", "softmax_scale", "sm_scale"), "causal": ("is_causal", "causal"), "mask": ("attn_mask", "mask", "key_mask"),
    "cu_q": ("cu_seqlens_q", "cu_seqlens_qo", "cu_q"), "cu_k": ("cu_seqlens_k", "cu_seqlens_kv", "cu_k"),
    "q_lens": ("q_lens", "seqused_q"), "k_lens": ("k_lens", "kv_lens", "seqused_k"),
}
#: Argument -> values under which it changes nothing.
NEUTRAL: dict[str, tuple] = {
    "dropout_p": (0,), "dropout": (0,), "window_size": ((-1, -1), None), "window_size_left": (-1,), "window_size_right": (-1,),
    "softcap": (0,), "alibi_slopes": (None,), "block_table": (None,), "leftpad_k": (None,),
}
#: Arguments that never change the result.
IGNORED = {"deterministic", "return_softmax", "return_attn_probs", "return_lse", "max_seqlen_q", "max_seqlen_k", "zero_tensors",
           "num_splits", "pack_gqa", "is_grad_enabled", "enable_gqa"}


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """The reader behind ``register_attention(call=...)``, whose arguments its fields are."""

    name: str
    call: str | Callable
    layout: str = "BHSD"
    arguments: Mapping[str, str] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    result: int | None = None

    def __post_init__(self) -> None:
        if sorted(self.layout) not in (sorted("BHSD"), sorted("HSD")) or self.layout[-1] != "D":
            raise ValueError(f"layout of pattern {self.name!r} is {self.layout!r}; it must name B, H, S and D once each, D last, as "
                             "'BHSD' and 'BSHD' do, or 'SHD' where samples are packed along S")
        for role in self.arguments:
            if role not in ROLES:
                raise ValueError(f"pattern {self.name!r} names an argument for {role!r}; known are {', '.join(ROLES)}")

    def fires(self, node: Node) -> bool:
        if node.op != "call_function":
            return False
        return self.call in names_of_call(node.target) if isinstance(self.call, str) else node.target is self.call

    def read(self, node: Node) -> Spelling | Miss | None:
        """What a node's call says in canonical form; a Miss if it cannot be said exactly, None if it is another call."""
        if not self.fires(node):
            return None
        no = lambda reason: refuse("attention", node, self.name, reason)
        if (bound := bind(node)) is None:
            return no("the call has no signature to read its arguments by; register an operator, or a function with named parameters")
        given, defaults = bound
        role = {r: next((n for n in ((self.arguments[r],) if r in self.arguments else names) if n in given), None)
                for r, names in ROLES.items()}
        missing = [r for r in ("query", "key", "value") if role[r] is None or not isinstance(given[role[r]], Node)]
        if missing:
            return no(f"no argument for {', '.join(missing)} among {', '.join(given)}; name them with arguments=")
        of = lambda r: given[role[r]] if role[r] is not None else None
        for name, argument in given.items():
            if name not in role.values() and (why := self._changes(name, argument, defaults)) is not None:
                return no(why)
        q, k, v = (of(r) for r in ("query", "key", "value"))
        if any(len(shape(x) or ()) != len(self.layout) for x in (q, k, v)):
            return no(f"its operands are {shape(q)}, {shape(k)} and {shape(v)}; the layout {self.layout} needs {len(self.layout)} dimensions")
        lengths = self._lengths(of, shape(q)[self.layout.index("S")], shape(k)[self.layout.index("S")])
        if isinstance(lengths, str):
            return no(lengths)
        batch, keys = lengths
        scale, causal = of("scale"), bool(of("causal"))
        if isinstance(scale, Node):
            return no("its scale is computed in the graph; needed: a number")
        if causal and not known(shape(q)[self.layout.index("S")] == shape(k)[self.layout.index("S")]):
            return no("it is causal over more keys than queries, and operators differ in which corner they align")
        replaced = replaced_by(node, self.result)
        if isinstance(replaced, int):
            return no(f"what it returns besides the result is used (item {replaced} of its tuple)")
        heads = self.layout.index("H")
        extra = {"enable_gqa": True} if not known(shape(q)[heads] == shape(k)[heads]) else {}
        extra |= {"is_causal": True} if causal else {}
        head_dim = shape(q)[-1]
        if scale is not None and not (isinstance(head_dim, int) and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)):
            extra["scale"] = float(scale)  # the default is left out, so that all spellings give the same node
        return Spelling(self.name, "attention", [node], replaced, [q, k, v], meaning(self.layout, batch, keys, extra))

    def _changes(self, name: str, argument, defaults: Mapping) -> str | None:
        """Why an argument that has no role may change the result; None if it does not. At its default, a call that was
        registered as attention is attention."""
        if name in IGNORED or name in self.ignored or (name in defaults and not isinstance(argument, Node) and argument == defaults[name]):
            return None
        argument = tuple(argument) if isinstance(argument, list) else argument
        allowed = (*self.neutral.get(name, ()), *NEUTRAL.get(name, ()))
        if argument is None or any(not isinstance(argument, Node) and argument == a for a in allowed):
            return None
        if allowed:
            return f"argument {name} = {argument} changes what is computed (only {' or '.join(map(repr, allowed))} is plain attention)"
        return (f"argument {name} = {argument} is not known to leave the result alone; say so with ignored=({name!r},) or "
                f"neutral={{{name!r}: (value, ...)}}")

    def _lengths(self, of: Callable, queries, keys) -> tuple[int, object] | str:
        """(samples packed along S, 0 if there is a batch axis; keys that are valid, None if all are), or why that is not known."""
        packed, valid = "B" not in self.layout, None
        if packed and of("cu_q") is not None:
            cu = [_numbers(of(r)) for r in ("cu_q", "cu_k" if of("cu_k") is not None else "cu_q")]
            if None in cu:
                return ("its cu_seqlens are no constants of this graph, so that nothing says which tokens belong together; build them from "
                        "Python numbers (a family's prepare hook can)")
            lengths = [[b - a for a, b in zip(c, c[1:])] for c in cu]
            if any(len(set(n)) != 1 for n in lengths) or len(lengths[0]) != len(lengths[1]):
                return f"its samples have different lengths ({lengths[0]} queries, {lengths[1]} keys)"
            batch = len(lengths[0])
            if not known(queries == cu[0][-1]):
                return f"it is given {queries} packed queries, of which {cu[0][-1]} are valid"
            if not known(keys == cu[1][-1]):
                if batch > 1:
                    return f"it is given {keys} packed keys, of which {cu[1][-1]} are valid"
                valid = cu[1][-1]
        else:
            batch = 1 if packed else 0
        for role, whole in (("q_lens", queries), ("k_lens", keys)):
            if of(role) is None:
                continue
            lens = _numbers(of(role))
            if lens is None:
                return f"its {role} are no constants of this graph; give them as Python numbers (a family's prepare hook can)"
            if len(set(lens)) != 1:
                return f"its {role} differ between samples: {lens}"
            if known(whole // max(batch, 1) == lens[0]):
                continue
            if role == "q_lens" or batch > 1:
                return f"only {lens[0]} of {whole} {'queries' if role == 'q_lens' else 'keys'} are valid"
            valid = lens[0]
        if of("mask") is not None:
            mask = prefix(of("mask"), keys)
            if isinstance(mask, str):
                return mask
            valid = mask if valid is None else valid if mask is None else min(valid, mask)
        return batch, valid


def prefix(mask, keys) -> int | None | str:
    """How many keys a boolean mask [..., keys] allows to every query, the first ones; None if all, else why it is no such mask."""
    mask = constant(mask)
    if not isinstance(mask, torch.Tensor):
        return "its mask is no constant of this graph, so that nothing says which keys are valid; slice keys and values instead"
    if mask.dtype != torch.bool or mask.shape[-1] != keys:
        return f"its mask is {mask.dtype} {tuple(mask.shape)}; needed: bool [..., {keys} keys]"
    rows = mask.reshape(-1, keys)
    count = int(rows[0].sum())
    if not bool((rows == (torch.arange(keys) < count)).all()) or not count:
        return "its mask does not allow the same first keys to every query"
    return None if count == keys else count


def _numbers(given) -> list[int] | None:
    """A vector of whole numbers that is known while compiling."""
    found = constant(given)
    if isinstance(found, torch.Tensor) and found.dim() <= 1 and not found.is_floating_point():
        return found.reshape(-1).tolist()
    if isinstance(found, (list, tuple)) and found and all(isinstance(i, int) for i in found):
        return list(found)
    return None


def meaning(layout: str, batch: int, keys: int | None, extra: Mapping) -> Callable:
    """The call as a function of q, k and v in its layout. batch: samples packed along S, 0 if the layout has B."""
    full = layout if "B" in layout else layout.replace("S", "BS")
    to = [full.index(letter) for letter in "BHSD"]
    back = ["BHSD".index(letter) for letter in full]

    def heads_first(x):
        if batch:
            axis = layout.index("S")
            x = x.unsqueeze(axis) if batch == 1 else x.unflatten(axis, (batch, -1))
        return _permuted(x, to)

    def run(q, k, v):
        q, k, v = heads_first(q), heads_first(k), heads_first(v)
        if keys is not None:
            k, v = k[:, :, :keys], v[:, :, :keys]
        out = _permuted(F.scaled_dot_product_attention(q, k, v, **extra), back)
        if batch:
            axis = layout.index("S")
            out = out.squeeze(axis) if batch == 1 else out.flatten(axis, axis + 1)
        return out

    return run


def _permuted(x, order: list[int]):
    if order == sorted(order):
        return x
    moved = [i for i, o in enumerate(order) if i != o]
    return x.transpose(*moved) if len(moved) == 2 else x.permute(*order)

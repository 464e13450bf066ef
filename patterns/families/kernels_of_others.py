"""Attention operators of well-known packages, by name: nothing of theirs is imported."""

from __future__ import annotations

from ..registry import register_attention

# flash-attn 2.7 and newer register their kernels as operators, which Dynamo traces flash_attn_func and its kin down to.
register_attention("flash_attn", call="flash_attn::_flash_attn_forward", layout="BSHD", result=0)
register_attention("flash_attn_varlen", call="flash_attn::_flash_attn_varlen_forward", layout="SHD", result=0)

"""Doom World, the example model of this project: a whole chunk (context prefill and denoising loop) as one function."""

from __future__ import annotations

from ..registry import Family, register_family

FAMILY = register_family(Family(
    name="doom_world",
    description="small first-person world of the examples; chunk function, 12 x 16 tokens a frame",
    roles={"history_w2c": "l_context_w2c_", "current_w2c": "l_w2c_"},
))

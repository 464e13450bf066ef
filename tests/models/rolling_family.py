"""The family of ``rolling.py``: an opaque attention, preallocated caches, chunks of four latents."""

from __future__ import annotations

from li_compile.patterns import Family, register_attention, register_family

register_attention("li_models", call="li_models::attend", layout="BSHD")

FAMILY = register_family(Family(
    name="rolling",
    description="few-step causal world with a rolling cache (the form of Self-Forcing and Matrix-Game-2)",
    modules=("models.rolling.RollingWorld",),
    attention=("li_models",),
    context="slices",
    positions="keep",  # cached keys are rotated already
))

"""The family of ``paired.py``: packed attention; padding, and lengths that are tensors, are hidden before tracing."""

from __future__ import annotations

from li_compile.patterns import Family, register_attention, register_family

register_attention("li_models_varlen", call="li_models::varlen", layout="SHD")


def prepare(model, patch) -> None:
    """Sequences of one sample need no padding, and then every key is valid: lengths say nothing."""
    patch(model, "room", 0)
    patch(model, "lengths", lambda tokens: None)


FAMILY = register_family(Family(
    name="paired",
    description="all frames at once, guidance as two calls (the form of LingBot and Wan2.2)",
    modules=("models.paired.PairedWorld",),
    prepare=prepare,
    groups={"self-attention": "blocks"},
    attention=("li_models_varlen",),
))

"""The family of ``axial.py``: attention within a frame and over the times of a pixel, too small to select from."""

from __future__ import annotations

from li_compile.patterns import Family, register_attention, register_family

register_attention("li_models", call="li_models::attend", layout="BSHD")

FAMILY = register_family(Family(
    name="axial",
    description="a frame at a time, axial attention (the form of open-oasis)",
    modules=("models.axial.AxialWorld",),
    groups={"within a frame": "spatial", "over time": "temporal"},
    attention=("li_models",),
    opt_out=("within a frame", "over time", "context"),
))

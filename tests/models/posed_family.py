"""The family of ``posed.py``: unrotated cached keys; the keep-mask is dropped, since frames are kept by pruning."""

from __future__ import annotations

from li_compile.patterns import Family, register_family


def prepare(model, patch) -> None:
    """All frames that are handed in count: which ones are is the plan's to say."""
    patch(model, "mask", lambda keep, frames: None)


FAMILY = register_family(Family(
    name="posed",
    description="cached keys before rotation, cameras, keep-mask (the form of Matrix-Game-3.5)",
    modules=("models.posed.PosedWorld",),
    prepare=prepare,
    roles={"history_w2c": "past_w2c", "current_w2c": "l_w2c_"},
    positions="compact",
))

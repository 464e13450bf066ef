"""Kept context over time, as a picture. Needs matplotlib (``pip install 'li_compile[plot]'``)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from li_compile.errors import LightInteractionError
from li_compile.policies.base import ChunkPlan

__all__ = ["plot_context"]


def plot_context(plans: Sequence[ChunkPlan], path: str | pathlib.Path) -> None:
    """Draw plans, one a column: which positions of the history each chunk kept, and below it length, score and coverage.

    A position kept for being new (``plan.window``) is drawn apart from one that was retrieved; a history given only in
    part is drawn by its positions in what was given. A chunk with reused steps is marked, a teleport is a dashed line.

    Raises:
        LightInteractionError: no plans, or matplotlib is missing.
    """
    if not plans:
        raise LightInteractionError("there is nothing to draw: no chunk was recorded; call record() after each chunk")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LightInteractionError("drawing needs matplotlib; run pip install 'li_compile[plot]'") from None

    figure = Figure(figsize=(max(6.0, 0.45 * len(plans)), 6.5), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: its global state is the caller's
    kept, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for chunk, plan in enumerate(plans):
        kept.plot([chunk, chunk], [-0.5, plan.history - 0.5], color="0.9", linewidth=8, solid_capstyle="butt", zorder=0)
        newest = plan.history - plan.window
        for style, chosen in ({"color": "tab:blue"}, [i for i in plan.indices if i < newest]), \
                ({"color": "tab:orange"}, [i for i in plan.indices if i >= newest]):
            kept.scatter([chunk] * len(chosen), chosen, marker="s", s=18, **style)
        if plan.reuse:
            kept.annotate("r", (chunk, plan.history), ha="center", va="bottom", fontsize=8)
        if plan.teleported:
            kept.axvline(chunk - 0.5, color="tab:red", linestyle="--", linewidth=1)
    kept.scatter([], [], marker="s", s=18, color="tab:blue", label="kept for what it shows")
    kept.scatter([], [], marker="s", s=18, color="tab:orange", label="kept for being new")
    kept.plot([], [], color="0.9", linewidth=8, label="history given")
    kept.set_ylabel("position in the history")
    kept.legend(loc="upper left", fontsize=8, frameon=False)
    kept.set_title(f"{sum(len(p.indices) for p in plans)} of {sum(p.history for p in plans)} context latents kept (r: steps reused)",
                   fontsize=10)
    below.bar(range(len(plans)), [len(p.indices) for p in plans], color="0.75")
    below.set_ylabel("latents kept")
    below.set_xlabel("chunk")
    share = below.twinx()
    share.set_ylim(0, 1.05)
    share.set_ylabel("share of the view")
    share.plot(range(len(plans)), [p.score for p in plans], color="tab:green", marker=".", label="best old overlap")
    known = [(i, p.coverage) for i, p in enumerate(plans) if p.coverage is not None]
    if known:
        share.plot(*zip(*known), color="tab:purple", marker=".", label="covered by what is kept")
    share.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

"""``gates="device"``: one graph that computes every step or reuses some, as its last input says (``torch.cond``)."""

from __future__ import annotations

from torch.fx import GraphModule

from li_compile.config import Config
from li_compile.errors import ExportError
from li_compile.passes.gated_steps import gated_steps
from li_compile.passes.propagate import tidy
from li_compile.passes.record import Record, Refused
from li_compile.patterns import Family
from li_compile.reuse import found_loop, skipping


def gate_steps(module: GraphModule, family: Family | None, config: Config) -> Record:
    """Make reuse of a graph's steps its last input. module: without nested regions. Raises ExportError where it cannot be."""
    try:
        loop = found_loop(module, family)
    except Refused as why:
        raise ExportError(f"no denoising loop was found: {_told(why)}") from None
    try:
        record = gated_steps(module, loop, skipping(loop.steps, config))
    except Refused as why:
        raise ExportError(f"steps cannot be skipped: {_told(why)}") from None
    tidy(module)
    return record


def _told(why: Refused) -> str:
    return f"{why.miss.reason} ({why.miss.node} {why.miss.where})"

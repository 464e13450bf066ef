"""Graph breaks: where tracing stopped, at which of the user's lines, and whether something here would remove it."""

from __future__ import annotations

import dataclasses
import pathlib
import traceback

import torch

import li_compile
from li_compile import _compat


@dataclasses.dataclass
class Break:
    """A place at which tracing stopped and began anew behind it; patterns that reach across are not found.

    where: the user's line as ``file:line``, code: what stands there; reason, advice: PyTorch's; times: how often.
    preparation: whether the family's preparation would remove it.
    """

    reason: str
    where: str
    code: str
    advice: list[str]
    times: int
    preparation: str

    def __str__(self) -> str:
        return f"{self.reason} at {self.where or 'an unknown line'}: {self.code} ({self.times} x). {self.preparation}"


def breaks_met(preparation: str) -> list[Break]:
    """The graph breaks that Dynamo met since ``_compat.forget_breaks``, one for each reason and line."""
    found: dict[tuple[str, str], Break] = {}
    for text, frames in _compat.graph_breaks():
        lines = text.splitlines()
        reason = lines[0]
        if reason.startswith("generic_jump"):
            reason = "a branch on the contents of a tensor"
        say = [line.partition(":")[2].strip() for line in lines if line.strip().startswith(("Explanation:", "Hint:"))]
        where, code = _place(frames)
        # A break inside a call is met again for every caller; it is one.
        one = found.setdefault((reason, where), Break(reason, where, code, say, 0, preparation))
        one.times += 1
    return list(found.values())


def ended(error: Exception, preparation: str) -> Break:
    """What to say where the function raised behind a graph break: ``explain`` hands zeros on there, and no real values."""
    ours = tuple(str(pathlib.Path(package.__file__).parent) for package in (torch, li_compile))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    reason = f"what follows was not traced: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    advice = ["Behind a graph break explain goes on with zeros in place of the model's values; code that reads them as sizes or "
              "indices cannot follow. Remove the breaks before it, in the model or in a family's preparation, and explain again."]
    return Break(reason, *_place(frames), advice, 1, preparation)


def _place(frames: list[traceback.FrameSummary]) -> tuple[str, str]:
    """``file:line`` of the innermost frame, and what stands there; empty if there is none."""
    return (f"{frames[-1].filename}:{frames[-1].lineno}", (frames[-1].line or "").strip()) if frames else ("", "")


def preparation_of(family) -> str:
    """What the family's preparation does about breaks that are met, in a sentence."""
    if family is None:
        return "No preparation was tried: no family is known for this model (li-compile families)."
    if family.prepare is None:
        return f"No preparation would remove it: family {family.name} has none."
    return f"The preparation of family {family.name} was in force and did not remove it."

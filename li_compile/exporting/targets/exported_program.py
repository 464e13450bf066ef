"""``torch.export`` programs: run wherever this PyTorch runs, in Python."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch

from li_compile.exporting.manifest import VariantEntry
from li_compile.exporting.program import Program, bound

PACKAGES: tuple[str, ...] = ()
TIED: tuple[str, ...] = ("torch",)
FIXED = False
HOLDS_WEIGHTS = False


def unavailable() -> str | None:
    return None


def write(program: Program, folder: pathlib.Path, name: str, aliases: dict[str, str], note: Callable[[str], None]) -> dict[str, Any]:
    program.exported._example_inputs = None  # the weights are among them, and would be saved with every variant
    torch.export.save(program.exported, folder / f"{name}.pt2")
    return {"program": f"{name}.pt2"}


def open_variant(folder: pathlib.Path, entry: VariantEntry, device: torch.device) -> Callable[..., Any]:
    return bound(torch.export.load(folder / entry.parts["program"]), {})

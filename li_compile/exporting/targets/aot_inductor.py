"""AOTInductor packages: compiled machine code. Operators of ours that are left in them are called, and must be registered in the process."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import torch

from li_compile.exporting.manifest import VariantEntry
from li_compile.exporting.program import Program

PACKAGES: tuple[str, ...] = ()
TIED: tuple[str, ...] = ("torch",)
FIXED = False
HOLDS_WEIGHTS = False


def unavailable() -> str | None:
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        return "AOTInductor builds with a C++ compiler, and there is no g++ or clang++ on PATH: install g++"
    return None


def write(program: Program, folder: pathlib.Path, name: str, aliases: dict[str, str], note: Callable[[str], None]) -> dict[str, Any]:
    from torch._inductor import aoti_compile_and_package

    # Reuse of buffers across a condition fails in 2.11 ("Start index out of bounds"); without one it saves memory.
    gated = any(n.target is torch.ops.higher_order.cond for n in program.exported.graph.nodes)
    aoti_compile_and_package(program.exported, package_path=str(folder / f"{name}.pt2"),
                             inductor_configs={"allow_buffer_reuse": False} if gated else {})
    return {"package": f"{name}.pt2"}


def open_variant(folder: pathlib.Path, entry: VariantEntry, device: torch.device) -> Callable[..., Any]:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(folder / entry.parts["package"]))

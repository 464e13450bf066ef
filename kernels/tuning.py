"""Launch configurations that were measured: tuned.json, which ``benchmarks/tune_attention.py`` writes on a GPU.

A kernel asks for its entry and goes by its own rule where there is none (an architecture, head size or block size that
nobody has measured yet). Entries hold for fp16 and bf16.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import json
from collections.abc import Iterator

__all__ = ["TABLE", "key", "table", "trial", "tuned"]

TABLE = "tuned.json"


@functools.cache
def table() -> dict[str, dict[str, int] | None]:
    """``"<kernel> sm_<capability> head_dim <D> block <B>"`` -> the options that the kernel's ``Launch`` is made with."""
    rows = json.loads(importlib.resources.files(__package__).joinpath(TABLE).read_text())["configurations"]
    return {key: row["launch"] for key, row in rows.items()}


def key(kernel: str, capability: int, head_dim: int, block_size: int) -> str:
    return f"{kernel} sm_{capability} head_dim {head_dim} block {block_size}"


def tuned(kernel: str, capability: int, head_dim: int, block_size: int) -> dict[str, int] | None:
    """The measured options, or None. capability: 80, 90 and so on."""
    return table().get(key(kernel, capability, head_dim, block_size))


@contextlib.contextmanager
def trial(kernel: str, capability: int, head_dim: int, block_size: int, launch: dict[str, int] | None) -> Iterator[None]:
    """Inside, this entry is used in place of the table's, or the kernel's own rule where it is None: for measuring."""
    name, before = key(kernel, capability, head_dim, block_size), dict(table())
    table()[name] = launch
    try:
        yield
    finally:
        table().clear()
        table().update(before)

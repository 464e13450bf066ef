"""li_compile: a torch.compile backend for video world models.

    torch.compile(model, backend="light_interaction", options={"preset": "all"})

needs no import of this package. What it exports is loaded on first use, so that importing it costs nothing: torch is
imported by the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it; None: the name is that module. Only what exists is listed. A function must not
# share its module's name (a function `explain` in `li_compile/explain.py`): the import system sets the module as an
# attribute of this package as soon as anyone imports it, and the function would be hidden behind it.
_EXPORTS: dict[str, str | None] = {
    "CacheConfig": "li_compile.config",
    "ChunkPlan": "li_compile.policy",
    "Config": "li_compile.config",
    "ContextConfig": "li_compile.config",
    "ExactConfig": "li_compile.config",
    "LightInteractionError": "li_compile.errors",
    "Report": "li_compile.report",
    "Session": "li_compile.session",
    "SparseConfig": "li_compile.config",
    "compile": "li_compile.compiling",
    "explain": "li_compile.explaining",
    "export": "li_compile.exporting",
    "export_report": "li_compile.exporting",
    "last_report": "li_compile.backend",
    "load": "li_compile.exporting",
    "patterns": None,
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 - names, resolved by __getattr__


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'li_compile' has no attribute {name!r}")
    module = _EXPORTS[name]
    value = importlib.import_module(module or f"li_compile.{name}")
    if module is not None:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""What an artifact can be: one module a target.

Each has ``unavailable()`` (why it cannot be had here, or None), ``PACKAGES`` (whose versions the manifest notes), ``TIED`` (those
that must be the same where it is loaded), ``FIXED`` (whether weights are
constants of the program), ``HOLDS_WEIGHTS`` (whether each variant's files hold their own), ``write(program, folder, name, aliases, note)``, which gives what the manifest keeps of a variant (the weights are in
the folder already; aliases: weight -> the name under which it is there), and ``open_variant(folder, entry, device)``, a callable of the program's
arguments.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from li_compile.errors import ExportError
from li_compile.exporting.manifest import TARGETS


def target_module(name: str) -> ModuleType:
    """Raises ExportError for a target that there is not."""
    if name not in TARGETS:
        raise ExportError(f"target {name!r} is unknown; choose one of {', '.join(TARGETS)}")
    return importlib.import_module(f"li_compile.exporting.targets.{name}")

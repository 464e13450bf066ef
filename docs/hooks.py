"""MkDocs calls these. The reference needs the package as it is installed."""

from __future__ import annotations

import pathlib
import shutil
import tomllib

from mkdocs.plugins import event_priority


@event_priority(100)  # before mkdocstrings looks for the folder: one that is not there yet is left out of its search paths
def on_config(config):
    """Before the pages are looked for: lay out the package for the reference."""
    root = pathlib.Path(config.config_file_path).parent
    lay_out(root, root / "out" / "package")
    return config


def lay_out(root: pathlib.Path, to: pathlib.Path) -> None:
    """Copy the code folders to where they are when installed, as pyproject.toml says."""
    shutil.rmtree(to, ignore_errors=True)
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(folders.items()):
        target = to / package.replace(".", "/")
        shutil.copytree(root / folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)

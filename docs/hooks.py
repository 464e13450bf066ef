"""MkDocs calls these. The reference needs the package as it is installed; and one page of the navigation may be missing yet."""

from __future__ import annotations

import os
import pathlib
import shutil
import tomllib

COMING = {"write_a_family.md"}  # any other missing page is an error of the build


def on_config(config):
    """Before the pages are looked for: leave out what is still to come, lay out the package for the reference."""
    here, root = pathlib.Path(config.docs_dir), pathlib.Path(config.config_file_path).parent
    config.nav = [_kept(entry, here) for entry in config.nav]
    lay_out(root, root / "out" / "package")
    os.chdir(root / "out")  # a folder li_compile where we stand would be taken for the package
    return config


def _kept(entry: dict, here: pathlib.Path) -> dict:
    missing = lambda target: target in COMING and not (here / target).exists()
    return {title: [e for e in target if not any(map(missing, e.values()))] if isinstance(target, list) else target
            for title, target in entry.items()}


def lay_out(root: pathlib.Path, to: pathlib.Path) -> None:
    """Copy the code folders to where they are when installed, as pyproject.toml says."""
    shutil.rmtree(to, ignore_errors=True)
    folders = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for package, folder in sorted(folders.items()):
        target = to / package.replace(".", "/")
        shutil.copytree(root / folder, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)

"""``li-compile doctor``: is everything here that compiling needs, and what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from typing import Annotated

import typer


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. status: "ok", "missing" (something will not work) or "note" (all right as it is)."""

    name: str
    status: str
    found: str
    advice: str = ""


def command(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check versions, GPU, host compiler, cache folder and registration. Exits with 1 if something is missing."""
    findings = [_guarded(check) for check in CHECKS]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    raise typer.Exit(1 if any(finding.status == "missing" for finding in findings) else 0)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "missing": "red", "note": "yellow"}
    table = Table("check", "status", "found", "what to do")
    for finding in findings:
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(finding.name, status, escape(finding.found), escape(finding.advice))
    Console().print(table)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a broken install must not keep the other lines from being read
        return Finding(check.__name__.strip("_"), "missing", f"{type(error).__name__}: {error}")


def _version(package: str, advice: str, *, needed: bool = True) -> Finding:
    try:
        return Finding(package, "ok", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "missing" if needed else "note", "not installed", advice)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    return _version("torch", "pip install 'torch>=2.11'")


def _triton() -> Finding:
    return _version("triton", "pip install 'triton>=3.6'; without it only the CPU lowerings run", needed=False)


def _numpy() -> Finding:
    return _version("numpy", "pip install numpy")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "note", "none that torch can use", "CPU lowerings are used")
    device = torch.cuda.get_device_properties(0)
    more = f", {torch.cuda.device_count()} in all" if torch.cuda.device_count() > 1 else ""
    found = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB{more}"
    if device.major < 8:
        return Finding("gpu", "note", found, "compute capability 8.0 or newer is needed for the bfloat16 kernels")
    return Finding("gpu", "ok", found)


def _compiler() -> Finding:
    names = [os.environ.get("CXX"), "g++", "clang++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        advice = "install g++, or set CXX: Inductor builds with it"
        return Finding("c++ compiler", "missing", "no g++ or clang++ on PATH", advice)
    return Finding("c++ compiler", "ok", path)


def _cache() -> Finding:
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # private: the same in 2.11 to 2.14

    folder = cache_dir()
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("inductor cache", "ok", folder)
    except OSError as error:
        advice = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        return Finding("inductor cache", "missing", f"{folder}: {error.strerror}", advice)


def _backend() -> Finding:
    name = "light_interaction"
    entries = list(importlib.metadata.entry_points(group="torch_dynamo_backends", name=name))
    if not entries:
        advice = "install the package: pip install -e . in a checkout"
        return Finding("backend", "missing", f"{name} is not registered", advice)
    entries[0].load()
    return Finding("backend", "ok", f"{name} = {entries[0].value}")


def _families() -> Finding:
    from li_compile.cli.families import registered

    known = registered()
    if not known:
        return Finding("families", "note", "none registered", "models are matched by pattern alone")
    return Finding("families", "ok", ", ".join(name for name, _ in known))


CHECKS = (_python, _torch, _triton, _numpy, _gpu, _compiler, _cache, _backend, _families)

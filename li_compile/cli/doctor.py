"""``li-compile doctor``: is everything here that compiling needs, and what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Annotated

import typer

ROOM = 2**30  # bytes that a cache's disk must have left


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. status: "ok", "missing" (something will not work) or "note" (all right as it is). advice:
    what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""


def command(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check versions, GPU, kernels, C++ compiler, cache folders and registration. Exits with 1 if something is missing."""
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
        name = check.__name__.strip("_")
        return Finding(name, "missing", f"{type(error).__name__}: {error}", "reinstall what this names, in a fresh environment if it stays")


def _requirement(package: str, problem: str, advice: str, *, needed: bool = True) -> Finding:
    """A package against what our own metadata asks for."""
    from packaging.requirements import Requirement

    asked = [r for text in importlib.metadata.requires("li_compile") or [] if (r := Requirement(text)).name == package and not r.extras]
    here = next((r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})), None)
    wanted = f"{package}{here.specifier}" if here else package
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, "missing" if needed and here else "note", "not installed", f"{problem}: {advice.format(wanted)}")
    if here and not here.specifier.contains(found, prereleases=True):
        return Finding(package, "missing", f"{found}, needed: {here.specifier}", advice.format(wanted))
    return Finding(package, "ok", found)


def _python() -> Finding:
    from packaging.specifiers import SpecifierSet

    wanted = importlib.metadata.metadata("li_compile")["Requires-Python"] or ""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Finding("python", "missing", found, f"make an environment with Python {wanted} and install there")
    return Finding("python", "ok", found)


def _torch() -> Finding:
    return _requirement("torch", "nothing works without it", "pip install '{}'")


def _triton() -> Finding:
    return _requirement("triton", "only the CPU and reference kernels run", "pip install '{}'", needed=False)


def _numpy() -> Finding:
    return _requirement("numpy", "planning needs it", "pip install '{}'")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0:
            built = torch.version.cuda
            advice = f"update the driver to one for CUDA {built}" if built else \
                "this torch is built without CUDA: install one with it, see https://pytorch.org/get-started/locally"
            return Finding("gpu", "missing", "an NVIDIA GPU that torch cannot use", advice)
        return Finding("gpu", "note", "none that torch can use", "nothing to do: the CPU kernels are used")
    (torch.ones(8, device="cuda") + 1).sum().item()  # a driver that is too old is seen here at the latest
    device = torch.cuda.get_device_properties(0)
    more = f", {torch.cuda.device_count()} in all" if torch.cuda.device_count() > 1 else ""
    found = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB{more}"
    if device.major < 8:
        return Finding("gpu", "note", found, "the kernels need compute capability 8.0 or newer: use such a GPU, or the reference "
                                             "(slow) stands in")
    return Finding("gpu", "ok", found)


def _kernels() -> Finding:
    """Which attention kernel bf16 and fp32 tensors of usual sizes would get here, and why no better one."""
    import torch

    from li_compile.kernels import expected_provider

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {str(dtype).removeprefix("torch."): expected_provider(torch.empty(1, 1, 256, 128, dtype=dtype, device=device), 128)
              for dtype in (torch.bfloat16, torch.float32)}
    found = "; ".join(f"{dtype}: {name} ({why})" for dtype, (name, why) in chosen.items())
    if any(name == "reference" for name, _ in chosen.values()):
        return Finding("attention kernel", "note", found, "the reference is for checking, not for speed: install Triton 3.6 or newer and "
                                                          "use a GPU of compute capability 8.0 or newer")
    return Finding("attention kernel", "ok", found)


def _compiler() -> Finding:
    """Builds a program with OpenMP, as Inductor does."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        advice = "install g++ (apt-get install g++), or set CXX to a C++ compiler: Inductor builds with it"
        return Finding("c++ compiler", "missing", "no g++ or clang++ on PATH", advice)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nextern \"C\" int probe() { return omp_get_max_threads(); }\n")
        run = subprocess.run([path, "-std=c++17", "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(source.with_suffix(".so"))],
                             capture_output=True, text=True, timeout=60)
    if run.returncode:
        said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200])
        return Finding("c++ compiler", "missing", f"{path} cannot build with OpenMP: {said}",
                       "install g++ with libgomp (apt-get install g++ libgomp1)")
    return Finding("c++ compiler", "ok", f"{path}, builds with OpenMP")


def _inductor_cache() -> Finding:
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # private: the same in 2.11 to 2.14

    return _folder("inductor cache", cache_dir(), "TORCHINDUCTOR_CACHE_DIR")


def _triton_cache() -> Finding:
    folder = os.environ.get("TRITON_CACHE_DIR") or pathlib.Path(os.environ.get("TRITON_HOME", pathlib.Path.home()), ".triton", "cache")
    return _folder("triton cache", str(folder), "TRITON_CACHE_DIR")


def _folder(name: str, folder: str, variable: str) -> Finding:
    """Whether a cache folder can be written, how much it holds, and whether there is room."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(name, "missing", f"{folder}: {error.strerror}", f"set {variable} to a folder that can be written")
    sizes = [path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    found = f"{folder}, {sum(sizes) / 2**20:,.0f} MiB in {len(sizes):,} files, {free / 2**30:,.1f} GiB free"
    if free < ROOM:
        return Finding(name, "missing", found, f"make room, or set {variable} to a folder on another disk; it may be emptied at any time")
    return Finding(name, "ok", found)


def _backend() -> Finding:
    name = "light_interaction"
    entries = list(importlib.metadata.entry_points(group="torch_dynamo_backends", name=name))
    if not entries:
        advice = "install the package: pip install -e . in a checkout"
        return Finding("backend", "missing", f"{name} is not registered", advice)
    if len({entry.value for entry in entries}) > 1:
        return Finding("backend", "missing", f"{name} is registered as {' and as '.join(entry.value for entry in entries)}",
                       "uninstall the package that is not to be used (pip list)")
    entries[0].load()
    return Finding("backend", "ok", f"{name} = {entries[0].value}")


def _families() -> Finding:
    from li_compile.cli.families import registered

    known = registered()
    if not known:
        return Finding("families", "note", "none registered", "models are matched by pattern alone")
    return Finding("families", "ok", ", ".join(name for name, _ in known))


def _export(name: str) -> Finding:
    """What an export target can do here: build, and run what was built."""
    from li_compile.exporting.manifest import versions
    from li_compile.exporting.targets import target_module

    target = target_module(name)
    found = {p: v for p, v in versions(*target.PACKAGES).items() if p in target.PACKAGES}
    told = ", ".join(f"{p} {v}" for p, v in found.items())
    why = target.unavailable()
    if why is not None:
        problem, _, advice = why.partition(": ")
        return Finding(f"export to {name}", "note", f"{told + ': ' if told else ''}{problem}", advice or "nothing to do, if it is not needed")
    if name == "onnx" and "onnxruntime" not in found:
        return Finding(f"export to {name}", "note", f"{told}: builds; li_compile.load cannot run it", "pip install onnxruntime")
    return Finding(f"export to {name}", "ok", f"{told + ': ' if told else ''}builds and runs")


def _exported_program() -> Finding:
    return _export("exported_program")


def _aot_inductor() -> Finding:
    return _export("aot_inductor")


def _onnx() -> Finding:
    return _export("onnx")


def _tensorrt() -> Finding:
    return _export("tensorrt")


def _tensorrt_plugin() -> Finding:
    """What sparse="plugin" can do here."""
    from li_compile.exporting.targets.tensorrt_plugin import why_no_plugin

    if (why := why_no_plugin()) is not None:
        problem, _, advice = why.rpartition(": ")
        return Finding("tensorrt plugin", "note", problem, advice)
    return Finding("tensorrt plugin", "note", "can be registered, its kernel compiled (sm_80, which newer GPUs run); experimental: no engine with it was "
                   "ever run", "nothing to do, if it is not needed; else compare an engine's results with another target's")


CHECKS = (_python, _torch, _triton, _numpy, _gpu, _kernels, _compiler, _inductor_cache, _triton_cache, _backend, _families,
          _exported_program, _aot_inductor, _onnx, _tensorrt, _tensorrt_plugin)

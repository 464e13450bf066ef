"""For tests alone: standard TensorRT as far as it can be had without NVIDIA's own package index and without a GPU. No engine can be built.

Its Python bindings are on PyPI, and so is the lean runtime, in which the registry of plugins is the real one; the library of the builder is
not. So the three libraries that the bindings are linked with are made here, of entry points that give nothing back, over the lean runtime.
With them ``tensorrt``, ``tensorrt.plugin`` and Torch-TensorRT can be imported, plugins registered and graphs parted; a ``trt.Builder``
cannot be made.

    python tests/standard_tensorrt.py FOLDER     # then PYTHONPATH=FOLDER python tests/tensorrt_plugin.py
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

import torch
from packaging.requirements import Requirement

STUB = """
#include <stddef.h>
void* createInferBuilder_INTERNAL(void* logger, int version) { return NULL; }
void* getBuilderPluginRegistry(int capability) { return NULL; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { return NULL; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { return NULL; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void* logger, const char* space) { return 1; }
"""


class CannotBeHad(Exception):
    """A package or tool is missing; says which."""


def make(folder: pathlib.Path) -> pathlib.Path:
    """A folder for PYTHONPATH, with the Torch-TensorRT that belongs to this torch and the TensorRT that belongs to that."""
    if shutil.which("gcc") is None:
        raise CannotBeHad("there is no gcc")
    minor = ".".join(torch.__version__.split(".")[:2])
    _pip("install", "--target", str(folder), f"torch-tensorrt=={minor}.*", "dllist")
    (found,) = importlib.metadata.distributions(name="torch-tensorrt", path=[str(folder)])
    wanted = [r for text in found.requires if (r := Requirement(text)).name == "tensorrt-cu13-bindings"]
    if not wanted:
        raise CannotBeHad(f"torch-tensorrt {found.version} is not for CUDA 13")
    _pip("install", "--target", str(folder), f"tensorrt-cu13-bindings{wanted[0].specifier}")
    (bindings,) = importlib.metadata.distributions(name="tensorrt-cu13-bindings", path=[str(folder)])
    _pip("install", "--target", str(folder), f"tensorrt-cu13=={bindings.version}")
    libraries, major = folder / "tensorrt_bindings", bindings.version.split(".")[0]
    with tempfile.TemporaryDirectory() as scratch:
        _pip("download", "--only-binary=:all:", "-d", scratch, f"tensorrt-lean-cu13-libs=={bindings.version}")
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as held:
            lean = next(n for n in held.namelist() if re.search(r"libnvinfer_lean\.so[.\d]*$", n))
            (libraries / f"libnvinfer_lean.so.{major}").write_bytes(held.read(lean))
        source = pathlib.Path(scratch, "stub.c")
        source.write_text(STUB)
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", libraries / f"lib{name}.so.{major}", source, "-Wl,--no-as-needed",
                            libraries / f"libnvinfer_lean.so.{major}", "-Wl,-rpath,$ORIGIN", f"-Wl,-soname,lib{name}.so.{major}"], check=True)
    return folder


def _pip(*arguments: str) -> None:
    run = subprocess.run([sys.executable, "-m", "pip", *arguments[:1], "--quiet", "--no-deps", "--disable-pip-version-check", *arguments[1:]],
                         capture_output=True, text=True, timeout=150)
    if run.returncode:
        raise CannotBeHad(f"pip {' '.join(arguments)}: {run.stderr.strip().splitlines()[-1]}")


def alone() -> None:
    """Let this process not know of a TensorRT-RTX that is installed beside it: Torch-TensorRT would take that."""
    discover = importlib.metadata.Distribution.discover

    def others(*args, **kwargs):
        return (d for d in discover(*args, **kwargs) if "rtx" not in (d.metadata["Name"] or ""))

    importlib.metadata.Distribution.discover = others


if __name__ == "__main__":
    print(make(pathlib.Path(sys.argv[1])))

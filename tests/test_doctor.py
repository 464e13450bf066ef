"""li-compile doctor: each thing that can be wrong is found, with a sentence on what to do."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import types

import pytest
import torch
from typer.testing import CliRunner

from li_compile.cli import app, doctor


def test_here_all_is_well_and_it_says_with_what(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "new" / "cache"))
    run = CliRunner().invoke(app, ["doctor", "--json"])
    findings = {f["name"]: f for f in json.loads(run.stdout)}
    assert run.exit_code == 0 and not [f for f in findings.values() if f["status"] == "missing"]
    assert findings["torch"]["found"] == importlib.metadata.version("torch")
    assert "builds with OpenMP" in findings["c++ compiler"]["found"]
    assert str(tmp_path) in findings["inductor cache"]["found"] and "0 MiB in 0 files" in findings["inductor cache"]["found"]
    assert "light_interaction = li_compile.lookup:light_interaction" == findings["backend"]["found"]
    if not torch.cuda.is_available():
        assert "float32: cpu" in findings["attention kernel"]["found"] and findings["gpu"]["status"] == "note"
    table = CliRunner().invoke(app, ["doctor"])
    assert table.exit_code == 0 and "OpenMP" in " ".join(table.stdout.split())


def found(check) -> doctor.Finding:
    finding = doctor._guarded(check)
    assert finding.status == "missing" and finding.advice, finding
    return finding


def test_versions_that_are_too_old_or_not_there(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.0" if name in ("torch", "triton") else real(name))
    assert "needed: >=2.11" in found(doctor._torch).found and "torch>=2.11" in found(doctor._torch).advice

    def gone(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    assert "pip install 'torch>=2.11'" in found(doctor._torch).advice
    assert doctor._triton().status == "note"  # without it the CPU kernels run
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert "3.11" in found(doctor._python).advice


def test_no_compiler_and_one_that_cannot_build(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: omp.h: no such file' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "omp.h" in found(doctor._compiler).found and "libgomp" in found(doctor._compiler).advice
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install g++" in found(doctor._compiler).advice


@pytest.mark.parametrize("check, variable", [(doctor._inductor_cache, "TORCHINDUCTOR_CACHE_DIR"), (doctor._triton_cache, "TRITON_CACHE_DIR")])
def test_a_cache_that_cannot_be_written_or_is_full(monkeypatch, tmp_path, check, variable):
    file = tmp_path / "file"
    file.write_text("x")
    monkeypatch.setenv(variable, str(file / "below"))
    if variable.startswith("TORCH"):  # torch makes the folder itself when asked for its name
        monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: str(file / "below"))
    assert f"set {variable}" in found(check).advice
    monkeypatch.undo()
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=5 << 20))
    assert "make room" in found(check).advice


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=0))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in found(doctor._gpu).advice
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "CUDA 13.0" in found(doctor._gpu).advice


def test_a_backend_that_is_not_registered_or_twice(monkeypatch):
    entry = lambda value: types.SimpleNamespace(value=value, load=lambda: None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **k: [])
    assert "pip install -e ." in found(doctor._backend).advice
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **k: [entry("a:b"), entry("c:d")])
    assert "a:b and as c:d" in found(doctor._backend).found


def test_a_problem_gives_exit_code_1_and_one_broken_check_hides_no_other(monkeypatch):
    def broken():
        raise RuntimeError("planted")

    monkeypatch.setattr(doctor, "CHECKS", (broken, doctor._numpy))
    run = CliRunner().invoke(app, ["doctor", "--json"])
    assert run.exit_code == 1
    assert [f["status"] for f in json.loads(run.stdout)] == ["missing", "ok"] and "planted" in run.stdout

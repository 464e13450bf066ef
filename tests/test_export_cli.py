"""``li-compile export`` and ``li-compile run``, and what ``doctor`` says of the targets."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from li_compile.cli import app


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's, in the working directory."""
    (tmp_path / "cli_inputs.py").write_text(
        "import torch\n\ntorch.manual_seed(0)\nmodel = torch.nn.Linear(3, 2)\n\n\n"
        "def given():\n    return model, [torch.ones(4, 3)]\n\n\ndef one():\n    return model, [torch.ones(1, 3)]\n")
    monkeypatch.chdir(tmp_path)
    yield "cli_inputs:given"
    import sys

    sys.modules.pop("cli_inputs", None)


def run(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    return done.exit_code, " ".join(done.output.split())


def test_export_and_run(module, tmp_path):
    code, said = run("export", module, "--path", "out", "--also", "cli_inputs:one", "--preset", "exact")
    assert code == 0 and "exported_program" in said and "all_full" in said and "MiB" in said, said
    code, said = run("run", "out", module, "--save", "result.pt", "--repeat", 2)
    assert code == 0 and "2 variants, gates: variants" in said and "result 0: float32 [4, 2]" in said and "median of 2" in said, said
    import cli_inputs

    with torch.no_grad():
        assert torch.allclose(torch.load("result.pt"), cli_inputs.model(torch.ones(4, 3)))
    assert run("run", "out", "cli_inputs:one")[0] == 0


def test_a_report_alone(module, tmp_path):
    code, said = run("export", module, "--target", "tensorrt")
    assert code == 0 and "tensorrt, gates: variants" in said and not list(tmp_path.glob("*/manifest.json")), said


@pytest.mark.parametrize(("words", "says"), [
    (["export", "MODULE", "--path", ".", "--target", "onnx"], "error: . exists; choose another path"),
    (["export", "MODULE", "--path", "new", "--target", "tflite"], "error: target 'tflite' is unknown"),
    (["export", "MODULE", "--path", "new", "--option", "sparse.topk_ration=1"], "did you mean 'sparse.topk_ratio'"),
    (["run", "nowhere", "MODULE"], "error: there is no folder nowhere"),
])
def test_errors_in_a_sentence(module, words, says):
    code, said = run(*[module if w == "MODULE" else w for w in words])
    assert code == 2 and says in said, said


def test_doctor_names_every_target(monkeypatch):
    from li_compile.exporting.targets import onnx

    findings = {f["name"]: f for f in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)}
    assert findings["export to exported_program"]["status"] == "ok" and findings["export to aot_inductor"]["status"] == "ok"
    assert {"export to onnx", "export to tensorrt"} <= set(findings)
    if not torch.cuda.is_available():
        assert findings["export to tensorrt"]["status"] == "note" and findings["export to tensorrt"]["found"]
    monkeypatch.setattr(onnx, "unavailable", lambda: "ONNX export needs onnx: pip install 'li_compile[onnx]'")
    findings = {f["name"]: f for f in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)}
    assert findings["export to onnx"]["status"] == "note" and findings["export to onnx"]["advice"] == "pip install 'li_compile[onnx]'"

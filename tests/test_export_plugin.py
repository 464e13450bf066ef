"""sparse="plugin" for TensorRT: what becomes of each operator, what is said where it cannot be had, and registration and parts of graphs under
standard TensorRT as far as that can be installed (standard_tensorrt.py), in one other process. No engine is built."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
import standard_tensorrt
import torch
from test_export import SPARSE, Tokens

import li_compile
from li_compile import Config
from li_compile.cli import doctor
from li_compile.errors import BackendUnavailable
from li_compile.exporting.advice import advise
from li_compile.exporting.targets import aot_inductor, tensorrt, tensorrt_plugin
from li_compile.kernels._compat import has_triton

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
INPUTS = [torch.ones(1, 64, 8, 2, 4)]


# Under standard TensorRT.


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """What tensorrt_plugin.py says."""
    if torch.cuda.is_available() or not has_triton() or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and Triton, and no GPU, which the driver's stand-in is no match for")
    try:
        folder = standard_tensorrt.make(tmp_path_factory.mktemp("standard"))
    except standard_tensorrt.CannotBeHad as error:
        pytest.skip(f"standard TensorRT's bindings cannot be had: {error}")
    run = subprocess.run([sys.executable, pathlib.Path(__file__).with_name("tensorrt_plugin.py")], env=os.environ | {"PYTHONPATH": str(folder)},
                         capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_it_is_registered_when_a_graph_needs_it(ran):
    """With TensorRT's registry of plugins and Torch-TensorRT's of converters; what the registry makes is an ahead-of-time plugin."""
    assert ran["why not"] is None and (ran["before"], ran["after"]) == ([False, False], [True, True])
    assert ran["created"] == {"version": "1", "namespace": "li", "class": "_TemplateAOTPlugin", "outputs": ["HALF"]}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "calls", "rest"), [("prefill", 1, {}), ("decode", 3, {"li::pack_context": (1, "native")})])
def test_the_whole_graph_is_one_part_with_it(ran, way, calls, rest):
    made, name = ran[way], {"prefill": "li::sparse_attention", "decode": "li::sparse_decode"}[way]
    assert {o["operator"]: (o["calls"], o["lowering"]) for o in made["operators"]} == {name: (calls, "plugin")} | rest
    (part,) = made["parts"]
    assert part["name"] == "_run_on_acc_0" and part["operators"].count("li.block_sparse_plugin.default") == calls == len(part["plugins"])
    assert [o for o in part["operators"] if o.startswith("li")] == ["li.block_sparse_plugin.default"] * calls
    assert not {"aten._softmax.default", "aten.gather.default", "aten.sort.default"} & {*part["operators"]}  # as attention written out has
    assert "experimental" in made["notes"][0] and made["unavailable"] is None
    for plugin in part["plugins"]:
        kinds = [dtype for _, dtype in plugin]
        assert kinds == [kinds[0]] * 5 + ["torch.int32"] * 5 + ["torch.float32", kinds[0]]
        assert kinds[0] == {"prefill": "torch.float16", "decode": "torch.float32"}[way]
    # What Torch-TensorRT's own passes made of the graph computes what it did.
    assert made["errors"] and all(e <= (1e-3 if way == "prefill" else 1e-5) for errors in made["errors"] for e in errors)


@pytest.mark.slow
def test_auto_is_not_it(ran):
    native = ran["native"]
    assert [o["lowering"] for o in native["operators"]] == ["native"] and not native["parts"][0]["plugins"]
    assert {"aten._softmax.default", "aten.gather.default"} <= {*native["parts"][0]["operators"]}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "calls", "kind"), [("prefill", 1, "HALF"), ("decode", 3, "FLOAT")])
def test_what_tensorrt_is_handed(ran, way, calls, kind):
    """For the shapes of the graph: the kernel that aot_kernel compiles, its launch, no integers, and an output [B, L, H, D] of an input [B, H, L, D]."""
    assert len(ran[way]["kernels"]) == calls
    for kernel in ran[way]["kernels"]:
        assert kernel["same"] and kernel["output"] == [kind, [0, 2, 1, 3]] and kernel["extras"] == 0
        assert kernel["launch"] == kernel["want"] and kernel["launch"][0] > 1 and kernel["launch"][3] == 128


@pytest.mark.slow
def test_the_converter_adds_one_ahead_of_time_plugin(ran):
    """Its inputs in the order of the operator, none of them a shape."""
    (added,) = ran["converted"]["added"]
    assert added["aot"] and added["class"] == "_TemplateAOTPlugin" and added["shapes"] == [] and ran["converted"]["output"] == "output 0"
    assert added["inputs"] == [a.name for a in tensorrt_plugin.OPERATOR._schema.arguments]


@pytest.mark.slow
def test_the_doctor_says_so(ran):
    assert ran["doctor"]["status"] == "note" and ran["doctor"]["found"].startswith("can be registered")
    assert "no engine with it was ever run" in ran["doctor"]["found"]


# What becomes of each operator, anywhere.


def rows(model=None, sparse="plugin", **options) -> list[dict]:
    report = li_compile.export_report(model or Tokens(width=64), INPUTS, target="tensorrt", sparse=sparse, config=Config.from_options(SPARSE | options))
    return report.variants[0].operators


@needs_triton
def test_a_plugin_where_it_is_asked_for():
    (row,) = rows()
    assert (row["operator"], row["calls"], row["lowering"]) == ("li::sparse_attention", 1, "plugin")
    assert row["why"] == "our Triton kernel, for sm_80, reads at most 3 of 4 blocks; experimental: no engine with it was ever run"
    for sparse, how in (("auto", "native"), ("native", "native"), ("segment", "segment")):
        assert rows(sparse=sparse)[0]["lowering"] == how


@needs_triton
@pytest.mark.parametrize(("width", "options", "how", "why"), [
    (16, {}, "native", r"^gathered blocks.*; the plugin's kernel takes head_dim 32, 64, 128, found 8$"),
    (64, {"sparse.summary": True}, "segment", r"^blocks that are left out take part through their means \(sparse.summary\); runs in PyTorch between"),
    (64, {"sparse.prefill_ratio": 1.0}, "native", "^written out; nothing is left out of it$"),
])
def test_where_it_cannot_be_one_the_report_says_why(width, options, how, why):
    report = li_compile.export_report(Tokens(width=width), [torch.ones(1, width, 8, 2, 4)], target="tensorrt", sparse="plugin",
                                      config=Config.from_options(SPARSE | options))
    (row,) = report.variants[0].operators
    assert row["lowering"] == how and re.search(why, row["why"]), row


@needs_triton
def test_it_is_not_advised(monkeypatch):
    for module in (tensorrt, aot_inductor):
        monkeypatch.setattr(module, "unavailable", lambda: None)
    advice = advise(rows(), {"type": "cuda", "name": "L4", "capability": [8, 9]})
    assert advice.target == "aot_inductor"
    assert "in TensorRT li::sparse_attention is a plugin (our Triton kernel, for sm_80, reads at most 3 of 4 blocks; experimental" in advice.why


@needs_triton
def test_what_an_engine_would_compute():
    """The program that would be handed to Torch-TensorRT, run here, against the model's own sparse attention."""
    from li_compile.exporting import building
    from li_compile.exporting.program import make_program
    from li_compile.exporting.trace import trace
    from li_compile.exporting.variants import variants

    model, x, config = Tokens(9, 64), torch.randn(1, 64, 9, 2, 4), Config.from_options(SPARSE)
    results = {}
    for sparse in ("plugin", "segment"):
        traced = trace(model, (x,), {}, config)
        (variant,) = variants(traced, config, "variants")
        building.lower_operators(variant.graph, "tensorrt", sparse, False)
        program = make_program(traced, variant)
        targets = [str(n.target) for n in program.exported.graph.nodes if str(n.target).startswith("li")]
        assert targets == [{"plugin": "li.block_sparse_plugin.default", "segment": "li.sparse_attention.default"}[sparse]]
        given = [traced.tensors[a.name] if a.weight else x for a in program.arguments]
        with torch.no_grad():
            results[sparse] = program.exported.module()(*given)[0]
    with torch.no_grad():
        dense = model(x)
    distance = lambda a, b: ((a - b).norm() / b.norm()).item()
    assert distance(results["plugin"], results["segment"]) <= 1e-6 < 1e-3 < distance(results["plugin"], dense)


# What is said where it cannot be had.


@pytest.fixture
def standard(monkeypatch):
    """A machine on which nothing is in the way."""
    monkeypatch.setattr(tensorrt, "installed", lambda: {"torch-tensorrt": "2.14.0"})
    monkeypatch.setattr(tensorrt_plugin, "has_triton", lambda: True)
    monkeypatch.setattr(tensorrt_plugin, "interpreting", lambda: False)
    monkeypatch.setattr(tensorrt_plugin, "_trtp", lambda: types.SimpleNamespace(aot_impl=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def missing():
    raise OSError("libnvinfer.so.11: cannot open shared object file")


@pytest.mark.parametrize(("changes", "says"), [
    ([], None),
    ([(tensorrt, "installed", lambda: {"torch-tensorrt-rtx": "2.14.0"})],
     r"TensorRT-RTX, which is installed, has no plugin layer: use sparse='native' or 'segment', or standard TensorRT in an environment of its own"),
    ([(tensorrt, "installed", dict)], r"needs standard TensorRT and Torch-TensorRT: pip install 'li_compile\[tensorrt\]'"),
    ([(tensorrt_plugin, "has_triton", lambda: False)], "compiled by Triton, which is not installed: pip install triton"),
    ([(tensorrt_plugin, "interpreting", lambda: True)], "Triton interprets its kernels here, and compiles none: unset TRITON_INTERPRET"),
    ([(torch.cuda, "is_available", lambda: True), (torch.cuda, "get_device_capability", lambda: (7, 5))], "of compute capability 8.0 or newer"),
    ([(tensorrt_plugin, "_trtp", missing)],
     r"tensorrt.plugin cannot be imported \(OSError: libnvinfer.so.11: .*\): reinstall the TensorRT that belongs to torch-tensorrt 2.14.0"),
    ([(tensorrt_plugin, "_trtp", types.SimpleNamespace)],
     "this TensorRT's plugins cannot be compiled ahead of time: install the one that belongs to torch-tensorrt 2.14.0"),
], ids=["nothing", "RTX", "no TensorRT", "no Triton", "Triton's interpreter", "an old GPU", "a broken TensorRT", "an old TensorRT"])
def test_why_not(standard, monkeypatch, tmp_path, changes, says):
    for change in changes:
        monkeypatch.setattr(*change)
    why = tensorrt_plugin.why_no_plugin()
    if says is None:
        assert why is None
        return
    assert re.search(says, why)
    found = doctor._tensorrt_plugin()
    assert found.status == "note" and found.advice and f"{found.found}: {found.advice}" == why
    monkeypatch.setattr(tensorrt, "unavailable", lambda: None)
    config = Config.from_options(SPARSE)
    with pytest.raises(BackendUnavailable, match=says):
        li_compile.export(Tokens(), [torch.ones(1, 16, 8, 2, 4)], target="tensorrt", sparse="plugin", config=config, path=tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_report_says_it_too(standard, monkeypatch):
    monkeypatch.setattr(tensorrt, "installed", lambda: {"torch-tensorrt-rtx": "2.14.0"})
    report = li_compile.export_report(Tokens(), [torch.ones(1, 16, 8, 2, 4)], target="tensorrt", sparse="plugin", config=Config.from_options(SPARSE))
    assert "TensorRT-RTX, which is installed, has no plugin layer" in report.unavailable


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None or importlib.util.find_spec("tensorrt") is not None, reason="needs TensorRT-RTX alone")
def test_tensorrt_rtx_as_it_is_installed():
    assert "has no plugin layer" in tensorrt_plugin.why_no_plugin() and "has no plugin layer" in doctor._tensorrt_plugin().found

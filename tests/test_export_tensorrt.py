"""TensorRT artifacts: engines that are really built, on the CPU, in one other process (tensorrt_builds.py); none is run here."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import li_compile
from li_compile.engine import open_engines
from li_compile.errors import BackendUnavailable
from li_compile.exporting.targets import tensorrt

needs_it = pytest.mark.skipif(torch.cuda.is_available() or importlib.util.find_spec("tensorrt_rtx") is None,
                              reason="torch-tensorrt-rtx is not installed, or there is a GPU, which the driver's stand-in is no match for")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(what tensorrt_builds.py says, the folder of its artifacts)"""
    folder = tmp_path_factory.mktemp("tensorrt")
    run = subprocess.run([sys.executable, pathlib.Path(__file__).with_name("tensorrt_builds.py"), folder], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1]), folder


@needs_it
def test_the_whole_chunk_with_pruned_context_is_one_engine_a_variant(built):
    chunk = built[0]["chunk"]
    assert [v["name"] for v in chunk["variants"]] == ["keep4_full", "keep4_reuse"]
    for variant, network, steps in zip(chunk["variants"], chunk["networks"], (3, 2)):
        assert {o["operator"]: (o["calls"], o["lowering"]) for o in variant["operators"]} == {
            "li::pack_context": (1, "native"), "li::sparse_decode": (steps, "native")}
        (segment,) = variant["parts"]["segments"]
        assert variant["parts"]["left_to_pytorch"] == [] and chunk["bytes"][segment["engine"]] > 100_000
        assert variant["passes"]["prune_context"] == 3 and variant["passes"]["sparse_attention"] == 3  # of steps, before any is reused
        # One attention a step, of which each is a softmax between two pairs of products.
        assert network["layers"]["SOFTMAX"] == steps and network["layers"]["CONVOLUTION"] == steps + 1
        assert network["layers"]["TOPK"] == steps  # and one selection of blocks
        shapes = {name: shape for name, (shape, _) in network["inputs"].items()}  # 12 frames of context are given, and 4 are read
        assert shapes.keys() == {"noise", "prompt", "action", "w2c", "intrinsics", "text_k", "text_v", "context_latents", "context_action", "context_w2c"}
        assert (shapes["noise"], shapes["context_latents"], shapes["context_w2c"]) == ([1, 4, 4, 4, 4], [1, 4, 4, 4, 4], [1, 4, 4, 4])
        assert network["inputs"]["context_action"] == [[1, 4], "INT64"]
        assert list(network["outputs"].values()) == [[[1, 4, 4, 4, 4], "FLOAT"], [[], "FLOAT"]]  # latents and drift
    assert chunk["networks"][1]["layers"]["MATRIX_MULTIPLY"] < chunk["networks"][0]["layers"]["MATRIX_MULTIPLY"]
    assert chunk["bytes"]["weights.safetensors"] < 100  # engines hold their own


@needs_it
def test_a_gate_is_a_condition_in_the_engine(built):
    gated = built[0]["gated"]
    (network,), (variant,) = gated["networks"], gated["variants"]
    assert variant["name"] == "all_gated" and len(variant["parts"]["segments"]) == 1 and not variant["parts"]["left_to_pytorch"]
    assert network["layers"]["CONDITION"] == 2 and network["layers"]["CONDITIONAL_OUTPUT"] == 2
    assert network["inputs"]["reuse"] == [[], "BOOL"]


@needs_it
def test_a_step_with_attention_and_norms_is_a_branch(built):
    chunk = built[0]["gated chunk"]
    (network,), (variant,) = chunk["networks"], chunk["variants"]
    assert variant["name"] == "keep4_gated" and len(variant["parts"]["segments"]) == 1 and not variant["parts"]["left_to_pytorch"]
    assert network["layers"]["CONDITION"] == 1
    assert network["layers"]["SOFTMAX"] in (1, 3)  # one step of three is a branch; outside of it attention may be one layer


@needs_it
def test_block_sparse_attention_written_out(built):
    native = built[0]["native"]
    (network,), (variant,) = native["networks"], native["variants"]
    assert network["layers"]["TOPK"] == 1 and network["layers"]["SOFTMAX"] == 1 and network["layers"]["GATHER"] >= 2
    assert "gathered blocks" in variant["operators"][0]["why"]
    assert variant["caches"] == ["sum"] and len(network["inputs"]) == 2 and len(network["outputs"]) == 2  # x and the cache, in and out


@needs_it
def test_a_pytorch_segment_between_engines(built):
    hybrid = built[0]["hybrid"]
    (variant,) = hybrid["variants"]
    engine, program = variant["parts"]["segments"]
    assert "engine" in engine and "li::sparse_attention" in program["operators"]
    assert hybrid["bytes"][engine["engine"]] > 10_000 and set(program["inputs"]) <= {*engine["outputs"], *variant["parts"]["inputs"]}
    assert "SOFTMAX" not in hybrid["networks"][0]["layers"] and "import li_compile.kernels" in hybrid["notes"][0]


@needs_it
def test_what_stands_around_the_plugin_builds(built):
    """Packing, scores, the choice and the lists, in an engine; the plugin itself is left to PyTorch here, as TensorRT-RTX has none."""
    around = built[0]["around"]
    (network,), (variant,) = around["networks"], around["variants"]
    engine, program = variant["parts"]["segments"]
    assert [o["lowering"] for o in variant["operators"]] == ["plugin"] and "li::block_sparse_plugin" in program["operators"]
    assert not [o for o in program["operators"] if o.startswith("li") and o != "li::block_sparse_plugin"] and around["bytes"][engine["engine"]] > 10_000
    assert network["layers"]["TOPK"] == 2 and "SOFTMAX" not in network["layers"]  # the choice, and the order of each list
    assert sorted(map(str, network["outputs"].values())) == sorted(map(str, [
        [[1, 2, 72, 32], "HALF"], *[[[1, 2, 80, 32], "HALF"]] * 2, [[1, 2, 5, 3], "INT32"], [[1, 2, 5], "INT32"]]))  # q, k, v, lists and tails


@needs_it
def test_strict_wants_all_of_it_in_engines(built):
    assert built[0]["strict"].startswith("ExportError: li::sparse_attention cannot be part of an engine")
    assert built[0]["left behind"] == ["around", "chunk", "gated", "gated_chunk", "hybrid", "native"]


@needs_it
def test_where_there_is_no_gpu_it_cannot_be_loaded(built):
    assert "PyTorch finds none here: install a driver" in built[0]["load"]
    with pytest.raises(RuntimeError, match="cannot load this engine: it was built by another version or for another GPU, or there is no driver"):
        open_engines(built[1] / "native")
    with pytest.raises(ValueError, match="all_full is not one engine: PyTorch runs parts of it; open the artifact with li_compile.load"):
        open_engines(built[1] / "hybrid")


@needs_it
def test_another_version_of_tensorrt(built, monkeypatch):
    from li_compile.exporting import running
    from li_compile.exporting.manifest import versions

    monkeypatch.setattr("li_compile.exporting.manifest.versions", lambda *packages: versions(*packages) | {"tensorrt-rtx": "1.4.0.76"})
    with pytest.raises(li_compile.LightInteractionError, match=r"was exported with tensorrt-rtx 1\.\d.*, and 1.4.0.76 is installed: export it again here, or "
                       "pip install 'tensorrt-rtx=="):
        running.load(built[1] / "native")


@needs_it
def test_engines_need_nothing_of_ours():
    """open_engines imports no compiler, no Torch-TensorRT."""
    code = ("import sys, li_compile.engine as e\nassert e.tensorrt().__name__ == 'tensorrt_rtx'\n"
            "assert not [m for m in sys.modules if m.startswith(('torch_tensorrt', 'li_compile.exporting', 'li_compile.pipeline'))]\nprint('alone')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "alone", done.stderr


# What is said where it cannot be had.


@pytest.mark.parametrize(("found", "gpu", "says"), [
    ({}, False, r"needs Torch-TensorRT: pip install 'li_compile\[tensorrt-rtx\]' .* or 'li_compile\[tensorrt\]'"),
    ({"torch-tensorrt-rtx": "{minor}.0", "torch-tensorrt": "{minor}.0"}, True, "are both installed, and both are the module torch_tensorrt"),
    ({"torch-tensorrt-rtx": "2.3.0"}, True, r"torch-tensorrt-rtx 2.3.0 is not for torch .*: pip install 'torch-tensorrt-rtx=="),
    ({"torch-tensorrt-rtx": "{minor}.0"}, False, "needs an NVIDIA driver, and PyTorch finds none"),
])
def test_what_is_missing(tmp_path, monkeypatch, found, gpu, says):
    minor = ".".join(torch.__version__.split(".")[:2])
    monkeypatch.setattr(tensorrt, "installed", lambda: {n: v.format(minor=minor) for n, v in found.items()})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(BackendUnavailable, match=says):
        li_compile.export(nn.Linear(2, 2), [torch.ones(1, 2)], target="tensorrt", path=tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_report_says_that_it_cannot_be_built_here(monkeypatch):
    monkeypatch.setattr(tensorrt, "installed", dict)
    report = li_compile.export_report(nn.Linear(2, 2), [torch.ones(1, 2)], target="tensorrt")
    assert "needs Torch-TensorRT" in report.unavailable and "cannot be built here: TensorRT export needs" in " ".join(str(report).split())


@pytest.mark.skipif(torch.cuda.is_available() or importlib.util.find_spec("torch_tensorrt") is None, reason="needs Torch-TensorRT and no driver")
def test_an_import_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "unavailable", lambda: None)
    with pytest.raises(BackendUnavailable, match=r"(?s)torch_tensorrt is installed and cannot be imported: .*It needs an NVIDIA driver"):
        li_compile.export(nn.Linear(2, 2), [torch.ones(1, 2)], target="tensorrt", path=tmp_path / "a")
    assert not list(tmp_path.iterdir())


class Writes(nn.Module):
    """Views, and writes into a part of a tensor, as torch.export spells them."""

    def forward(self, x, y, unread: int):
        x = x.clone()
        x[:, 1:3] = y  # slice_scatter
        x[:, :, -1] = y[:, :1].mean(-1)  # select_scatter
        x[1:] = 2.0
        x[:, ::2] = 0.5  # of another step than 1: stays
        return x.view(x.shape[0], -1), unread + 1, x.sum()


def test_what_an_engine_neither_takes_nor_gives_is_left_out_and_the_rest_respelled_without_a_change_of_numbers():
    x, y = torch.randn(2, 4, 5), torch.randn(2, 2, 5)
    with torch.no_grad():
        exported = torch.export.export(Writes(), (x, y, 3)).run_decompositions({})
        program, dropped, constants = tensorrt._tensors_alone(exported)
        assert dropped == [2] and constants == {1: 4}
        tensorrt._respell(program.graph_module)
        targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert "aten.view.default" not in targets and "aten.select_scatter.default" not in targets and targets.count("aten.cat.default") == 3
        assert targets.count("aten.slice_scatter.default") == 1
        wanted, got = Writes()(x, y, 3), program.module()(x, y)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[2])


@pytest.mark.parametrize("dtype, weighted, eps", [(torch.float16, True, None), (torch.float32, False, 1e-3), (torch.float64, True, 1e-6)])
def test_rms_norm_in_a_branch_is_written_out(dtype, weighted, eps):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm((3, 5), eps=eps, elementwise_affine=weighted, dtype=dtype)

        def forward(self, gate, x):
            return torch.cond(gate, lambda x: self.norm(x) * 2, lambda x: x.sin(), (x,)), self.norm(x)

    model, x = Gated(), torch.randn(2, 3, 5).to(dtype)
    if weighted:
        nn.init.normal_(model.norm.weight)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.tensor(True), x))
        tensorrt._respell(exported.graph_module)
        branches = [m for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule) and m is not exported.graph_module]
        norms = lambda m: [n for n in m.graph.nodes if n.target is torch.ops.aten.rms_norm.default]
        assert not any(map(norms, branches)) and len(norms(exported.graph_module)) == 1
        for gate in (True, False):
            got, wanted = exported.module()(torch.tensor(gate), x), model(torch.tensor(gate), x)
            for a, b in zip(got, wanted):
                assert a.dtype == b.dtype and (a - b).norm() / b.norm() < (1e-3 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("masked", [None, "bool", "added"])
def test_attention_in_a_branch_is_written_out(masked):
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask = {None: None, "bool": torch.rand(5, 7) > 0.3, "added": torch.randn(5, 7)}[masked]
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    attend = lambda *given: nn.functional.scaled_dot_product_attention(*given, scale=0.3)

    class Gated(nn.Module):
        def forward(self, gate, *inputs):
            return torch.cond(gate, attend, lambda q, *_: q.sin(), inputs)

    with torch.no_grad():
        exported = torch.export.export(Gated(), (torch.tensor(True), *inputs))
        tensorrt._respell(exported.graph_module)
        names = [str(n.target) for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes]
        assert "aten.scaled_dot_product_attention.default" not in names and names.count("aten.softmax.int") == 1
        got, wanted = exported.module()(torch.tensor(True), *inputs), attend(*inputs)
    assert (got - wanted).norm() / wanted.norm() < 1e-6


def test_what_a_branch_computes_from_nothing_is_computed_before_its_condition():
    def turned(x, y):
        rates = 100.0 ** (-torch.arange(6) / 4)
        low, high = rates.split(3)
        return x * rates + torch.rand_like(x) * 0 + low.sum() + high[None].new_zeros(1), y + torch.arange(6)

    class Gated(nn.Module):
        def forward(self, gate, x, y):
            return torch.cond(gate, turned, lambda x, y: (x + torch.ones(6), y * 2), (x, y))

    x, y = torch.randn(2, 6), torch.arange(6)
    with torch.no_grad():
        exported = torch.export.export(Gated(), (torch.tensor(True), x, y))
        tensorrt._respell(exported.graph_module)
        names = [[str(n.target) for n in getattr(exported.graph_module, b).graph.nodes] for b in ("true_graph_0", "false_graph_0")]
        assert not any(n.startswith(("aten.arange", "aten.pow", "aten.ones", "aten.split")) for branch in names for n in branch)
        assert "aten.rand_like.default" in names[0]
        for gate, wanted in ((True, turned(x, y)), (False, (x + 1, y * 2))):
            for a, b in zip(exported.module()(torch.tensor(gate), x, y), wanted):
                assert torch.allclose(a, b)


def test_a_program_of_tensors_alone_stays_the_one_it_is():
    exported = torch.export.export(nn.Linear(3, 4), (torch.randn(2, 3),))
    program, dropped, constants = tensorrt._tensors_alone(exported)
    assert program is exported and not dropped and not constants

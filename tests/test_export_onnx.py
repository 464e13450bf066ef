"""ONNX artifacts: the checker passes, ONNX Runtime computes what the model does, and all variants read one file of weights."""

from __future__ import annotations

import pytest
import torch
from test_export import SPARSE, Tokens
from test_gated_steps import Sampler, inputs
from tracing import TINY, dynamic, relative, world_inputs

import li_compile
from li_compile import Config
from li_compile.errors import ArtifactError, BackendUnavailable, ExportError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

def test_context_encoding_and_a_step_dense(tiny_world, tmp_path):
    from examples.doom_world.model import ChunkSampler

    chunk = ChunkSampler(tiny_world(depth=1), steps=1)
    given = world_inputs(chunk.model, 4)
    report = li_compile.export(chunk, given, target="onnx", path=tmp_path / "a", strict=True, config=Config.from_options(TINY | {"preset": "exact"}))
    (variant,) = report.variants
    assert variant.parts["inputs"] == ["noise", "prompt", "action", "w2c", "intrinsics", "text_k", "text_v", "context_latents", "context_action",
                                       "context_w2c"]
    assert variant.parts["operators"]["Softmax"] == 1 and not [o for o in variant.parts["operators"] if "::" in o]
    onnx.checker.check_model(str(tmp_path / "a" / variant.parts["model"]), full_check=True)
    with torch.no_grad():
        assert relative(li_compile.load(tmp_path / "a")(*given), chunk(*given)) <= 1e-5


def test_weights_are_read_from_one_file(tmp_path):
    model = torch.nn.Linear(1000, 1000)
    li_compile.export(model, [torch.ones(1, 1000)], also=[([torch.ones(2, 1000)], {})], target="onnx", path=tmp_path / "a")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "a").iterdir()}
    assert sizes["call0_all_full.onnx"] < 10_000 and sizes["call1_all_full.onnx"] < 10_000 < sizes["weights.safetensors"]
    runner = li_compile.load(tmp_path / "a")
    with torch.no_grad():
        for x in (torch.randn(1, 1000), torch.randn(2, 1000)):
            assert relative(runner(x), model(x)) <= 1e-5


def test_a_gate_becomes_an_if(tmp_path):
    module = Sampler()
    report = li_compile.export(module, inputs(), path=tmp_path / "a", target="onnx", gates="device",
                               config=Config.from_options({"preset": "cache", "cache.gate": "always"}))
    (variant,) = report.variants
    assert variant.parts["operators"]["If"] == 2 and variant.parts["inputs"] == ["x", "condition", "reuse"]
    runner = li_compile.load(tmp_path / "a")
    entry = runner.manifest.calls[0].variants[0]
    for reuse, want in ((True, module.skipped), (False, module)):
        got, = runner.run(entry, dict(zip(("x", "condition"), inputs())) | {"reuse": torch.tensor(reuse)})
        with torch.no_grad():
            assert relative(got, want(*inputs())) <= 1e-5


def test_sparse_attention_and_a_cache_in_standard_operators(tmp_path):
    model, config = Tokens(), Config.from_options(SPARSE)
    report = li_compile.export(model, [torch.ones(1, 16, 8, 2, 4)], target="onnx", path=tmp_path / "a", config=config, strict=True)
    (variant,) = report.variants
    assert {"TopK", "GatherElements"} <= set(variant.parts["operators"])
    assert variant.parts["inputs"] == ["sum", "x"] and len(variant.parts["outputs"]) == 2
    runner, compiled = li_compile.load(tmp_path / "a"), li_compile.compile(model, config)
    for x in torch.randn(2, 1, 16, 8, 2, 4):
        with torch.no_grad():
            assert relative(runner(x), compiled(x)) <= 1e-4


def test_what_cannot_be_written_out_is_dense_and_told(tmp_path):
    model, config = Tokens(), Config.from_options(SPARSE | {"sparse.summary": True})
    export = lambda **more: li_compile.export(model, [torch.ones(1, 16, 8, 2, 4)], target="onnx", path=tmp_path / "a", config=config, **more)
    with pytest.raises(ExportError, match="li::sparse_attention cannot be part of an ONNX graph of standard operators as it is: blocks that are left out "
                                          r"take part through their means .sparse.summary.; attention is dense here"):
        export(strict=True)
    report = export()
    (row,) = report.variants[0].operators
    assert (row["lowering"], row["calls"]) == ("dense", 1) and "sparse.summary" in row["why"] and "is dense in this artifact" in report.notes[0]
    assert not [o for o in report.variants[0].parts["operators"] if o in ("TopK", "GatherElements") or "::" in o]
    runner = li_compile.load(tmp_path / "a")
    for x in torch.randn(2, 1, 16, 8, 2, 4):
        with torch.no_grad():
            assert relative(runner(x), model(x)) <= 1e-5


def test_the_whole_chunk_with_all_of_it(tiny_world, tmp_path):
    """Pruned, sparse and with reused steps: two graphs of standard operators that compute what the backend's do."""
    from examples.doom_world.model import ChunkSampler

    chunk = ChunkSampler(tiny_world(depth=1), steps=3)
    given = lambda revisit: dynamic(world_inputs(chunk.model, 12, revisit=revisit))
    options = TINY | {"preset": "all", "sparse.skip_layers": 0, "sparse.min_context": 4, "sparse.topk_ratio": 0.5, "context.memory_frames": 4,
                      "context.temporal_frames": 4, "context.anchor_frames": 0, "context.fov": (60, 45)}
    config = Config.from_options(options)
    report = li_compile.export(chunk, given(False), target="onnx", path=tmp_path / "a", config=config, strict=True)
    assert [v.name for v in report.variants] == ["keep4_full", "keep4_reuse"]
    for variant, steps in zip(report.variants, (3, 2)):
        assert {o["operator"]: (o["calls"], o["lowering"]) for o in variant.operators} == {
            "li::pack_context": (1, "native"), "li::sparse_decode": (steps, "native")}
        kinds = variant.parts["operators"]
        assert kinds["Softmax"] == steps and kinds["GatherElements"] == 2 * steps and kinds["TopK"] >= steps and not [k for k in kinds if "::" in k]
        onnx.checker.check_model(str(tmp_path / "a" / variant.parts["model"]), full_check=True)
    compiled, runner = li_compile.compile(chunk, config), li_compile.load(tmp_path / "a")
    for revisit in (False, True):
        results = []
        for run in (runner, compiled):
            with torch.no_grad(), li_compile.Session(config) as session:
                results.append(run(*given(revisit)))
            stats = session.stats()
            assert (stats["context_kept"], stats["reused_chunks"], stats["calls"]) == (4, revisit, 3 - revisit)
        with torch.no_grad():
            assert relative(*results) <= 1e-5 < 1e-3 < relative(results[0], chunk(*given(revisit)))


def test_our_operators_in_a_domain_of_their_own(tmp_path):
    export = lambda **more: li_compile.export(Tokens(), [torch.ones(1, 16, 8, 2, 4)], target="onnx", path=tmp_path / "a", sparse="plugin",
                                              config=Config.from_options(SPARSE), **more)
    with pytest.raises(ExportError, match="li::sparse_attention cannot be part of an ONNX graph of standard operators"):
        export(strict=True)
    report = export()
    assert report.variants[0].parts["operators"]["li_compile::SparseAttention"] == 1 and "domain li_compile" in report.notes[0]
    node = next(n for n in onnx.load(tmp_path / "a" / "call0_all_full.onnx", load_external_data=False).graph.node if n.domain)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["inputs"] == [b"q", b"k", b"v"] and attributes["block_size"] == 16 and attributes["roles"] == [2]
    with pytest.raises(ArtifactError, match="holds li_compile::SparseAttention, which ONNX Runtime does not have"):
        li_compile.load(tmp_path / "a")(torch.ones(1, 16, 8, 2, 4))


def test_without_its_packages(tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "onnxscript" else find(name, *more))
    with pytest.raises(BackendUnavailable, match=r"ONNX export needs onnxscript: pip install 'li_compile\[onnx\]'"):
        li_compile.export(torch.nn.Linear(2, 2), [torch.ones(1, 2)], target="onnx", path=tmp_path / "a")
    assert not (tmp_path / "a").exists()

"""Which target is advised: from what would become of our operators in TensorRT, and from the device."""

from __future__ import annotations

import re

import pytest
import torch
from test_export import SPARSE, Tokens

import li_compile
from li_compile import Config
from li_compile.exporting.advice import advise
from li_compile.exporting.targets import aot_inductor, tensorrt

H100 = {"type": "cuda", "name": "H100", "capability": [9, 0]}
L4 = {"type": "cuda", "name": "L4", "capability": [8, 9]}


@pytest.fixture
def has_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt, "unavailable", lambda: None)
    monkeypatch.setattr(tensorrt, "installed", lambda: {"torch-tensorrt-rtx": "2.14.0"})
    monkeypatch.setattr(aot_inductor, "unavailable", lambda: None)


def rows(**options) -> list:
    """What becomes of our operators in TensorRT, in a model whose attention is sparse under these options."""
    sparse = options.pop("lowering", "auto")
    report = li_compile.export_report(Tokens(), [torch.ones(1, 16, 8, 2, 4)], target="tensorrt", sparse=sparse,
                                      config=Config.from_options(SPARSE | options))
    return report.variants[0].operators


@pytest.mark.parametrize(("options", "device", "target", "why"), [
    ({"lowering": "segment"}, L4, "aot_inductor", r"in TensorRT li::sparse_attention runs in PyTorch between two engines .*aot_inductor runs our kernel"),
    ({"sparse.summary": True}, L4, "aot_inductor", r"between two engines \(blocks that are left out take part through their means"),
    ({}, L4, "aot_inductor", r"li::sparse_attention is not our kernel \(gathered blocks, \d\.\d times the keys' and values' own bytes"),
    ({"preset": "exact"}, L4, "tensorrt", "no operator of ours keeps any part of it out of an engine"),
    ({"preset": "exact"}, H100, "aot_inductor", r"TensorRT-RTX is not listed for H100 \(compute capability 9.0\)"),
])
def test_what_speaks_for_a_target(has_tensorrt, options, device, target, why):
    advice = advise(rows(**options), device)
    assert advice.target == target and re.search(why, advice.why), advice


def test_what_is_not_there_is_not_advised(has_tensorrt, monkeypatch):
    monkeypatch.setattr(tensorrt, "unavailable", lambda: "TensorRT export needs Torch-TensorRT")
    assert advise([], L4).why == "TensorRT cannot be had here (TensorRT export needs Torch-TensorRT)"
    monkeypatch.setattr(aot_inductor, "unavailable", lambda: "there is no g++")
    assert advise([], L4).target == "exported_program"
    assert str(advise([], L4, breaks=2)) == "advised target: backend, since the graph breaks 2 times, and an export takes one graph"


def test_explain_and_a_report_say_it():
    given, config = torch.ones(1, 16, 8, 2, 4), Config.from_options(SPARSE)
    explained, report = li_compile.explain(Tokens(), given, config=config), li_compile.export_report(Tokens(), [given], config=config)
    assert explained.advice == report.advice and report.to_dict()["advice"]["target"] == report.advice.target
    for text in (str(explained), str(report), explained.html()):
        assert f"advised target: {report.advice.target}, since the inputs are on the CPU" in " ".join(text.split())


def broken(x):
    torch._dynamo.graph_break()
    return x + 1


def test_a_graph_that_breaks_is_the_backends():
    assert li_compile.explain(lambda x: broken(x * 2) * 3, torch.ones(2)).advice.target == "backend"

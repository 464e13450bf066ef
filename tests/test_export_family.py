"""Artifacts of a model whose family hands it other arguments: the same graphs as the backend compiles, on the reduced HY-WorldPlay."""

from __future__ import annotations

import pytest
import torch
from models import worldplay_rollout as reduced
from test_policy import left_right
from torch.utils._pytree import tree_leaves
from tracing import fired, relative

import li_compile
from li_compile import Config
from li_compile.errors import ExportError
from li_compile.exporting import family_inputs

CONFIG = Config.from_options({"preset": "all", "lowering": "eager", "strict": True, "sparse.tile": (4, 2, 2), "sparse.block_size": 16,
                              "sparse.min_context": 8, "sparse.skip_layers": 0, "cache.guard": None})
HISTORY = 8


def calls(transformer) -> tuple[dict, dict, dict]:
    """Arguments of the text pass, of the encoding of 8 latents of context, and of the first step after it."""
    seen = []
    hook = transformer.register_forward_pre_hook(lambda model, args, kwargs: seen.append(kwargs), with_kwargs=True)
    reduced.Pipeline(transformer, 3).ar_rollout(**reduced.inputs(3, left_right()))
    hook.remove()
    text = next(c for c in seen if c["ar_txt_inference"])
    encoding = next(i for i, c in enumerate(seen) if c.get("cache_vision") and c["hidden_states"].shape[2] == HISTORY)
    return text, seen[encoding], seen[encoding + 1]


@pytest.fixture
def transformer(monkeypatch):
    with torch.no_grad():
        yield reduced.pipeline(monkeypatch, 3).transformer


def test_a_step_and_an_encoding_are_the_graphs_that_the_backend_compiles(transformer, tmp_path):
    text, encoding, step = calls(transformer)
    report = li_compile.export(transformer, [], step, also=[([], encoding)], path=tmp_path / "a", config=CONFIG)
    runner, compiled = li_compile.load(tmp_path / "a"), li_compile.compile(transformer, CONFIG)
    assert [(v.call, v.name) for v in report.variants] == [(0, "all_full"), (0, "keep4_full"), (1, "all_full")]
    assert "family hy_worldplay makes of a call's: li_compile.exporting.family_inputs" in report.notes[0]
    for call, given, sparse in ((0, step, 2), (1, encoding, 1)):  # nothing reads what the last block of an encoding attends to
        want = compiled(**given)
        exported, known = (fired(x) for x in (next(v for v in report.variants if v.call == call).passes,
                                              compiled.report().graphs[call].variants[0].counts()))
        for name in ("functional_writes", "equal_rows", "small_products", "sparse_attention"):
            assert exported[name] == known[name], name
        assert exported["sparse_attention"] == sparse and exported["functional_writes"] == 30
        args, kwargs = family_inputs(transformer, [], given, CONFIG)
        names = {t.name for t in runner.manifest.calls[call].variants[0].inputs}
        assert {"freqs_cos", "freqs_sin"} <= names and not {n for n in names if n.startswith(("rope_", "start_rope_"))}
        for got, made in zip(tree_leaves(runner(*args, **kwargs)), tree_leaves(want), strict=True):
            assert got is made is None or relative(got, made) <= 1e-5
    with pytest.raises(ExportError, match="family hy_worldplay leaves this call of HunyuanVideo_1_5_DiffusionTransformer uncompiled"):
        li_compile.export(transformer, [], text, path=tmp_path / "b", config=CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_without_a_family_a_call_is_what_it_is():
    x = torch.ones(1, 2)
    (args, kwargs), linear = family_inputs(torch.nn.Linear(2, 2), [x]), torch.nn.Linear(2, 2)
    assert args == (x,) and kwargs == {}
    assert not any("Inputs are" in note for note in li_compile.export_report(linear, [x]).notes)

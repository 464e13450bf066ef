"""What the family changes in upstream's modules, on stand-ins of their names: own code, of the same obstacles."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

import li_compile
from li_compile.patterns.families.hy_worldplay import FAMILY, pinned

PATH = "hyvideo.models.transformers.worldplay_1_5_transformer"


@pytest.fixture
def upstream(monkeypatch):
    """Modules with a disabled attention, a choice that tries imports, and a model that uses both."""
    module, asked = types.ModuleType(PATH), []

    def attention(q, k, v, mode):
        assert module.maybe_fallback_attn_mode(mode) == "torch"
        return F.scaled_dot_product_attention(q, k, v)

    def choose(attn_mode, infer_state=None, block_idx=None):
        asked.append(attn_mode)
        try:
            import no_such_attention_package  # noqa: F401
        except ImportError:
            return "sageattn" if infer_state is not None and infer_state.enable_sageattn else "torch"

    class HunyuanVideo_1_5_DiffusionTransformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.qkv = torch.nn.Conv3d(3, 16, 1), torch.nn.Linear(16, 48)

        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return module.sequence_parallel_attention_vision(q, k, v, "flash")

    HunyuanVideo_1_5_DiffusionTransformer.__module__ = PATH
    HunyuanVideo_1_5_DiffusionTransformer.__qualname__ = "HunyuanVideo_1_5_DiffusionTransformer"
    module.sequence_parallel_attention_vision = torch.compiler.disable(attention)
    module.maybe_fallback_attn_mode = choose
    monkeypatch.setitem(sys.modules, PATH, module)
    torch.manual_seed(0)
    return module, HunyuanVideo_1_5_DiffusionTransformer().eval(), asked


def test_the_model_is_one_graph_and_detach_puts_all_back(upstream):
    module, model, _ = upstream
    before, x = dict(vars(module)), torch.randn(1, 3, 4, 4, 4)
    compiled = li_compile.compile(model, li_compile.Config.from_options({"preset": "exact", "lowering": "eager"}))
    assert compiled.config.family == FAMILY.name
    assert compiled.preparation.changes == [f"{PATH}.sequence_parallel_attention_vision", f"{PATH}.maybe_fallback_attn_mode"]
    with torch.no_grad():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        result = compiled(x)
        assert not torch._dynamo.utils.counters["graph_break"]
        assert compiled.detach() is model and dict(vars(module)) == before
        torch.testing.assert_close(result, model(x))


def test_explain_sees_the_attention_and_leaves_the_modules_as_they_were(upstream):
    module, model, _ = upstream
    before = dict(vars(module))
    report = li_compile.explain(model, torch.randn(1, 3, 4, 4, 4))
    (graph,) = report.graphs
    assert not report.breaks and graph.found["attention, prefill"].startswith("1 sites, grid 4 x 4")
    assert any("sequence_parallel_attention_vision" in change for change in report.prepared) and dict(vars(module)) == before


def test_unprepared_the_graph_breaks_at_the_attention(upstream):
    _, model, _ = upstream
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(model, backend="light_interaction", fullgraph=True)(torch.randn(1, 3, 4, 4, 4))


def test_the_choice_is_asked_before_tracing_but_where_it_depends_on_the_block(upstream):
    module, _, asked = upstream
    answer = pinned(module.maybe_fallback_attn_mode)
    asked.clear()
    assert answer("flash") == answer("flash3", types.SimpleNamespace(enable_sageattn=False), 3) == "torch" and asked == []
    assert answer("flash", types.SimpleNamespace(enable_sageattn=True), 3) == "sageattn"
    assert answer("flex-block-attn") == "torch" and asked == ["flash", "flex-block-attn"]

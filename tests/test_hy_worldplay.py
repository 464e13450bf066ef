"""What the family changes in upstream's modules, on stand-ins of their names: own code, of the same obstacles."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

import li_compile
from li_compile.backend import light_interaction
from li_compile.patterns.families.hy_worldplay import FAMILY, pinned
from li_compile.patterns.graph import REGION

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
        torch.compile(model, backend=light_interaction, fullgraph=True)(torch.randn(1, 3, 4, 4, 4))


def test_the_choice_is_asked_before_tracing_but_where_it_depends_on_the_block(upstream):
    module, _, asked = upstream
    answer = pinned(module.maybe_fallback_attn_mode)
    asked.clear()
    assert answer("flash") == answer("flash3", types.SimpleNamespace(enable_sageattn=False), 3) == "torch" and asked == []
    assert answer("flash", types.SimpleNamespace(enable_sageattn=True), 3) == "sageattn"
    assert answer("flex-block-attn") == "torch" and asked == ["flash", "flex-block-attn"]


@pytest.fixture
def blocks(monkeypatch):
    """A model of blocks that are handed all of the cache and their index, and write new entries; own code."""
    module = types.ModuleType(PATH)

    class MMDoubleStreamBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)

        def attend(self, x, entry, kind):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            k = F.rms_norm(k, (8,))
            old = [entry[f"{n}_{kind}"] for n in "kv"]
            keys, values = (new if o is None else torch.cat([o, new], 2) for o, new in zip(old, (k, v)))
            return x + F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2), {f"k_{kind}": k, f"v_{kind}": v}

        def forward_vision(self, img, vec, attn_param=None, block_idx=None, kv_cache=None, cache_vision=False):
            out, new = self.attend(img * vec, kv_cache[block_idx], "vision")
            return out, new if cache_vision else {}

        def forward_txt(self, txt, attn_param=None, block_idx=None, kv_cache=None, cache_txt=False):
            out, new = self.attend(txt, {"k_txt": None, "v_txt": None}, "txt")
            return out, new if cache_txt else {}

    class HunyuanVideo_1_5_DiffusionTransformer(torch.nn.Module):
        def __init__(self, depth=4):
            super().__init__()
            self.blocks = torch.nn.ModuleList(MMDoubleStreamBlock() for _ in range(depth))

        def forward(self, img, vec, cache, keep=False):
            new = []
            for i, block in enumerate(self.blocks):
                img, entry = block.forward_vision(img=img, vec=vec, block_idx=i, kv_cache=cache, cache_vision=keep)
                new.append(entry)
            return new if keep else img

        def text(self, txt, cache=None):
            new = []
            for i, block in enumerate(self.blocks):
                txt, entry = block.forward_txt(txt=txt, block_idx=i, kv_cache=cache, cache_txt=True)
                new.append(entry)
            return new

    module.state = types.SimpleNamespace(enable_sageattn=False)
    module.MMDoubleStreamBlock, module.get_infer_state = MMDoubleStreamBlock, lambda: module.state
    for cls in (MMDoubleStreamBlock, HunyuanVideo_1_5_DiffusionTransformer):
        cls.__module__, cls.__qualname__ = PATH, cls.__name__
    monkeypatch.setitem(sys.modules, PATH, module)
    torch.manual_seed(0)
    draw = lambda n: {f"{x}_vision": torch.randn(1, 2, n, 8) if n else None for x in "kv"}
    return module, HunyuanVideo_1_5_DiffusionTransformer().eval(), lambda n: (torch.randn(1, 6, 16), torch.rand(1, 1, 16), [draw(n) for _ in range(4)])


def regions(fn, *args, **kwargs) -> list[str]:
    """The region that each call of one runs, in the only graph that is traced."""
    seen = []
    with torch.no_grad():
        torch._dynamo.reset()
        torch.compile(fn, fullgraph=True, backend=lambda gm, _: seen.append([n.args[1] for n in gm.graph.nodes if n.target is REGION]) or gm)(*args, **kwargs)
    (names,) = seen
    return names


@pytest.mark.parametrize("case", ["step", "first step", "context", "text", "text, empty cache"])
def test_blocks_become_regions_and_compute_the_same(blocks, case):
    module, model, inputs = blocks
    args, keep = inputs(0 if case == "first step" else 5), case == "context"
    empty = [] if case == "text, empty cache" else None  # as in a rollout
    call = (lambda: model.text(args[0], empty)) if case.startswith("text") else lambda: model(*args, keep=keep)
    with torch.no_grad():
        want = call()
        assert regions(call) == []
        compiled = li_compile.compile(model, li_compile.Config(preset="off"))
        before = compiled.preparation.changes
        names = regions(call)
        torch.testing.assert_close(call(), want)
        compiled.detach()
    assert [c.rpartition(".")[2] for c in before] == ["forward_vision", "forward_txt"]
    assert len(names) == 4 and (len(set(names)) == 1 or Version(torch.__version__).release < (2, 13))
    assert regions(call) == []


def test_blocks_stay_as_they_are_where_attention_depends_on_the_block(blocks):
    module, model, inputs = blocks
    module.state.enable_sageattn = True
    compiled = li_compile.compile(model, li_compile.Config(preset="off"))
    assert regions(model, *inputs(5)) == []
    compiled.detach()

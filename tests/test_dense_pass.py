"""Dense attention becomes one operator over its segments, as often as it stands there; what that operator cannot do stays."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from models.worldplay import step
from test_exact import Rewritten
from torch import nn
from tracing import TINY, Compiled, Traced

from li_compile.passes.cost import cost
from li_compile.passes.dense_attention import dense_attention

ANYWHERE = functools.wraps(dense_attention)(functools.partial(dense_attention, anywhere=True))
DENSE = torch.ops.li.dense_attention.default


class Attends(nn.Module):
    """Attention over text, history and its own tokens; ``change`` makes it another thing."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change

    def forward(self, q, text, history, own):
        change, more = self.change, {}
        keys = torch.cat([text, torch.cat([history, own], 2)], 2)
        values = keys if change == "shared" else torch.cat([text * 2, history * 2, own * 2], 2)
        if change == "other pieces":
            values = torch.cat([torch.cat([text, history], 2).cumsum(2), own * 2], 2)
        if change == "scale":
            more = {"scale": 0.3}
        if change == "mask":
            more = {"attn_mask": torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(3)}
        if change == "causal":
            more = {"is_causal": True}
        if change == "groups":
            q, more = q.repeat(1, 2, 1, 1), {"enable_gqa": True}
        if change == "broadcast":
            q = q.repeat(2, 1, 1, 1)
        return F.scaled_dot_product_attention(q, keys, values, **more)


def rewritten(change: str = "") -> Rewritten:
    torch.manual_seed(0)
    return Rewritten(Attends(change), *(torch.randn(1, 2, n, 8) for n in (6, 3, 12, 6)), passes=(ANYWHERE,))


@pytest.mark.parametrize(("change", "segments"), [("", 3), ("shared", 3), ("scale", 3), ("other pieces", 1)])
def test_it_fires_once(change, segments):
    done = rewritten(change)
    assert done.count == 1 and done.error() <= 1e-6
    (node,) = [n for n in done.module.graph.nodes if n.target is DENSE]
    assert len(node.args[1]) == len(node.args[2]) == segments
    cats = [n for n in done.module.graph.nodes if n.target is torch.cat]
    assert (not cats) == (segments == 3), "what the operator reads apart is not concatenated"


def test_a_caches_keys_and_values_may_have_symbols_of_their_own():
    """Nothing in such a graph says that they are of one length, though attention could take nothing else."""
    given = [torch.randn(1, 2, n, 8) for n in (6, 12, 12, 6, 6)]
    for cached in given[1:3]:
        torch._dynamo.mark_dynamic(cached, 2)
    fn = lambda q, k_cache, v_cache, k, v: F.scaled_dot_product_attention(q, torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2))
    done = Rewritten(Traced(fn, *given), *given, passes=(ANYWHERE,))
    (node,) = [n for n in done.module.graph.nodes if n.target is DENSE]
    assert len(node.args[1]) == len(node.args[2]) == 2 and done.error() <= 1e-6


@pytest.mark.parametrize("change", ["mask", "causal", "groups", "broadcast"])
def test_look_alikes_stay(change):
    done = rewritten(change)
    assert done.count == 0 and not [n for n in done.module.graph.nodes if n.target is DENSE]


@pytest.mark.parametrize("form", ["flat", "regions"])
def test_a_model_has_one_a_block(form):
    run, x = step(3, form == "regions")
    done = Rewritten(run, x, passes=(ANYWHERE,))
    assert done.count == 3 and done.error() <= 1e-6


def test_operations_are_counted_as_before():
    torch.manual_seed(0)
    before = Rewritten(Attends(), *(torch.randn(1, 2, n, 8) for n in (6, 3, 12, 6)), passes=())
    assert cost(rewritten().module)[0] == cost(before.module)[0] > 0


def test_without_a_kernel_attention_is_left_to_pytorch_and_the_report_says_so():
    compiled = Compiled(Traced(*step(1)), TINY | {"preset": "exact"})
    (variant,) = compiled.graph.variants
    assert variant.counts()["dense_attention"] == 0
    assert "left to PyTorch" in str(compiled.report)


def test_where_there_is_a_kernel_it_is_used_in_any_preset(monkeypatch):
    """Every attention of preset exact; of a sparse model those that stay dense."""
    monkeypatch.setattr("li_compile.passes.dense_attention.why_no_dense_kernel", lambda q, keys: None)
    run, x = step(2)
    want = run(x)
    cases = (({"preset": "exact"}, 2), ({"preset": "sparse", "sparse.min_context": 0}, 1), ({"preset": "exact", "exact.dense_attention": False}, None))
    for options, count in cases:
        compiled = Compiled(Traced(run, x), TINY | {"lowering": "eager"} | options)
        (variant,) = compiled.graph.variants
        assert variant.counts().get("dense_attention") == count, options
        if options["preset"] == "exact":
            got = compiled(x)
            assert (got - want).norm() / want.norm() <= 1e-5

"""Passes on the tiny world: each fires exactly as often as it should, and computes what it says it computes."""

from __future__ import annotations

import copy
import operator
from unittest import mock

import pytest
import torch
from torch import nn
from tracing import OLD, Traced, dynamic, fired, keep, relative, world_inputs

from li_compile import _compat
from li_compile.kernels.sparse_attention import CONTEXT, CURRENT, TEXT
from li_compile.passes.equal_rows import equal_rows
from li_compile.passes.normalize import normalize
from li_compile.passes.pack_context import pack_context
from li_compile.passes.propagate import propagate, tidy
from li_compile.passes.prune_context import prune_context
from li_compile.passes.sparse_attention import sparse_attention
from li_compile.patterns import find_attention
from li_compile.patterns.graph import name_of, placeholders, subgraphs
from li_compile.pipeline import canonical
from li_compile.policy import plan_context

PRESETS = ("off", "exact", "context", "sparse", "cache", "all")
STEPS, DEPTH = 3, 2


def regional(traced) -> bool:
    return any(name.startswith("subgraph") for name, _ in traced.module.named_children())


def by_hand(sampler, inputs, *, indices=None, reuse=False, sparse=None):
    """One chunk, each approximation written out: context frames, the two-step loop, sparse attention in later layers."""
    model = sampler.model
    noise, prompt, action, w2c, intrinsics, text_k, text_v, *context = inputs if indices is None else keep(inputs, indices)

    def attend(q, keys, values):
        layer, roles = attend.calls % DEPTH, [TEXT, CONTEXT, CURRENT] if len(keys) == 3 else [TEXT, CURRENT]
        attend.calls += 1
        if sparse is None or layer < 1:
            return nn.functional.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2))
        return torch.ops.li.sparse_attention(q, keys, values, roles, 4, 4, [4, 2, 2], 16, *sparse, 4, q.shape[-1] ** -0.5)

    attend.calls = 0

    def block(block, x, vec, cos, sin, camera, inverse, text_k, text_v, context_k=None, context_v=None):
        modulation, q, k, v = block.project(x, vec, cos, sin, camera, inverse)
        join = lambda text, past, own: [text.repeat(2, 1, 1, 1), *([] if past is None else [past]), own]
        attended = attend(q, join(text_k, context_k, k), join(text_v, context_v, v))
        return block.finish(x, attended, modulation, camera), k, v

    with torch.no_grad(), mock.patch.object(model, "run_block", block):
        latents, past_action, past_w2c = context
        blank = torch.zeros_like(latents[:, :1]).expand(-1, prompt.shape[1], -1, -1, -1)
        label = torch.full_like(past_action, model.config.context_time, dtype=torch.float32)
        _, past = model(torch.cat([latents, blank], 1), label, past_action, past_w2c, intrinsics, text_k, text_v)
        x, velocity = noise, None
        for i, (sigma, following) in enumerate(zip(sampler.sigmas[:-1], sampler.sigmas[1:])):
            if not reuse or i in (0, STEPS - 1):
                time = torch.full_like(action, 1000 * sigma, dtype=torch.float32)
                velocity, _ = model(torch.cat([x, prompt], 1), time, action, w2c, intrinsics, text_k, text_v, past,
                                    latents.shape[2])
            x = x + velocity * (following - sigma)
    return x


def variant(compiled, kept, reuse):
    (found,) = [v for v in compiled.graph.variants if (v.kept, v.reuse) == (kept, reuse)]
    return found


def test_the_hand_written_chunk_is_the_model(world):
    sampler, traced = world
    inputs = world_inputs(sampler.model, 8)
    with torch.no_grad():
        assert relative(by_hand(sampler, inputs), sampler(*inputs)) <= 1e-6
    assert relative(traced(*inputs), sampler(*inputs).detach()) <= 1e-6


# What each preset rewrites: (context frames kept, steps reused) -> counts, for 20 context frames of a revisited view.
# Rows: the modulations of 2 blocks in 3 steps and the prefill, and of the 3 outputs. Attention: all but the first layer's; the
# prefill's last attention is computed for nobody, which in one flat graph is dead code like any other, and in regions a tail.
def expected(preset: str, regional: bool) -> dict:
    rows = {"equal_rows": DEPTH * (STEPS + 1) + STEPS, "invariants": 42 if regional else 48} | ({"dead_tails": 1} if regional else {})
    if OLD and regional:
        rows |= {"merge_regions": 2}
    decode = STEPS * (DEPTH - 1)
    # A context whose length is dynamic is packed where it is read.
    sparse, packed = {"sparse_attention": decode}, {"pack_context": decode}
    context, cached, watched = {"prune_context": STEPS * DEPTH}, {"cached_steps": STEPS - 2}, {"watch_steps": 1}
    shared = {"share_steps": STEPS}
    return {
        "off": {},
        "exact": {(None, False): rows | shared},
        "context": {(12, False): context | rows | shared},
        "sparse": {(None, False): rows | sparse | shared},
        "cache": {(None, False): rows | shared | watched, (None, True): rows | shared | cached},
        "all": {(12, True): context | rows | sparse | packed | shared | cached},
    }[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_pinned_counts(world, preset):
    sampler, traced = world
    compiled = traced.compile(preset=preset)
    compiled(*world_inputs(sampler.model, 20, revisit=True))
    want = expected(preset, regional(traced))
    assert {key: fired(variant(compiled, *key).counts()) for key in want} == want
    total = {}
    for counts in want.values():
        total |= counts
    assert fired(compiled.report.counts()) == total
    facts = traced.facts()
    assert facts.loop.steps == STEPS and facts.context.sites == STEPS * DEPTH


def test_pinned_counts_without_a_revisit(world):
    sampler, traced = world
    compiled = traced.compile(preset="all")
    compiled(*world_inputs(sampler.model, 20))
    compiled(*world_inputs(sampler.model, 8))  # nothing to prune: the same variant, with all frames
    counts = fired(variant(compiled, 8, False).counts())
    want = expected("all", regional(traced))[12, True]
    assert counts == {k: v for k, v in want.items() if k != "cached_steps"} | {"watch_steps": 1}


@pytest.mark.parametrize("skip_layers", [0, 1, 2])
def test_dense_layers(world, skip_layers):
    sampler, traced = world
    compiled = traced.compile(preset="sparse", exact__enabled=False, sparse__skip_layers=skip_layers)
    attended = {0: 7 + regional(traced), 1: 3 + regional(traced), 2: 0}[skip_layers]
    (found,) = compiled.graph.variants
    counts = found.counts()
    assert (counts["sparse_attention"], counts["pack_context"]) == (attended, 0)
    assert ("is not known when compiling" in compiled.reasons) == (skip_layers < 2)
    assert ("skip_layers" in compiled.reasons) == (skip_layers > 0)


def test_the_report_says_which_kernel_and_why(world):
    _, traced = world
    record = next(r for v in traced.compile(preset="sparse").graph.variants for r in v.records if r.name == "sparse_attention")
    assert all("kernel cpu (preferred for these arguments)" in line for line in record.details) and record.details


def test_short_context_stays_dense(world):
    sampler, traced = world
    compiled = traced.compile(preset="all", sparse__min_context=16)
    inputs = world_inputs(sampler.model, 8)
    result = compiled(*inputs)
    assert variant(compiled, 8, False).counts()["sparse_attention"] == 0
    assert "8 context frames, sparse from 16 (sparse.min_context)" in compiled.reasons
    with torch.no_grad():
        assert relative(result, sampler(*inputs)) <= 1e-5


@pytest.mark.parametrize("preset", ["off", "exact"])
@pytest.mark.parametrize("history", [8, 20])
def test_exact_is_the_model(world, preset, history):
    sampler, traced = world
    inputs = world_inputs(sampler.model, history)
    with torch.no_grad():
        assert relative(traced.compile(preset=preset)(*inputs), sampler(*inputs)) <= 1e-5


def test_exact_is_the_model_in_double_precision(tiny_world, monkeypatch):
    """Nothing but rounding may differ. The model computes times and rotations in fp32; here they are fp64 too."""
    from examples.doom_world import model as doom

    sinusoid = doom.sinusoid

    def apply_rope(x, cos, sin):
        pairs = x.unflatten(-1, (-1, 2))
        return x * cos[:, None, :] + torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2) * sin[:, None, :]

    monkeypatch.setattr(doom, "sinusoid", lambda *args: sinusoid(*args).double())
    monkeypatch.setattr(doom, "apply_rope", apply_rope)
    sampler = doom.ChunkSampler(tiny_world(depth=1).double(), steps=2)
    inputs = [x.double() if x.is_floating_point() else x for x in world_inputs(tiny_world(depth=1), 8)]
    compiled = Traced(sampler, *inputs).compile(preset="exact")
    more = {"invariants": 32, "dead_tails": 1} if OLD else {"invariants": 29}
    assert fired(compiled.report.counts()) == {"equal_rows": 5, "share_steps": 2} | more
    with torch.no_grad():
        result, want = compiled(*inputs), sampler(*inputs)
    assert result.dtype == torch.float64 and relative(result, want) <= 1e-12


def test_pruned_context_is_the_model_on_selected_frames(world):
    sampler, traced = world
    compiled = traced.compile(preset="context")
    for revisit, kept in ((True, 12), (False, 8)):
        inputs = world_inputs(sampler.model, 20, revisit=revisit)
        plan = plan_context(inputs[9][0], inputs[3][0], compiled.run.config)
        assert len(plan.indices) == kept and (set(range(4, 8)) <= set(plan.indices)) == revisit
        with torch.no_grad():
            want = sampler(*keep(inputs, plan.indices))
            assert relative(compiled(*inputs), want) <= 1e-5
            assert relative(want, sampler(*inputs)) > 1e-3
            dropped = [i for i in range(20) if i not in plan.indices]
            inputs[7][:, :, dropped], inputs[8][:, dropped] = torch.nan, 1 << 40  # whatever they hold is never read
            assert relative(compiled(*inputs), want) <= 1e-5


def test_dense_ratios_make_sparse_attention_dense(world):
    sampler, traced = world
    compiled = traced.compile(preset="sparse", sparse__topk_ratio=1.0, sparse__prefill_ratio=1.0)
    inputs = world_inputs(sampler.model, 20)
    with torch.no_grad():
        assert relative(compiled(*inputs), sampler(*inputs)) <= 1e-5
    assert compiled.report.counts()["sparse_attention"] > 0


def test_sparse_attention_is_the_operator_by_hand(world):
    sampler, traced = world
    inputs = world_inputs(sampler.model, 20)
    result = traced.compile(preset="sparse")(*inputs)
    assert relative(result, by_hand(sampler, inputs, sparse=(0.175, 0.40))) <= 1e-5
    assert relative(result, by_hand(sampler, inputs)) > 1e-3


def packed_variant(traced, inputs, **options):
    """Variant of preset all for these inputs, with its context packed once."""
    compiled = traced.compile(preset="all", cache__enabled=False, **options)
    return compiled, compiled(*inputs)


def operators(module):
    return [str(n.target) for g in (module, *subgraphs(module).values()) for n in g.graph.nodes if str(n.target).startswith("li.")]


def pruned(world, frames):
    """The canonical graph with so many context frames, a constant."""
    sampler, traced = world
    facts = traced.facts()
    mode, fakes = _compat.static_fakes(traced.arguments(*world_inputs(sampler.model, frames)))
    module = copy.deepcopy(facts.module)
    prune_context(module, facts.context, frames)
    tidy(module)
    propagate(module, fakes, mode)
    return module


def test_context_is_packed_once_for_all_steps(world):
    """As many packed contexts as layers, made outside the regions; no region is handed keys that it does not read."""
    module = pruned(world, 12)
    assert operators(module) == [] and pack_context(module).count == 0
    sparse_attention(module, find_attention(module)[0], topk_ratio=0.2, prefill_ratio=0.3, tile=(4, 2, 2), block_size=16, sub_blocks=1,
                     min_context=4, skip_layers=0)  # fmt: skip
    tidy(module)
    record = pack_context(module)
    tidy(module)
    assert record.count == STEPS * DEPTH and not record.misses
    assert record.details == [f"{STEPS * DEPTH} attention calls share {DEPTH} packed contexts"]
    packs = [n for n in module.graph.nodes if str(n.target) == "li.pack_context.default"]
    assert len(packs) == DEPTH == operators(module).count("li.pack_context.default"), "outside of regions"
    for sub in subgraphs(module).values():
        assert all(p.users for p in placeholders(sub.graph))
    assert pack_context(module).count == 0, "idempotent"


def test_packed_context_changes_no_number(world):
    sampler, traced = world
    inputs = world_inputs(sampler.model, 20, revisit=True)
    compiled, result = packed_variant(traced, inputs)
    assert variant(compiled, 12, False).counts()["pack_context"] == STEPS * (DEPTH - 1)
    plan = plan_context(inputs[9][0], inputs[3][0], compiled.run.config)
    want = by_hand(sampler, inputs, indices=plan.indices, sparse=(0.175, 0.40))
    assert relative(result, want) <= 1e-5


def test_summaries_and_head_ratios_reach_the_operator(world):
    """More of the context for every head gives what a higher ratio for all gives; summaries change the result."""
    sampler, traced = world
    inputs = world_inputs(sampler.model, 20, revisit=True)
    heads = sampler.model.config.heads
    _, plain = packed_variant(traced, inputs)
    _, wide = packed_variant(traced, inputs, sparse__topk_ratio=0.5)
    _, each = packed_variant(traced, inputs, sparse__head_ratios=(0.5,) * heads)
    assert relative(each, wide) <= 1e-6 and relative(plain, wide) > 1e-4
    _, whole = packed_variant(traced, inputs, sparse__summary=True)
    assert relative(whole, plain) > 1e-4
    compiled, _ = packed_variant(traced, inputs, sparse__head_ratios=(0.5,) * (heads + 1))
    assert f"sparse.head_ratios has {heads + 1} ratios, and here are {heads} heads" in compiled.reasons


def test_cached_steps_are_the_two_step_loop(world):
    sampler, traced = world
    compiled = traced.compile(preset="cache")
    inputs = world_inputs(sampler.model, 20, revisit=True)
    result = compiled(*inputs)
    assert relative(result, by_hand(sampler, inputs, reuse=True)) <= 1e-5
    assert relative(result, by_hand(sampler, inputs)) > 1e-3
    assert variant(compiled, None, True).flops < 0.9 * variant(compiled, None, False).flops
    fresh = world_inputs(sampler.model, 20)
    assert relative(compiled(*fresh), by_hand(sampler, fresh)) <= 1e-5


def test_all_is_the_three_together(world):
    sampler, traced = world
    compiled = traced.compile(preset="all")
    for revisit in (True, False):
        inputs = world_inputs(sampler.model, 20, revisit=revisit)
        indices = plan_context(inputs[9][0], inputs[3][0], compiled.run.config).indices
        want = by_hand(sampler, inputs, indices=indices, reuse=revisit, sparse=(0.175, 0.40))
        assert relative(compiled(*inputs), want) <= 1e-5


def graph_text(module) -> str:
    return "\n".join(str(m.graph) for m in module.modules() if isinstance(m, torch.fx.GraphModule))


@pytest.mark.parametrize("run", [normalize, equal_rows], ids=lambda f: f.__name__)
def test_running_a_pass_twice_changes_nothing(world, run):
    _, traced = world
    module = copy.deepcopy(traced.module) if run is normalize else canonical(traced.module, traced.fakes)
    first = run(module)
    assert first.count > 0 or run is normalize
    before = graph_text(module)
    again = run(module)
    assert again.count == 0 and graph_text(module) == before


def test_normalising_twice_where_there_is_much_to_do():
    def fn(q, k, v):
        k, v = torch.cat([k], dim=2), nn.functional.dropout(v.repeat_interleave(1, dim=0), 0.0)
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v

    inputs = [torch.randn(1, 2, 6, 8) for _ in range(3)]
    module = copy.deepcopy(Traced(fn, *inputs).module)
    assert normalize(module).count == 4 and normalize(module).count == 0


def test_an_einsum_that_moves_and_a_stack_of_one_are_moves():
    def fn(x):
        return torch.einsum("a b c->cab", x), torch.stack([x], dim=2), torch.einsum("abc->ab", x), torch.einsum("abb->ab", x[:, :2, :2])

    traced = Traced(fn, torch.randn(2, 3, 4))
    module = copy.deepcopy(traced.module)
    assert normalize(module).count == 2
    assert [name_of(n) for n in module.graph.nodes].count("einsum") == 2
    assert all(map(torch.equal, module(torch.ones(2, 3, 4)), fn(torch.ones(2, 3, 4))))


def test_two_steps_of_the_world_are_both_computed(tiny_world):
    from examples.doom_world.model import ChunkSampler

    sampler = ChunkSampler(tiny_world(depth=1), steps=2)
    inputs = world_inputs(sampler.model, 20, revisit=True)
    compiled = Traced(sampler, *dynamic(inputs)).compile(preset="cache")
    with torch.no_grad():
        assert relative(compiled(*inputs), sampler(*inputs)) <= 1e-5
    assert [v.reuse for v in compiled.graph.variants] == [False]
    assert "2 denoising steps, reuse needs at least 3" in compiled.reasons


class Repeated(nn.Module):
    """Shapes of repetition that the pass must tell apart."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, how):
        if how == "rows":  # each row of x stands for four tokens: one Linear on a fourth of the rows
            return self.linear(nn.functional.silu(x.repeat_interleave(4, dim=1) * 2))
        if how == "features":  # the repetition is along what the Linear mixes
            return self.linear(x[..., :2].repeat_interleave(3, dim=2))
        if how == "mixed":  # what is added differs from token to token
            return self.linear(x.repeat_interleave(4, dim=1) + torch.arange(4 * x.shape[1])[:, None])
        return self.linear(x.repeat_interleave(4, dim=1).softmax(1))  # a softmax over the rows themselves


@pytest.mark.parametrize(("how", "count"), [("rows", 1), ("features", 0), ("mixed", 0), ("reduced", 0)])
def test_rows_that_are_equal_and_rows_that_are_not(how, count):
    module, x = Repeated(), torch.randn(2, 3, 6)
    traced = Traced(lambda x: module(x, how), x)
    graph = canonical(traced.module, traced.fakes)
    assert equal_rows(graph).count == count
    with torch.no_grad():
        assert relative(graph(*traced.arguments(x))[0], module(x, how)) <= 1e-6


def replaced(x, y, how):
    """A place that is written, read, written, read and written again, with something done in between."""
    out, place = (x.double() if how == "dtype" else x.clone()), slice(1, 3)
    old, seen = out[place], x
    out[place] = y
    if how == "read between":
        seen = out.sum()
    if how == "written elsewhere":
        out.mul_(2)
    if how == "an old view":
        seen = old * 2
    if how == "another place":
        place = slice(0, 2)
    a = out[place]
    out[place] = a.to(y.dtype) + 1
    b = out[place]
    out[place] = b.to(y.dtype) * 3
    if how == "read late":
        seen = b * 2  # of a view: this is what was stored last
    return out * 1, seen * 1


@pytest.mark.parametrize(("how", "left"), [
    ("nothing", (0, 1)), ("read between", (0, 2)), ("written elsewhere", (1, 2)), ("an old view", (1, 2)), ("another place", (1, 2)),
    ("dtype", (1, 3)), ("read late", (1, 2))])
def test_stores_that_are_forwarded(how, left):
    """(reads, stores) that are left of two reads, one old view and three stores."""
    given = torch.randn(4, 3), torch.randn(2, 3)
    traced = Traced(lambda x, y: replaced(x, y, how), *given)
    module = canonical(traced.module, traced.fakes)
    count = lambda what: sum(n.target is what for n in module.graph.nodes)
    assert (count(operator.getitem), count(operator.setitem)) == left
    for got, want in zip(module(*traced.arguments(*given)), replaced(*given, how)):
        assert torch.equal(got, want)

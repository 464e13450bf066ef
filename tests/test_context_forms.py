"""Context in the forms other than a whole chunk's: found, pruned exactly, and left alone with a reason where it cannot be."""

from __future__ import annotations

import pytest
import torch
from context_models import (ARGUMENTS, DEPTH, TOKENS, Remembering, Rolling, attend, keep_memory, mark, remembering_inputs,
                            rolling_inputs, rotate)
from tracing import Traced, relative, seeded, turn, world_inputs

from li_compile import Config, Session
from li_compile.backend import last_report
from li_compile.errors import PoseError
from li_compile.patterns import Family, registry

BASE = {"lowering": "eager", "strict": True, "preset": "context", "context.policy": "authors"}


pytestmark = pytest.mark.usefixtures("own_report")


def session(history: int, *, revisit: bool, **options) -> Session:
    """A session after so many latents of a steady turn; with revisit, the next chunk looks where latents 4 to 7 did."""
    made = Session(Config.from_options({"preset": "context", "context.policy": "authors", "context.fov": (90, 70)} | options))
    made.extend(torch.stack([turn(7.5 * (0 if revisit and 4 <= i < 8 else i)) for i in range(history)]))
    made.extend(torch.stack([turn(7.5 * (0 if revisit else history + i)) for i in range(4)]))
    return made


def compiled(fn, dynamic=None, **options):
    return torch.compile(fn, backend="light_interaction", fullgraph=True, dynamic=dynamic, options=BASE | options)


# Memory latents in front of the new ones, as in Matrix-Game-3.0.


@pytest.mark.parametrize(("join", "pin"), [(True, False), (True, True), (False, False)],
                         ids=["latents joined in the graph", "and past frames pinned", "q and k joined after RoPE"])
def test_memory_is_found_and_pruned_at_the_source(join, pin):
    model = seeded(Remembering, join=join, pin=pin)
    inputs = remembering_inputs(20, join)
    traced = Traced(model, *mark(inputs, join))
    context = traced.facts().context
    assert (context.form, context.frames, context.tokens, context.current) == ("latents", 20, TOKENS, 4)
    assert context.sites == 2 * DEPTH + join + pin  # q and k of each block, and the latents
    held = {name.removeprefix("l_").removesuffix("_"): (c.dim, c.per, c.rest) for name, c in context.inputs.items()}
    want = {"memory_keys": (1, 1, 0), "memory_index": (0, 1, 0), "rays": (2, 1, 4), "mask": (1, TOKENS, 4 * TOKENS)}
    want |= {"memory": (2, 1, 0), "memory_time": (1, TOKENS, 0)} if join else {"x": (2, 1, 4), "time": (1, TOKENS, 4 * TOKENS)}
    assert held == want and context.positions == "l_memory_index_"

    fn = traced.compile(**BASE)
    with torch.no_grad():
        for revisit in (True, False):
            with session(20, revisit=revisit) as s, s.chunk(20) as plan:
                result = fn(*(inputs[n] for n in ARGUMENTS))
            assert len(plan.indices) == (12 if revisit else 8)
            kept = keep_memory(inputs, plan.indices, join)  # positions are kept, as the family's own index input says
            assert relative(result, model(*kept)) <= 1e-5
            assert relative(result, model(*(inputs[n] for n in ARGUMENTS))) > 1e-3
        assert relative(fn(*(inputs[n] for n in ARGUMENTS)), model(*(inputs[n] for n in ARGUMENTS))) <= 1e-5  # no session, no plan
    counts = {v.kept: v.counts()["prune_context"] for v in fn.graph.variants if v.kept}
    assert counts == {8: context.sites, 12: context.sites}


def test_matrix_games_slots_are_pruned():
    """Five slots; the plan says which stay. Another number of slots is the user's mistake and is named."""
    model = seeded(Remembering)
    inputs = remembering_inputs(5)
    fn = Traced(model, *mark(inputs)).compile(**BASE | {"context.policy": "slots"})
    s = Session(Config.from_options({"preset": "context", "context.policy": "slots"}))
    s.extend(torch.stack([turn(1.5 * i) for i in range(97)]))
    with torch.no_grad(), s, s.chunk(41, 56) as plan:
        assert plan.slots == (4,)
        assert relative(fn(*(inputs[n] for n in ARGUMENTS)), model(*keep_memory(inputs, plan.slots))) <= 1e-5
        with pytest.raises(PoseError, match="plan is for 5 context frames, .* holds 6"):
            fn(*mark(remembering_inputs(6)))
    assert s.stats()["chunks"] == 1  # however many forwards it takes


def test_a_family_can_compact_positions(monkeypatch):
    """The kept frames then take the indices of the newest ones: the temporal reframing of HY-WorldPlay."""
    monkeypatch.setitem(registry._FAMILIES, "compacting", Family("compacting", roles={"positions": "memory_index"}, positions="compact"))
    model, inputs = seeded(Remembering), remembering_inputs(20)
    fn = Traced(model, *mark(inputs)).compile(**BASE | {"family": "compacting"})
    with torch.no_grad(), session(20, revisit=True) as s, s.chunk(20) as plan:
        kept = keep_memory(inputs, plan.indices)
        kept[ARGUMENTS.index("memory_index")] = inputs["memory_index"][-12:]
        assert relative(fn(*(inputs[n] for n in ARGUMENTS)), model(*kept)) <= 1e-5


@pytest.mark.parametrize("which", ["constant", "returned", "kept"])
def test_memory_that_cannot_be_pruned_has_a_reason(monkeypatch, which):
    model, inputs = seeded(Remembering, whole=which == "returned"), remembering_inputs(20)
    options = dict(BASE)
    if which == "kept":  # a model whose positions follow from the length, of a family that keeps them
        monkeypatch.setitem(registry._FAMILIES, "keeping", Family("keeping", positions="keep"))
        original = model.forward
        model.forward = lambda *a: original(*a[:8], torch.arange(a[2].shape[2]), a[9])
        options["family"] = "keeping"
    fn = Traced(model, *(([inputs[n] for n in ARGUMENTS]) if which == "constant" else mark(inputs))).compile(**options)
    words = {"constant": "memory latents (20) is a constant of this graph; mark their dimension", "returned": "the graph returns",
             "kept": "the family keeps temporal indices"}[which]
    assert words in fn.reasons
    with torch.no_grad(), session(20, revisit=True) as s, s.chunk(20):
        assert relative(fn(*(inputs[n] for n in ARGUMENTS)), model(*(inputs[n] for n in ARGUMENTS))) <= 1e-5


def test_a_pruned_form_is_explained():
    import li_compile

    model, inputs = seeded(Remembering), remembering_inputs(20)
    report = li_compile.explain(model, *mark(inputs), config=Config.from_options({"preset": "context", "context.policy": "authors"}))
    (graph,) = report.graphs
    assert "form latents" in graph.found["context"] and "no cameras" in graph.found["context"]
    assert [(v.kept, v.counts()["prune_context"]) for v in graph.variants] == [(8, 2 * DEPTH + 1), (12, 2 * DEPTH + 1)]
    assert graph.variants[0].flops < graph.variants[1].flops < graph.flops
    x, keys, values = rolling_inputs(20)
    (graph,) = li_compile.explain(seeded(Rolling), x, keys, values, 20, config=Config(preset="context")).graphs
    assert [(v.kept, v.counts()["prune_context"]) for v in graph.variants] == [(4, DEPTH), (8, DEPTH)]


# Cached keys and values.


@pytest.fixture(params=["regions", "unrolled"])
def step(request, tiny_world):
    """(one denoising step of the tiny world that is given context keys and values, its model)."""
    model = tiny_world(regional=request.param == "regions", depth=1)

    def run(x, time, action, w2c, intrinsics, text_k, text_v, keys, values, start):
        return model(x, time, action, w2c, intrinsics, text_k, text_v, (keys, values), start)[0]

    return run, model


def step_inputs(model, history: int):
    noise, prompt, action, w2c, intrinsics, text_k, text_v, latents, past_action, past_w2c = world_inputs(model, history)
    label = torch.full_like(past_action, 14.0, dtype=torch.float32)
    with torch.no_grad():
        blank = torch.zeros_like(latents[:, :1]).expand(-1, prompt.shape[1], -1, -1, -1)
        _, (keys, values) = model(torch.cat([latents, blank], 1), label, past_action, past_w2c, intrinsics, text_k, text_v)
    time = torch.full_like(action, 900.0, dtype=torch.float32)
    return [torch.cat([noise, prompt], 1), time, action, w2c, intrinsics, text_k, text_v, keys, values, history]


def chosen_cache(inputs, frames, tokens=16):
    entries = (torch.as_tensor(list(frames))[:, None] * tokens + torch.arange(tokens)).flatten()
    pick = lambda caches: [c.index_select(2, entries) for c in caches]
    return [*inputs[:7], pick(inputs[7]), pick(inputs[8]), inputs[9]]


@pytest.mark.parametrize("how", ["lists", "lists of ragged frames", "selection"])
def test_cached_context_is_not_read_where_it_is_pruned(step, how):
    fn, model = step
    options = {"lists": {"sparse.block_size": 16}, "lists of ragged frames": {"sparse.block_size": 32, "sparse.tile": (4, 2, 4)},
               "selection": {"preset": "all", "sparse.topk_ratio": 1.0, "sparse.min_context": 4, "sparse.tile": (4, 2, 2),
                             "sparse.block_size": 16}}[how]
    run = compiled(fn, **options)
    with torch.no_grad():
        for history in (20, 16):  # a constant in the first graph, dynamic in the second
            inputs = step_inputs(model, history)
            for revisit in (True, False):
                with session(history, revisit=revisit) as s, s.chunk(history) as plan:
                    spoilt = [*inputs[:7], *([c.clone() for c in x] for x in inputs[7:9]), inputs[9]]
                    dropped = sorted(set(range(history)) - set(plan.indices))
                    for cache in (*spoilt[7], *spoilt[8]):  # whatever they hold is never read
                        cache.unflatten(2, (history, -1))[:, :, dropped] = torch.nan
                    assert relative(run(*spoilt), fn(*chosen_cache(inputs, plan.indices))) <= 1e-5
            assert relative(run(*inputs), fn(*inputs)) <= 1e-5
    graph = last_report().graphs[0]
    assert "form cache" in graph.found["context"] and "Session.chunk()" in graph.found["context"]
    counts = {v.counts()["prune_context"] for v in graph.variants if v.kept}
    assert counts == {1}
    detail = next(v for v in graph.variants if v.kept).records[0].details[0]
    assert ("lists of frames in the kernel" if how == "lists" else "selected at 2 cached inputs") in detail


def test_an_unpruned_step_without_context_is_left_alone(step):
    fn, model = step
    inputs = step_inputs(model, 20)
    empty = lambda x, time, action, w2c, intrinsics, text_k, text_v: model(x, time, action, w2c, intrinsics, text_k, text_v)[0]
    facts = Traced(empty, *inputs[:7]).facts()
    assert facts.context is None
    assert "no attention has context frames" in " ".join(m.reason for m in facts.misses)


# Preallocated caches.


def rolled(model, x, keys, values, start, frames, first=0):
    """One step by hand: own keys written, and only these frames of the past read."""
    entries = (torch.as_tensor(list(frames))[:, None] * TOKENS + torch.arange(TOKENS)).flatten() + first * TOKENS
    room = len(entries) + x.shape[2] * TOKENS
    small = [[torch.zeros(1, room, *c.shape[2:], dtype=c.dtype) for c in caches] for caches in (keys, values)]
    for caches, given in zip(small, (keys, values)):
        for to, c in zip(caches, given):
            to[:, : len(entries)] = c[:, entries]
    # Written behind the kept frames, rotated as at their true place.
    index = torch.arange(x.shape[2]) + start
    tokens = model.patch(x).flatten(2).transpose(1, 2)
    for block, k_cache, v_cache in zip(model.blocks, *small):
        q, k, v = block.project(tokens)
        q, k = rotate(q, index), rotate(k, index)
        k_cache[:, len(entries) :], v_cache[:, len(entries) :] = k, v
        tokens = tokens + block.out(attend(q, k_cache.to(q.dtype), v_cache.to(q.dtype)))
    return model.final(tokens).unflatten(1, (-1, 2, 3)).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [0, 2])
def test_slices_of_a_preallocated_cache(dtype, first):
    model = seeded(Rolling)
    run = compiled(model)
    with torch.no_grad():
        for history in (20, 16, 20):  # the second start makes it a dynamic number
            for revisit in (True, False):
                x, keys, values = rolling_inputs(history + first, room=28, dtype=dtype)
                mine = [[c.clone() for c in caches] for caches in (keys, values)]
                with session(history, revisit=revisit) as s, s.chunk(history) as plan:
                    result = run(x, *mine, history + first, first)
                want = rolled(model, x, keys, values, history + first, plan.indices, first)
                assert relative(result, want) <= (1e-5 if dtype == torch.float32 else 2e-2)
                model(x, keys, values, history + first, first)
                for a, b in zip((*mine[0], *mine[1]), (*keys, *values)):  # what the step writes is what it wrote before
                    assert torch.isfinite(a).all() and (first or relative(a[:, : history * TOKENS].float(), b[:, : history * TOKENS].float()) == 0)
    graphs = [g for g in last_report().graphs if "context" in g.found]
    assert all("form slices" in g.found["context"] for g in graphs)
    assert {v.counts()["prune_context"] for g in graphs for v in g.variants if v.kept} == {DEPTH}


@pytest.mark.filterwarnings("ignore:light_interaction found nothing")
def test_slices_of_ragged_frames_are_left_alone():
    model, (x, keys, values) = seeded(Rolling, skip=1), rolling_inputs(20)
    run = compiled(model)
    with torch.no_grad(), session(20, revisit=True) as s, s.chunk(20):
        result = run(x, [k.clone() for k in keys], [v.clone() for v in values], 20)
        assert relative(result, model(x, keys, values, 20)) <= 1e-5
    reasons = [m.reason for m in last_report().graphs[0].misses if m.pattern == "context"]
    assert any("read in 143 and written in 24 tokens, which are no whole frames of 6" in r for r in reasons)


def test_a_moving_start_compiles_no_new_variant():
    model = seeded(Rolling)
    run = compiled(model)
    with torch.no_grad():
        for history in (20, 24, 28, 32, 36):
            x, keys, values = rolling_inputs(history, room=48)
            with session(history, revisit=True) as s, s.chunk(history) as plan:
                assert relative(run(x, keys, values, history), rolled(model, *rolling_inputs(history, room=48), history, plan.indices)) <= 1e-5
    constant, moving = last_report().graphs  # Dynamo takes the first start for a constant
    assert [v.kept for v in constant.variants] == [v.kept for v in moving.variants] == [None, 12]

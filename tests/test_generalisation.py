"""Models of forms that the matchers were not written for: what is rewritten, what is not and why, and that results are right."""

from __future__ import annotations

import importlib
import pathlib

import pytest
import torch
from models import axial, paired, posed, rolling
from tracing import fired, relative, seeded, turn

import li_compile
from li_compile import Config, Session
from li_compile.backend import last_report
from li_compile.patterns import registry

BASE = {"lowering": "eager", "strict": True, "context.policy": "authors", "context.fov": (90, 70), "sparse.tile": (4, 2, 2),
        "sparse.block_size": 16, "sparse.skip_layers": 0, "sparse.min_context": 4, "cache.guard": None}
NAMES = ("rolling", "paired", "axial", "posed")


@pytest.fixture(autouse=True, scope="module")
def families():
    """The four families, registered as a user's package registers them, and forgotten afterwards."""
    registry.families()
    before = {name: dict(getattr(registry, name)) for name in ("_FAMILIES", "_PATTERNS", "_ORIGINS")}
    yield {name: importlib.import_module(f"models.{name}_family").FAMILY for name in NAMES}
    for name, known in before.items():
        getattr(registry, name).clear()
        getattr(registry, name).update(known)


pytestmark = pytest.mark.usefixtures("own_report")


def compiled(fn, **options):
    return li_compile.compile(fn, Config.from_options(BASE | {k.replace("__", "."): v for k, v in options.items()}))


def only_graph(report):
    (graph,) = report.graphs
    return graph


def explained(fn, *args, **options):
    report = li_compile.explain(fn, *args, config=Config.from_options(BASE | {k.replace("__", "."): v for k, v in options.items()}))
    assert not report.breaks
    return report, only_graph(report)


def reasons(graph) -> list[str]:
    return [f"{m.pattern}: {m.reason}" for m in graph.misses]


def run(fn, *args):
    with torch.no_grad():
        return fn(*args)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_file_is_short(name):
    assert len((pathlib.Path(__file__).parent / "models" / f"{name}_family.py").read_text().splitlines()) <= 80


# Self-Forcing, Matrix-Game-2.


def rolling_inputs(filled: int = 20, room: int = 24):
    random = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=random)
    video = (1, rolling.CHANNELS, rolling.CHUNK, 8, 8)
    return draw(*video), draw(3, *video), draw(1, rolling.CHUNK, 3), *rolling.caches(room, filled), filled


def test_rolling_chunk_is_read_whole():
    report, graph = explained(rolling.ChunkSampler(seeded(rolling.RollingWorld)), *rolling_inputs())
    assert graph.found["family"] == "rolling" and graph.found["pattern li_models"].startswith("9 nodes")  # the last call's last one is dead
    assert graph.found["context"].startswith("9 concatenations (form slices), 16 tokens")
    assert graph.found["denoising loop"].startswith("4 steps (unrolled), clean state and fresh noise")
    assert fired(report.counts()) == {"prune_context": 9, "equal_rows": 10, "invariants": 228, "share_steps": 4, "cached_steps": 2}
    assert [r for r in reasons(graph) if "preallocated cache" in r and "block-sparse attention does not apply" in r]
    assert all("rolling.py:" in m.where for m in graph.misses if m.pattern == "attention")


def test_rolling_chunk_exact_and_its_caches():
    sampler, inputs = rolling.ChunkSampler(seeded(rolling.RollingWorld)), rolling_inputs()
    mine = [[c.clone() for c in caches] for caches in inputs[3:5]]
    got = run(compiled(sampler, preset="exact"), *inputs[:3], *mine, inputs[5])
    assert relative(got, run(sampler, *inputs)) <= 1e-5
    for a, b in zip((*mine[0], *mine[1]), (*inputs[3], *inputs[4])):
        torch.testing.assert_close(a, b)  # no NaN is left: 20 + 4 frames fill it
    assert only_graph(last_report()).variants[0].counts()["share_steps"] == 4


def test_rolling_chunk_pruned_and_with_cached_steps_is_what_it_is_by_hand(monkeypatch):
    sampler, inputs = rolling.ChunkSampler(seeded(rolling.RollingWorld)), rolling_inputs()
    fast = compiled(sampler, cache__gate="always")
    session = Session(Config.from_options({"preset": "context", "context.policy": "authors", "context.fov": (90, 70)}))
    session.extend(torch.stack([turn(7.5 * (0 if 4 <= i < 8 else i)) for i in range(20)] + [turn(0)] * 4))
    mine = [[c.clone() for c in caches] for caches in inputs[3:5]]
    with session, session.chunk(20) as plan:
        got = run(fast, *inputs[:3], *mine, inputs[5])
    assert 0 < len(plan.indices) < 20

    own, kept = rolling.CHUNK * rolling.TOKENS, torch.tensor(plan.indices)
    tokens = (kept[:, None] * rolling.TOKENS + torch.arange(rolling.TOKENS)).flatten()
    choose = lambda c: torch.cat([c[:, tokens], c[:, -own:]], 1)
    dense = rolling.attend
    monkeypatch.setattr(rolling, "attend", lambda q, k, v: dense(q, choose(k), choose(v)))
    x, noise, action, keys, values, start = inputs
    label, held = lambda s: torch.full((1, rolling.CHUNK), 1000 * s), None
    with torch.no_grad():
        for i, sigma in enumerate(rolling.SIGMAS):
            held = held if i in (1, 2) else sampler.model(x, label(sigma), action, keys, values, start)
            clean = x - sigma * held
            if i < 3:
                x = (1 - rolling.SIGMAS[i + 1]) * clean + rolling.SIGMAS[i + 1] * noise[i]
        sampler.model(clean, label(0.0), action, keys, values, start)
    assert relative(got, clean) <= 1e-5
    for a, b in zip((*mine[0], *mine[1]), (*keys, *values)):
        assert relative(a, b) <= 1e-5


def test_rolling_rollout_with_eviction_over_several_chunks():
    """Step by step from Python, a cache that fills up and is shifted: the same as without us, chunk after chunk."""
    model = seeded(rolling.RollingWorld)
    fast = compiled(model, preset="exact", strict=False)
    results = []
    for call in (model, fast):
        keys, values = rolling.caches(12)
        filled, frames = 0, []
        for chunk in range(4):
            if filled == 12:
                for cache in (*keys, *values):
                    rolling.evict(cache, 4, filled)
                filled -= 4
            x = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(chunk))
            for sigma in (1.0, 0.5, 0.0):
                x = x - 0.5 * run(call, x, torch.full((1, 4), 1000 * sigma), torch.zeros(1, 4, 3), keys, values, filled)
            filled += 4
            frames.append(x)
        results.append(torch.cat(frames, 2))
    assert torch.isfinite(results[0]).all() and relative(results[1], results[0]) <= 1e-5


# LingBot, Wan2.2.


def test_paired_guidance_is_read_whole_after_preparation():
    report, graph = explained(paired.GuidedSampler(seeded(paired.PairedWorld)), *paired.inputs(), cache__gate="always")
    assert report.prepared == ["models.paired.PairedWorld.room", "models.paired.PairedWorld.lengths"]
    assert graph.found["attention, prefill"] == "20 sites, grid 4 x 4, 1 branches" and graph.found["pattern li_models_varlen"].startswith("40")
    assert "5 steps (unrolled)" in graph.found["denoising loop"] and "2 calls a step" in graph.found["denoising loop"]
    assert fired(report.counts()) == {"invariants": 330, "sparse_attention": 20, "share_steps": 10, "cached_steps": 3}
    assert any("cross-attention" in r for r in reasons(graph))
    assert "context: no attention has context frames among its keys" in reasons(graph)


def test_paired_unprepared_breaks_at_its_lengths():
    model = paired.GuidedSampler(seeded(paired.PairedWorld))
    report = li_compile.explain(model, *paired.inputs(), config=Config(family="doom_world"))
    assert report.breaks and not any("attention, prefill" in g.found for g in report.graphs)


@pytest.mark.parametrize("dense", [True, False], ids=["exact", "sparse, all blocks"])
def test_paired_equals_the_padded_model(dense):
    sampler, inputs = paired.GuidedSampler(seeded(paired.PairedWorld)), paired.inputs()
    want = run(sampler, *inputs)
    options = {"preset": "exact"} if dense else {"preset": "sparse", "sparse__prefill_ratio": 1.0}
    fast = compiled(sampler, **options)
    got = run(fast, *inputs)
    assert relative(got, want) <= 1e-5
    fast.detach()
    assert sampler.model.room == paired.FRAMES * paired.TOKENS + 5 and "lengths" not in vars(sampler.model)
    torch.testing.assert_close(run(sampler, *inputs), want, rtol=0, atol=0)


def test_paired_cached_steps_hold_both_branches():
    sampler, inputs = paired.GuidedSampler(seeded(paired.PairedWorld)), paired.inputs()
    calls, model = [], sampler.model.forward

    def hold(*args):
        step, branch = divmod(len(calls), 2)
        calls.append(model(*args) if step in (0, 4) else calls[-2])
        return calls[-1]

    sampler.model.forward = hold
    want = run(sampler, *inputs)
    del sampler.model.forward
    assert relative(run(compiled(sampler, preset="cache", cache__gate="always"), *inputs), want) <= 1e-5


# open-oasis.


def test_axial_loop_is_found_and_its_attention_left_alone():
    report, graph = explained(axial.FrameSampler(seeded(axial.AxialWorld)), *axial.inputs(), cache__gate="always")
    assert graph.found["pattern li_models"].startswith("16 nodes") and "4 steps (unrolled), first order" in graph.found["denoising loop"]
    assert fired(report.counts()) == {"invariants": 288, "share_steps": 4, "cached_steps": 2}
    found = reasons(graph)
    assert sum("it attends within one frame and to no context" in r for r in found) == 8
    assert sum("it is causal" in r for r in found) == 8
    assert "context: family 'axial' opts out of pruned context" in found


@pytest.mark.parametrize("skip", [(), (1, 2)], ids=["exact", "cached steps"])
def test_axial_equals_what_it_is_by_hand(skip):
    sampler, inputs = axial.FrameSampler(seeded(axial.AxialWorld)), axial.inputs(7)  # the window slides: 7 + 1 frames, 5 are read
    calls, model = [], sampler.model.forward

    def hold(*args):
        calls.append(calls[-1] if len(calls) in skip else model(*args))
        return calls[-1]

    sampler.model.forward = hold
    want = run(sampler, *inputs)
    del sampler.model.forward
    options = {"preset": "cache", "cache__gate": "always"} if skip else {"preset": "exact"}
    assert relative(run(compiled(sampler, **options), *inputs), want) <= 1e-5


# Matrix-Game-3.5.


def posed_inputs(frames: int) -> list:
    inputs = posed.inputs(frames)
    for tensor in (*inputs[3], *inputs[4], inputs[5]):
        torch._dynamo.mark_dynamic(tensor, 1)
    return inputs


def test_posed_keys_are_told_apart_though_rotated_after_they_are_joined():
    report, graph = explained(seeded(posed.PosedWorld), *posed.inputs(20))
    assert report.prepared == ["models.posed.PosedWorld.mask"]
    assert graph.found["attention, decode"] == "2 sites, grid 4 x 4, 1 branches"
    assert graph.found["context"].startswith("2 concatenations (form frames), 16 tokens a frame, inputs l_past_w2c_, l_keys_0_")
    assert fired(report.counts()) == {"prune_context": 2, "equal_rows": 2, "invariants": 40, "sparse_attention": 2, "pack_context": 2}
    assert any(r.startswith("denoising loop:") for r in reasons(graph))


def test_posed_with_its_mask_is_left_alone_with_the_reason():
    inputs = [*posed.inputs(20), torch.ones(1, 20, dtype=torch.bool)]
    _, graph = explained(seeded(posed.PosedWorld), *inputs, family="doom_world", preset="exact")
    found = [m for m in graph.misses if m.pattern == "attention"]
    assert len(found) == 2 and all("it has an attention mask" in m.reason and "posed.py:" in m.where for m in found)


@pytest.mark.parametrize("options", [{"preset": "exact"}, {"preset": "sparse", "sparse__topk_ratio": 1.0}, {"preset": "context"}],
                         ids=["exact", "sparse, all blocks", "pruned context"])
def test_posed_equals_what_it_is_by_hand(options):
    model = seeded(posed.PosedWorld)
    fast = compiled(model, **options)
    for frames in (20, 16):
        inputs = posed_inputs(frames)
        got, kept = run(fast, *inputs), range(frames)
        if options["preset"] == "context":
            config = Config.from_options({"preset": "context", "context.policy": "authors", "context.fov": (90, 70)})
            session = Session(config)
            session.extend(torch.cat([inputs[5][0], inputs[2][0]]))
            kept = session.plan(frames).indices
            assert 0 < len(kept) < frames
        index = torch.tensor(list(kept))
        tokens = (index[:, None] * posed.TOKENS + torch.arange(posed.TOKENS)).flatten()
        x, t, w2c, keys, values, past = inputs
        want = run(model, x, t, w2c, [k[:, tokens] for k in keys], [v[:, tokens] for v in values], past[:, index])
        for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)):
            assert relative(a, b) <= 1e-5

"""The Matrix-Game-3.0 family without upstream's code: what its preparation puts in place, a clip as one function, and whole rollouts of a
reduced model through a stand-in for upstream's pipeline."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from models import matrix_game
from models.matrix_game import PAST, MatrixGame, inputs, times
from samplers import UniPC, shifted
from test_policies import matrix_game as poses_of
from tracing import relative, seeded

import li_compile
from li_compile.kernels.layout import neighbour_mask, tile_order
from li_compile.patterns import Family, register_family, registry
from li_compile.patterns.families import matrix_game_3 as family
from li_compile.patterns.families.matrix_game_3_clip import Clip
from li_compile.patterns.families.matrix_game_3_rollout import attach
from li_compile.patterns.preparation import arguments_of, settle
from li_compile.patterns.recognise import recognised
from li_compile.policy import plan_context

LEVELS = tuple(shifted(3, most=0.9998))
TIMES = tuple(float(int(1000 * level)) for level in LEVELS[:-1])
SLOTS = {"context.policy": "slots", "cache.threshold": 0.45, "cache.guard": None, "lowering": "eager", "strict": True}


# What stands in for upstream's own functions.


def test_sizes_answer_as_the_tensor_that_upstream_asks():
    grid = family.stack([family.tensor(torch.Size([19, 2, 3]))])
    real = torch.tensor([[19, 2, 3]])
    assert grid[0][1] * grid[0][2] == real[0][1] * real[0][2] and grid.tolist() == real.tolist() and grid[0].prod().item() == 114
    window, kept = grid.clone(), real.clone()
    window[:, 0], kept[:, 0] = window[:, 0] - 5, kept[:, 0] - 5
    assert window.tolist() == kept.tolist() and grid.tolist() == real.tolist()
    window[:, 0] = 5
    assert window.tolist() == [[5, 2, 3]] and family.tensor([114]).max() == 114
    assert torch.equal(family.tensor([1.5, 2.0]), torch.tensor([1.5, 2.0])) and torch.equal(family.tensor([1], device="cpu"), torch.tensor([1]))
    assert torch.equal(family.stack([torch.ones(2)]), torch.ones(1, 2))


def test_rotary_embedding_in_real_numbers_is_that_in_complex_ones():
    model, x, frames = seeded(MatrixGame), torch.randn(1, 4 * 6, 2, 18), torch.tensor([7, 3, 3, 90])
    table = torch.view_as_real(model.table).movedim(3, 0)
    grid = family.Sizes([family.Sizes([4, 2, 3])])
    assert relative(family.rotate(x, grid, table, frames), matrix_game.turned(x, model.table, frames)) <= 1e-6
    assert relative(family.rotate(x, grid, table), matrix_game.turned(x, model.table, torch.arange(4))) <= 1e-6
    with pytest.raises(NotImplementedError, match="23 tokens for 4 frames of 2 x 3"):
        family.rotate(x[:, 1:], grid, table)


def test_positions_of_the_action_modules():
    module = types.SimpleNamespace(rope_theta=256, t_qkv=torch.nn.Linear(2, 2))
    cos, sin = family.action_positions(module, 5, 2, 2, 64, [8, 28, 28])
    angles = torch.arange(5.0)[:, None] * 256.0 ** -(torch.arange(4) / 4)
    assert cos.shape == sin.shape == (5, 64) and torch.allclose(cos[:, :8:2], angles.cos()) and torch.allclose(sin[:, 1:8:2], angles.sin())
    assert (cos[:, 8:] == 1).all() and (sin[:, 8:] == 0).all()


def test_attention_is_cut_to_the_valid_keys_and_is_in_half_precision_under_any_autocast():
    q, k, v = torch.randn(3, 1, 7, 2, 16).unbind(0)
    k[:, 5:], v[:, 5:] = float("nan"), float("nan")
    with torch.autocast("cpu", torch.bfloat16):
        got = family.attention(q, k, v, k_lens=family.Sizes([5]))
        full = family.attention(q, k, v, k_lens=family.Sizes([5]), dtype=torch.float32)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k[:, :5], v[:, :5]))).transpose(1, 2)
    assert got.dtype == torch.float32 and 1e-4 < relative(got, want) < 2e-2 and relative(full, want) <= 1e-6


@pytest.mark.parametrize(("given", "reason"), [({"dropout_p": 0.1}, "without dropout"), ({"window_size": (4, 4)}, "window"), ({"q_lens": [7]}, "whole sequences"),
                                               ({"k_lens": family.Sizes([5, 4])}, r"samples of \[5, 4\] tokens")])
def test_what_attention_does_not_take_is_said(given, reason):
    q = torch.randn(2, 7, 2, 16)
    with pytest.raises(NotImplementedError, match=reason):
        family.attention(q, q, q, **given)


def test_a_model_of_that_name_without_action_modules_is_another_family():
    assert recognised(["wan.modules.model.WanModel"]) == []
    assert recognised(["wan.modules.model.WanModel", "wan.modules.action_module.ActionModule"]) == [family.FAMILY]


def test_indices_become_tensors_and_only_memory_is_free_to_change():
    model, given = MatrixGame(), inputs(1) | {"t": torch.zeros(1, 84)}
    mine = Family("x", modules=(f"{MatrixGame.__module__}.MatrixGame",), arguments=family.arguments, holds=family.MEMORY)
    _, read, frames = arguments_of(model, mine, True)((), given)
    assert frames is None
    assert torch.equal(read["predict_latent_idx"], torch.arange(11, 25)) and read["memory_latent_idx"].tolist() == given["memory_latent_idx"]
    assert read["x_memory"]._dynamo_weak_dynamic_indices == {2} and 2 in read["x"]._dynamo_static_indices
    _, first, _ = family.arguments(model, (), inputs(0) | {"t": torch.zeros(1, 90), "predict_latent_idx": None})
    assert torch.equal(first["predict_latent_idx"], torch.arange(15)) and "memory_latent_idx" not in first
    with pytest.raises(ValueError, match=r"timestep_memory is of shape \(1, 30\), for 4 memory latents"):
        family.check_memory(inputs(1), 4, 14, 5)


# A clip.


def by_hand(model, given: dict, slots=None, skip=()):
    """The clip as upstream runs it: model and scheduler step by step, in padding; slots: of memory that are kept."""
    given, past = dict(given), PAST if "x_memory" in given else 1
    x = given.pop("x")
    if slots is not None:
        frames = torch.tensor(slots)
        tokens = (frames[:, None] * 6 + torch.arange(6)).flatten()
        rays = torch.cat([frames, torch.arange(5, 5 + x.shape[2])])
        given |= {n: given[n][:, frames] for n in ("mouse_cond_memory", "keyboard_cond_memory")}
        given |= {"x_memory": given["x_memory"][:, :, frames], "timestep_memory": given["timestep_memory"][:, tokens],
                  "plucker_emb": given["plucker_emb"][:, :, rays], "memory_latent_idx": torch.as_tensor(given["memory_latent_idx"])[frames]}
    scheduler, start, velocity = UniPC(LEVELS), x, None
    for i, time in enumerate(TIMES):
        velocity = velocity if i in skip else model(x=x, t=times(x, time, past), **given)
        x = torch.cat([start[:, :, :past], scheduler.step(velocity, x)[:, :, past:]], 2)
    return x


def clip_arguments(given: dict, prune: bool = False):
    _, read, _ = family.arguments(seeded(MatrixGame), (), given | {"t": None})
    settle(family.FAMILY, read, prune)
    return read["x"], LEVELS, TIMES, {n: v for n, v in read.items() if n not in ("x", "t", "seq_len", "timestep_memory")} | {}


@pytest.mark.parametrize(("lowering", "clip", "depth"), [("eager", 0, 2), ("eager", 1, 2), ("inductor", 1, 1)])
def test_a_clip_is_one_graph_whose_steps_share_one_region(own_report, lowering, clip, depth):
    model, given = seeded(MatrixGame, depth=depth), inputs(clip)
    compiled = li_compile.compile(Clip(model), li_compile.Config.from_options({"preset": "exact", "lowering": lowering, "strict": True}))
    with torch.no_grad():
        torch._dynamo.utils.counters.clear()
        assert relative(compiled(*clip_arguments(given)), by_hand(model, given)) <= 1e-5
    (graph,) = compiled.report().graphs
    assert not torch._dynamo.utils.counters["graph_break"] and graph.found["denoising loop"].startswith("3 steps (unrolled), multistep")
    counts = compiled.report().counts()
    assert counts["share_steps"] == 3 and counts["functional_writes"] == 3 * (depth - 1) * (8 if clip else 4)


TILED = {"lowering": "eager", "strict": True, "family": "reduced_matrix_game", "preset": "sparse", "sparse.tile": (4, 2, 2), "sparse.block_size": 16,
         "sparse.skip_layers": 0}


def with_blocks_left_out(q, k, v):
    """A model's attention, of which the self-attention of a later clip keeps neighbouring blocks and those of the last 10 latents alone."""
    mask = None
    if k.shape[1] == 19 * 6:
        order = tile_order(19, 2, 3, (4, 2, 2))
        block = torch.argsort(order) // 16
        late = {int(block[i]) for i in range(9 * 6, 19 * 6)}
        kept = neighbour_mask(19, 2, 3, (4, 2, 2), 16).clone()
        kept[:, sorted(late)] = True
        assert len(late) < len(kept) and not kept.all()
        mask = F.pad(kept[block][:, block], (0, 0, 0, q.shape[1] - k.shape[1]), value=True)  # queries are padded
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_new_latents_of_a_clip_are_read_whole_at_any_ratio(small_family, own_report, monkeypatch, ratio):
    """Of the rest what blocks score, of which there is nothing here at the lower ratio but neighbours."""
    model, given = seeded(MatrixGame, depth=2, regional=True), inputs(1)
    compiled = li_compile.compile(Clip(model), li_compile.Config.from_options(TILED | {"sparse.topk_ratio": ratio, "sparse.prefill_ratio": 0.01}))
    with torch.no_grad():
        got, dense = compiled(*clip_arguments(given)), by_hand(model, given)
        monkeypatch.setattr(matrix_game, "attend", with_blocks_left_out)
        assert relative(got, dense if ratio == 1.0 else by_hand(model, given)) <= 1e-5
    assert (relative(got, dense) <= 1e-5) == (ratio == 1.0)
    (graph,) = compiled.report().graphs
    assert graph.variants[0].counts()["sparse_attention"] == 3 * 2
    (record,) = (r for r in graph.variants[0].records if r.name == "sparse_attention")
    assert all("[current 114, the last 10 frames protected]" in d for d in record.details) and not record.misses
    assert (record.flops > 0) == (ratio < 1), "as much as is left out"


def test_a_first_clip_has_no_history_to_choose_from(small_family, own_report):
    model, given = seeded(MatrixGame, depth=1), inputs(0)
    compiled = li_compile.compile(Clip(model), li_compile.Config.from_options(TILED))
    with torch.no_grad():
        assert relative(compiled(*clip_arguments(given)), by_hand(model, given)) <= 1e-5
    (graph,) = compiled.report().graphs
    assert graph.variants[0].counts()["sparse_attention"] == 0
    assert "1 context frames, sparse from 8 (sparse.min_context)" in {m.reason for m, _ in graph.left_alone()}


def test_where_new_latents_cannot_be_told_attention_stays_dense(small_family, own_report):
    """A function whose arguments have names of its own."""
    model = seeded(MatrixGame, depth=1)
    clip = Clip(model)
    run = lambda noise, *rest: clip(noise, *rest)
    compiled = li_compile.compile(run, li_compile.Config.from_options(TILED))
    with torch.no_grad():
        assert relative(compiled(*clip_arguments(inputs(1))), by_hand(model, inputs(1))) <= 1e-5
    (graph,) = compiled.report().graphs
    assert graph.variants[0].counts()["sparse_attention"] == 0
    assert "the family's inputs do not tell which of its frames are new and must be read whole" in {m.reason for m, _ in graph.left_alone()}


def test_new_latents_by_the_inputs():
    window = {"l_x_": (1, 4, 14, 4, 6), "l_plucker_emb_": (1, 6, 19, 4, 6)}
    assert family.current(window | {"l_x_memory_": (1, 4, 5, 4, 6)}) == 10
    assert family.current({"l_latents_": (1, 4, 15, 4, 6), "l_given_plucker_emb_": (1, 6, 15, 4, 6)}) == 14
    assert family.current({"l_noise_": (1, 4, 15, 4, 6)}) is None


def test_explain(small_family, own_report):
    report = li_compile.explain(Clip(seeded(MatrixGame, depth=2)), *clip_arguments(inputs(1), prune=True),
                                config=li_compile.Config.from_options(SLOTS | TILED | {"preset": "all"}))
    (graph,) = report.graphs
    assert not report.breaks and graph.found["attention, prefill"].startswith("6 sites, grid 2 x 3")
    assert "form latents" in graph.found["context"] and "multistep" in graph.found["denoising loop"]
    assert [(v.kept, v.reuse) for v in graph.variants] == [(1, False), (5, True)]
    assert graph.variants[0].counts()["prune_context"] > 0 and graph.variants[1].counts()["cached_steps"] == 1
    (padding,), pruned = graph.prepared, [r for v in graph.variants for r in v.records if r.name == "prune_context"]
    assert padding.details == ["6 of 120 tokens, exact, by the family's preparation"] and padding.flops > 0, "with memory's size a symbol"
    assert [r.flops > 0 for r in pruned] == [True, False], "what pruning saves, which is approximate, is told apart"
    assert [v.counts()["sparse_attention"] for v in graph.variants] == [0, 6], "of 5 and of 9 latents of history"
    reasons = [m.reason for m in graph.misses if m.pattern == "attention"]
    assert any("another stream" in r for r in reasons) and any("no whole number of latent frames" in r for r in reasons)


@pytest.mark.parametrize("clip", [0, 1])
def test_what_padding_would_cost_is_what_the_padded_graph_costs_more(small_family, own_report, clip):
    """To the operation and byte."""
    model, (x, _, _, given) = seeded(MatrixGame, depth=2), clip_arguments(inputs(clip))
    given |= {"x": x, "t": times(x, 1.0, PAST if clip else 1)} | ({"timestep_memory": torch.zeros(1, 5 * 6)} if clip else {})
    config = li_compile.Config.from_options({"preset": "exact", "lowering": "eager", "strict": True, "family": "reduced_matrix_game"})
    bare, padded = (li_compile.explain(model, config=config, **given, seq_len=n) for n in (0, matrix_game.LONGEST * 6))
    ((bare_graph,), (padded_graph,)) = bare.graphs, padded.graphs
    (record,) = bare_graph.prepared
    assert record.details == [f"{6 if clip else 30} of 120 tokens, exact, by the family's preparation"]
    assert record.flops == padded_graph.flops - bare_graph.flops > 0 and record.bytes == padded_graph.bytes - bare_graph.bytes > 0
    assert not padded_graph.prepared and "padding left out" in str(bare) and "padding left out" in bare.html() and "padding left out" not in str(padded)


# A rollout.


class Scheduler(UniPC):
    def __init__(self):
        super().__init__(LEVELS)

    def set_timesteps(self, steps, device=None, shift=None):
        assert (steps, shift) == (3, 5.0)
        self.timesteps = torch.tensor(TIMES)

    def step(self, model_output, timestep, sample, return_dict=True):
        return (super().step(model_output, sample),)


def select(extrinsics, start, references, use_gpu=False):
    """Of each reference frame the frame of before that sees most of it."""
    w2c = torch.linalg.inv(extrinsics)
    return list(plan_context(w2c[:start], w2c[start: references[0] + 1], li_compile.Config.from_options(SLOTS | {"context.threshold": 0.0})).indices)


class Pipeline:
    """Upstream's interactive pipeline, as far as a family sees it. kind: of the camera's path."""

    def __init__(self, model, kind):
        self.model, self.kind = model, kind

    def generate(self, clips, use_base_model=False):
        module, poses, done, known = sys.modules[__name__], torch.linalg.inv(poses_of(self.kind)), [], None
        for clip in range(clips):
            given, end = inputs(clip), 57 + 40 * clip
            if clip:
                references = [end - back for back in (1, 9, 17, 25, 33)]
                frames = module.select_memory_idx_fov(poses[:end], end - 56, references, use_gpu=False)
                frames[-1] = 4
                latents = [(f - 1) // 4 + 1 for f in frames]
                given |= {"x_memory": torch.cat(done, 2)[:, :, latents], "memory_latent_idx": latents}
                given["x"] = torch.cat([known, given["x"][:, :, PAST:]], 2)
            x, scheduler = given.pop("x"), module.FlowUniPCMultistepScheduler()
            past, start = PAST if clip else 1, x
            scheduler.set_timesteps(3, device=x.device, shift=5.0)
            for t in scheduler.timesteps:
                out = self.model(x=x, t=times(x, float(t), past), **given)
                x = torch.cat([start[:, :, :past], scheduler.step(out, t, x, return_dict=False)[0][:, :, past:]], 2)
            known = x[:, :, -PAST:]
            done.append(x if clip == 0 else x[:, :, -10:])
        return done


FlowUniPCMultistepScheduler, select_memory_idx_fov = Scheduler, select


@pytest.fixture(scope="module")
def small_family():
    registry.families()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
        patch.setattr(registry, "_ORIGINS", dict(registry._ORIGINS))
        yield register_family(Family("reduced_matrix_game", pipelines=(f"{__name__}.Pipeline",), attach=attach, positions="keep",
                                     roles={"positions": "memory_latent_idx"}, current=family.current, padded=family.padded,
                                     groups={"action attention": ".actions"}, never_padded=("action attention",)))


def test_with_nothing_left_out_a_rollout_is_upstreams_and_detach_puts_all_back(small_family, own_report):
    pipeline = Pipeline(seeded(MatrixGame, depth=2, regional=True), "walk")
    before = dict(vars(pipeline)), dict(vars(sys.modules[__name__]))
    with torch.no_grad():
        want = pipeline.generate(3)
        compiled = li_compile.compile(pipeline, li_compile.Config.from_options({"preset": "exact", "lowering": "eager", "strict": True}))
        got = compiled.generate(3)
        assert max(map(relative, got, want)) <= 1e-5 and len(compiled.report().graphs) == 2  # with memory and without
        assert compiled.rollout.session.stats()["calls"] == 9
        assert compiled.detach() is pipeline and dict(vars(pipeline)) == before[0] and dict(vars(sys.modules[__name__])) == before[1]
        assert all(map(torch.equal, pipeline.generate(3), want))


@pytest.fixture(scope="module")
def rollouts(small_family):
    """kind -> (sessions' statistics, latents) of eight clips with pruned memory and reused steps, by one compiled pipeline."""
    pipeline, found = Pipeline(seeded(MatrixGame, depth=2, regional=True), "turn"), {}
    compiled = li_compile.compile(pipeline, li_compile.Config.from_options({"preset": "context", "cache.enabled": True} | SLOTS))
    with torch.no_grad():
        for kind in ("turn", "walk"):
            compiled.kind = kind
            latents = compiled.generate(8)
            found[kind] = compiled.rollout.session.stats(), latents
    graphs = len(compiled.report().graphs)
    compiled.detach()
    return pipeline, found, graphs


@pytest.mark.parametrize(("kind", "slots", "calls"), [("turn", [1, 1, 1, 5, 5, 5, 5], 20), ("walk", [5] * 7, 17)])
def test_slots_and_calls_of_the_released_replay(rollouts, kind, slots, calls):
    _, found, graphs = rollouts
    stats = found[kind][0]
    assert [c["context_kept"] for c in stats["per_chunk"]] == [0, *slots] and graphs == 2
    assert (stats["calls"], stats["calls_possible"]) == (calls, 24)
    assert [c["calls"] for c in stats["per_chunk"]] == [3, *(2 if n == 5 else 3 for n in slots)]


@pytest.mark.parametrize("kind", ["turn", "walk"])
def test_what_is_left_out_is_what_the_plan_says(rollouts, kind):
    """Clip by clip from the compiled rollout's own past: pruned slots and a held step, run by hand, padded as upstream does."""
    pipeline, found, _ = rollouts
    stats, latents = found[kind]
    poses = torch.linalg.inv(poses_of(kind))
    with torch.no_grad():
        for clip in (1, 4):
            end, plan = 57 + 40 * clip, stats["per_chunk"][clip]
            frames = [*select(poses[:end], end - 56, [end - 1])[:4], 4]
            indices = [(f - 1) // 4 + 1 for f in frames]
            past = torch.cat(latents[:clip], 2)
            given = inputs(clip) | {"x_memory": past[:, :, indices], "memory_latent_idx": indices}
            given["x"] = torch.cat([past[:, :, -PAST:], given["x"][:, :, PAST:]], 2)
            want = by_hand(pipeline.model, given, slots=range(5) if plan["context_kept"] == 5 else [4], skip=(1,) if plan["calls"] == 2 else ())
            assert relative(latents[clip], want[:, :, -10:]) <= 1e-5


def test_the_base_model_is_compiled_call_by_call(small_family, own_report):
    pipeline = Pipeline(seeded(MatrixGame, depth=2), "walk")
    with torch.no_grad():
        want = pipeline.generate(1)
        compiled = li_compile.compile(pipeline, li_compile.Config.from_options({"preset": "exact", "lowering": "eager", "strict": True}))
        assert relative(compiled.generate(1, use_base_model=True)[0], want[0]) <= 1e-5
    assert "denoising loop" not in compiled.report().graphs[0].found
    compiled.detach()


def test_another_policy_is_refused_and_the_pipeline_left_as_it_was(small_family):
    pipeline = Pipeline(MatrixGame(depth=1), "walk")
    before = dict(vars(pipeline))
    with pytest.raises(ValueError, match="fills memory slots, and context.policy is 'coverage'"):
        li_compile.compile(pipeline)
    assert vars(pipeline) == before

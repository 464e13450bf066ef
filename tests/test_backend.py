"""The backend as users meet it: found by name, errors and warnings, run-time plans, sessions, failures of passes."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tracing import OLD, TINY, Compiled, Traced, dynamic, fired, keep, relative, world_inputs

import li_compile
from li_compile import Session, _compat, pipeline
from li_compile.backend import last_report
from li_compile.config import Config
from li_compile.errors import PoseError, RewriteError
from li_compile.policy import plan_context

EAGER = {"lowering": "eager"}


pytestmark = pytest.mark.usefixtures("own_report")


@pytest.fixture(scope="session")
def sampler(tiny_world):
    from examples.doom_world.model import ChunkSampler

    return ChunkSampler(tiny_world(depth=1), steps=3)


@pytest.fixture(scope="session")
def traced(sampler):
    """The smallest world that has all patterns, with a dynamic number of context frames."""
    return Traced(sampler, *dynamic(world_inputs(sampler.model, 20)))


def compiled(fn, fullgraph=True, dynamic=None, **options):
    return torch.compile(fn, backend="light_interaction", fullgraph=fullgraph, dynamic=dynamic, options=EAGER | options)


def plain(x):
    return F.silu(x) @ x.mT


class Frames(nn.Module):
    """One self-attention over 8 frames of 2 x 2 tokens: an attention site and nothing else."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv = nn.Conv3d(3, 16, 1), nn.Linear(16, 48)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


# Front door.


def test_the_backend_is_listed_without_importing_us():
    code = ("import sys, torch\nassert 'light_interaction' in torch._dynamo.list_backends()\n"
            "assert not [m for m in sys.modules if m.startswith('li_compile')]\nprint('listed')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "listed", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse.topk_ration": 0.2}, "unknown option 'sparse.topk_ration'; did you mean 'sparse.topk_ratio'"),
        ({"topk_ratio": 0.2}, "did you mean 'sparse.topk_ratio'"),
        ({"max_autotune": True}, "under 'inductor'"),
        ({"preset": "spars"}, "did you mean 'sparse'"),
        ({"sparse.topk_ratio": 1.5}, "'sparse.topk_ratio' is 1.5; it must be a number in"),
        ({"family": "nonsense"}, "family 'nonsense' is unknown; known: doom_world"),
    ],
)
def test_bad_options_reach_the_user(options, message):
    """Dynamo wraps what a backend raises; the text must still be ours, with what to do."""
    fn = torch.compile(plain, backend="light_interaction", options=options)
    with pytest.raises(Exception, match="(?s)light_interaction.*ConfigError") as caught:
        fn(torch.ones(2, 2))
    assert message in str(caught.value)


def test_an_unknown_mode_reaches_the_user():
    fn = torch.compile(plain, backend="light_interaction", mode="fastest")
    with pytest.raises(Exception, match="mode 'fastest' is unknown; choose one of .*max-autotune"):
        fn(torch.ones(2, 2))


def test_a_known_mode_becomes_inductors_options(monkeypatch):
    seen = []
    monkeypatch.setattr(_compat, "inductor", lambda module, inputs, patches, key: seen.append(patches) or module)
    with pytest.warns(UserWarning, match="found nothing to rewrite"):
        torch.compile(plain, backend="light_interaction", mode="max-autotune-no-cudagraphs")(torch.ones(2, 2))
    assert seen == [{"max_autotune": True, "coordinate_descent_tuning": True}]


def test_preset_off_hands_the_traced_graph_to_inductor(monkeypatch):
    """Without any part on, Inductor gets what Dynamo traced, untouched."""
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx",
                        lambda module, inputs, config_patches: seen.append((module, config_patches)) or module)
    x = torch.randn(1, 3, 8, 2, 2)
    for backend, options in ((lambda module, _: seen.append((module, None)) or module, None),
                             ("light_interaction", {"preset": "off", "inductor": {"max_autotune": True}})):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(Frames(), backend=backend, **({"options": options} if options else {}))(x)
    (traced, _), (ours, patches) = seen
    assert str(ours.graph) == str(traced.graph) and patches.pop("max_autotune") is True
    (digest_pass,) = patches.values()
    assert digest_pass.uuid() == pipeline.digest(Config.from_options(options).digest())


# What is said where nothing is found, or where something is in the way.


def test_a_model_without_patterns_compiles_with_one_warning():
    fn, x = compiled(plain), torch.randn(3, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = fn(x), fn(x)
    assert all(torch.equal(o, plain(x)) for o in out)
    (warning,) = [w for w in caught if "light_interaction" in str(w.message)]
    for what in ("attention over latent frames", "context concatenation", "denoising loop", "li_compile.explain"):
        assert what in str(warning.message)


def test_the_warning_is_given_once_a_process():
    """One warning a graph, all of one text and place: Python's own filter shows the first."""
    x = torch.randn(3, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for fn in (lambda x: x + 1, lambda x: x * 2, plain):
            compiled(fn)(x)
    assert len([w for w in caught if "light_interaction" in str(w.message)]) == 1


def test_found_patterns_give_no_warning():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        compiled(Frames())(torch.randn(1, 3, 8, 2, 2))
    assert "attention, prefill" in last_report().graphs[0].found


def test_static_shapes_say_why_nothing_is_pruned(sampler):
    inputs = world_inputs(sampler.model, 20, revisit=True)
    with torch.no_grad():
        result = compiled(sampler, dynamic=False, **TINY | {"preset": "context"})(*inputs)
        assert relative(result, sampler(*inputs)) <= 1e-5
    (graph,) = last_report().graphs
    (miss,) = [m for m in graph.misses if m.pattern == "context"]
    assert "(20) is a constant of this graph" in miss.reason and "without dynamic=False" in miss.reason
    assert "mark_dynamic" in miss.reason and "model.py" in miss.where
    more = {"invariants": 41, "dead_tails": 1} if OLD else {"invariants": 38}
    assert fired(last_report().counts()) == {"equal_rows": 6 + 1, "share_steps": 3} | more


# Poses.


def test_different_numbers_of_context_frames(sampler, traced):
    inputs = world_inputs(sampler.model, 20)
    inputs[9] = inputs[9][:, :16]
    with pytest.raises(PoseError, match="context_latents_: 20.*context_w2c_: 16.*one pose and one action"):
        traced.compile(preset="context")(*inputs)


def test_a_graph_traced_with_too_few_poses_is_not_pruned(sampler):
    """Dynamo makes a graph of its own for them; it computes what the model does, and the report names the input."""
    inputs = world_inputs(sampler.model, 20)
    inputs[9] = inputs[9][:, :16].clone()
    with torch.no_grad():
        result = compiled(sampler, **TINY | {"preset": "context"})(*dynamic(inputs))
        assert relative(result, sampler(*inputs)) <= 1e-5
    (miss,) = [m for m in last_report().graphs[0].misses if m.pattern == "context"]
    assert "needed one input [..., 20 context frames, 4, 4]" in miss.reason
    assert "l_context_w2c_ of 16" in miss.reason and "give one pose a latent" in miss.reason


@pytest.mark.parametrize("preset", ["context", "cache", "all"])
@pytest.mark.parametrize(
    ("which", "spoil", "reason"),
    [
        (9, lambda p: p[:, 3, :3, :3].mul_(1.5), "history pose of frame 3 is no rigid motion"),
        (3, lambda p: p[:, 1, 3, 0].fill_(1), "current pose of frame 1.*last row"),
        (9, lambda p: p[:, 5, 0, 3].fill_(torch.nan), "history pose of frame 5 .*not finite"),
    ],
    ids=["scaled", "last row", "nan"],
)
def test_bad_poses(sampler, traced, preset, which, spoil, reason):
    inputs = world_inputs(sampler.model, 20)
    spoil(inputs[which])
    with pytest.raises(PoseError, match=reason):
        traced.compile(preset=preset)(*inputs)


def test_poses_of_partial_chunks(sampler, traced):
    with pytest.raises(PoseError, match="18 history poses are no whole number of chunks of 4"):
        traced.compile(preset="context")(*world_inputs(sampler.model, 18))


def test_a_batch_of_two(sampler):
    same, other = (world_inputs(sampler.model, 20, revisit=r, batch=2) for r in (True, False))
    traced = Traced(sampler, *dynamic(world_inputs(sampler.model, 20, batch=2)))
    fn, context = traced.compile(preset="all"), traced.compile(preset="context")
    single = lambda inputs, i: [x[:, i:i + 1] if n in (5, 6) else x[i:i + 1] for n, x in enumerate(inputs)]
    with torch.no_grad(), Session() as session:
        fn(*same)
        fn(*other)
        mixed = [x.clone() for x in same]
        for i in (3, 9):
            mixed[i][1] = other[i][1]
        fn(*mixed)
    kept = [(chunk["context_kept"], chunk["reuse"]) for chunk in session.stats()["per_chunk"]]
    assert kept == [(12, True), (8, False), (20, False)]  # who disagrees shares the plan that computes most
    assert "samples of the batch differ" in session.stats()["per_chunk"][-1]["reason"]
    with torch.no_grad():
        indices = plan_context(same[9][0], same[3][0], context.run.config).indices
        want = torch.cat([sampler(*keep(single(same, i), indices)) for i in range(2)])
        assert relative(context(*same), want) <= 1e-5
        assert relative(context(*mixed), sampler(*mixed)) <= 1e-5


# Sessions.


def test_sessions_count_their_own_chunks(sampler, traced):
    fn, inputs = traced.compile(preset="all"), {n: world_inputs(sampler.model, n) for n in (4, 8, 20)}
    revisit = world_inputs(sampler.model, 20, revisit=True)
    with Session() as outer:
        fn(*inputs[4])
        with Session() as inner:
            fn(*revisit)
        fn(*inputs[20])
        fn(*inputs[8])
    fn(*inputs[8])  # in no session
    stats = outer.stats()
    assert [c["context_kept"] for c in stats["per_chunk"]] == [4, 8, 8]
    assert stats["context_possible"] == 4 + 20 + 8 and stats["reused_chunks"] == 0
    assert stats["calls"] == stats["calls_possible"] == 9
    stats = inner.stats()
    assert stats["chunks"] == stats["reused_chunks"] == 1
    assert (stats["context_kept"], stats["context_possible"]) == (12, 20)
    assert (stats["calls"], stats["calls_possible"]) == (2, 3)
    assert stats["per_chunk"][0]["seconds"] > 0


def test_sessions_record_what_ran_without_pruning(sampler, traced):
    with Session() as session:
        traced.compile(preset="cache")(*world_inputs(sampler.model, 20, revisit=True))
    stats = session.stats()
    assert (stats["context_kept"], stats["calls"], stats["reused_chunks"]) == (20, 2, 1)


# Recompiling and caching.


def test_options_recompile_and_switching_back_does_not(monkeypatch):
    compiles, real = [], pipeline.match
    monkeypatch.setattr(pipeline, "match", lambda module, config: compiles.append(config) or real(module, config))
    model, x = Frames(), torch.randn(1, 3, 8, 2, 2)
    dense, thin = compiled(model, preset="exact"), compiled(model, preset="sparse", **{"sparse.skip_layers": 0})
    with torch.no_grad():
        for fn in (dense, thin, dense, thin, compiled(model, preset="exact")):
            fn(x)
    assert [c.preset for c in compiles] == ["exact", "sparse"]


def test_a_new_context_length_compiles_a_variant_and_no_graph(sampler):
    fn = compiled(sampler, **TINY | {"preset": "context"})
    with torch.no_grad():
        fn(*dynamic(world_inputs(sampler.model, 20)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for history in (8, 12, 16, 20):  # 4 is a graph of its own: prefill and steps are then one region
                fn(*world_inputs(sampler.model, history))
                fn(*world_inputs(sampler.model, history, revisit=True))
    (graph,) = last_report().graphs
    assert [v.kept for v in graph.variants] == [8, 12]


def test_the_default_policy_needs_two_variants(sampler):
    """Whatever the history and the view, the context has one of two lengths."""
    fn = compiled(sampler, **{k: v for k, v in TINY.items() if k != "context.policy"} | {"preset": "context"})
    with torch.no_grad(), Session() as session:
        fn(*dynamic(world_inputs(sampler.model, 20)))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for history in (8, 12, 16, 20):
                for revisit in (False, True):
                    inputs = world_inputs(sampler.model, history, revisit=revisit)
                    result = fn(*inputs)
                    plan = plan_context(inputs[9][0], inputs[3][0], Config.from_options(TINY | {"context.policy": "coverage"}))
                    assert relative(result, sampler(*keep(inputs, plan.indices))) <= 1e-5
    (graph,) = last_report().graphs
    kept = [v.kept for v in graph.variants]
    assert len(kept) == len(set(kept)) and set(kept) <= {4, 8}
    assert {chunk["context_kept"] for chunk in session.stats()["per_chunk"]} == set(kept)


def test_the_window_follows_the_latents_of_the_graph(sampler, traced):
    """Equation 1 is taken from the context's newest latents, once a call; a session smooths it from call to call."""
    fn = traced.compile(**{"preset": "context", "context.policy": "authors", "context.window": "dynamics", "context.memory_frames": 20,
                           "context.temporal_frames": 12, "context.kappa": 1.0, "context.alpha": 1.0, "context.threshold": 1.0})
    still, moving = world_inputs(sampler.model, 20), world_inputs(sampler.model, 20)
    still[7][:, :, 16:] = still[7][:, :, 12:16]
    moving[7][:, :, 16:] = moving[7][:, :, 12:16] + 100.0
    with Session() as session:
        for inputs in (still, moving):
            fn(*inputs)
    rows = session.stats()["per_chunk"]
    assert [row["window"] for row in rows] == [12, 4] and [row["context_kept"] for row in rows] == [16, 8]


def test_other_dynamic_sizes_have_variants_of_their_own(sampler):
    """A prompt of another length comes with the same context: not the variant that was compiled for the first."""
    fn = compiled(sampler, **TINY | {"preset": "context"})
    with torch.no_grad():
        for text in (8, 6, 5, 7):
            inputs = dynamic(world_inputs(sampler.model, 20))
            for i in (5, 6):
                inputs[i] = inputs[i][:, :, :, :text].clone()
                torch._dynamo.mark_dynamic(inputs[i], 3)
            plan = plan_context(inputs[9][0], inputs[3][0], Config.from_options(TINY))
            assert relative(fn(*inputs), sampler(*keep(inputs, plan.indices))) <= 1e-5
    (graph,) = last_report().graphs
    assert [v.kept for v in graph.variants] == [8] * 4


@pytest.fixture
def digest():
    """The cache key, computed anew each time."""
    from li_compile.patterns import registry

    return lambda options=None: pipeline._digest.__wrapped__(Config.from_options(options).digest(), registry.identity())


CHANGED = {"strict": True, "lowering": "eager", "inductor": {"max_autotune": True}, "family": "doom_world", "offload": True, "stream": True, "cuda_graphs": True,
           "exact.enabled": False, "exact.functional_writes": False, "exact.real_arithmetic": False, "exact.equal_rows": False,
           "exact.encode": False, "exact.dense_attention": False, "exact.linear_gelu": False, "exact.small_products": False, "exact.tile_order": False,
           "exact.invariants": False, "exact.invariant_memory": 0.2, "exact.dead_tails": False, "exact.merge_regions": False,
           "exact.shared_steps": False, "exact.repeated_blocks": False, "exact.islands": "bf16", "sparse.enabled": False, "sparse.topk_ratio": 0.2,
           "sparse.prefill_ratio": 0.2, "sparse.tile": (2, 8, 4), "sparse.block_size": 32, "sparse.sub_blocks": 2,
           "sparse.min_context": 4, "sparse.summary": True, "sparse.head_ratios": (0.5, 0.25),
           "sparse.skip_layers": 2, "sparse.grid": (12, 16), "context.enabled": False, "context.memory_frames": 16,
           "context.temporal_frames": 4, "context.anchor_frames": 0, "context.chunk_frames": 2, "context.threshold": 0.5,
           "context.fov": (90, 70), "context.radius": 4.0, "context.policy": "chunks", "context.hysteresis": 0.1,
           "context.min_gain": 0.1, "context.rule": "grid", "context.near": 0.2, "context.window": "dynamics", "context.alpha": 0.3,
           "context.kappa": 0.1, "context.dynamics_unit": "chunk", "context.teleport": 1.0, "context.slot_references": (1, 2),
           "context.slot_sink": 0, "context.slot_repeats": "drop", "context.intrinsics": (0.5, 0.9, 0.5, 0.5), "cache.enabled": False, "cache.threshold": 0.5,
           "cache.min_steps": 4, "cache.predictor": "linear", "cache.skip": (1,), "cache.gate": "always", "cache.guard": None,
           "cache.guard_chunks": 3}


def test_every_option_is_in_the_cache_key(digest):
    assert set(CHANGED) == set(Config().to_options()) - {"preset"}  # what a preset means is in the others
    frustum = {"context.rule": "frustum"}  # intrinsics mean nothing without it
    keys = [digest(), digest(frustum)]
    keys += [digest({name: given} | (frustum if name == "context.intrinsics" else {})) for name, given in CHANGED.items()]
    assert len(set(keys)) == len(keys) and digest() == keys[0]


@pytest.mark.parametrize("path", ["li_compile/dispatch.py", "passes/equal_rows.py", "patterns/loop.py",
                                  "patterns/families/doom_world.py", "kernels/sparse_attention.py"])
def test_every_source_file_is_in_the_cache_key(digest, monkeypatch, path):
    before, read, changed = digest(), pathlib.Path.read_bytes, []

    def read_bytes(file):
        if file.as_posix().endswith(path):
            changed.append(file)
            return read(file) + b"# changed"
        return read(file)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    assert digest() != before and changed


def test_a_registered_family_is_in_the_cache_key(digest, monkeypatch):
    from li_compile.patterns import Family, registry

    before = digest()
    monkeypatch.setitem(registry._FAMILIES, "another", Family("another"))
    assert digest() != before


# Passes that fail.


def fail(*args, **kwargs):
    raise RuntimeError("made to fail")


def substitute(monkeypatch, name, run):
    """Let another function stand in for a pass."""
    def other(*args, **kwargs):
        return run(*args, **kwargs)

    other.__name__ = name
    monkeypatch.setattr(pipeline, name, other)
    monkeypatch.setattr(pipeline, "EXACT", tuple(other if known.__name__ == name else known for known in pipeline.EXACT))


@pytest.mark.parametrize("name", ["equal_rows", "sparse_attention"])
def test_a_failing_pass_leaves_the_graph_as_it_was(sampler, traced, monkeypatch, name):
    def change_and_fail(module, *args, **kwargs):
        for node in module.graph.find_nodes(op="call_function", target=torch._C._nn.linear):
            node.replace_all_uses_with(node.args[0])  # half-done work must not be seen
        fail()

    substitute(monkeypatch, name, change_and_fail)
    options = {"preset": "exact" if name == "equal_rows" else "sparse", "exact.enabled": name == "equal_rows"}
    with pytest.warns(UserWarning, match=f"pass {name} failed on this graph and was left out.*made to fail"):
        fn = Compiled(traced, TINY | options | {"strict": False})
    inputs = world_inputs(sampler.model, 20)
    with torch.no_grad():
        assert relative(fn(*inputs), sampler(*inputs)) <= 1e-5
    assert fn.report.counts()[name] == 0 and "made to fail" in fn.reasons


def test_a_pass_that_leaves_a_broken_graph_is_undone(sampler, traced, monkeypatch):
    from li_compile.passes.record import Record

    def break_shapes(module):
        for node in module.graph.find_nodes(op="call_method", target="unflatten"):
            node.replace_all_uses_with(node.args[0])
        return Record("equal_rows", 1)

    substitute(monkeypatch, "equal_rows", break_shapes)
    with pytest.warns(UserWarning, match="pass equal_rows failed"):
        fn = Compiled(traced, TINY | {"preset": "exact", "strict": False})
    inputs = world_inputs(sampler.model, 20)
    with torch.no_grad():
        assert relative(fn(*inputs), sampler(*inputs)) <= 1e-5


def test_strict_raises_what_failed(monkeypatch):
    substitute(monkeypatch, "equal_rows", fail)
    said = "(?s)RewriteError.*pass equal_rows failed.*made to fail.*Switch the part off"
    with torch.no_grad(), pytest.raises(Exception, match=said):
        compiled(Frames(), preset="exact", strict=True)(torch.randn(1, 3, 8, 2, 2))


def test_pruning_cannot_be_left_out(sampler, traced, monkeypatch):
    monkeypatch.setattr(pipeline, "prune_context", fail)
    fn = Compiled(traced, TINY | {"preset": "context", "strict": False})
    with pytest.raises(RewriteError, match="pass prune_context failed.*made to fail"):
        fn(*world_inputs(sampler.model, 20))


# More than one graph.


def test_each_graph_of_a_broken_function_is_rewritten(sampler):
    def two_chunks(*inputs):
        first = sampler(*inputs)
        torch._dynamo.graph_break()
        return sampler(first, *inputs[1:])

    fn = compiled(two_chunks, fullgraph=False, **TINY | {"preset": "exact"})
    inputs = world_inputs(sampler.model, 8)
    with torch.no_grad():
        assert relative(fn(*inputs), two_chunks(*inputs)) <= 1e-5
    graphs = last_report().graphs
    assert [g.found["denoising loop"].split(",")[0] for g in graphs] == ["3 steps (regions)"] * 2
    more = {"invariants": 2 * 41, "dead_tails": 2} if OLD else {"invariants": 2 * 38}
    assert fired(last_report().counts()) == {"equal_rows": 2 * 7, "share_steps": 2 * 3} | more


def test_the_package_names_what_it_exports():
    assert {"Config", "Session", "LightInteractionError", "patterns"} <= set(dir(li_compile))

"""HY-WorldPlay's rollout, on the reduced model in a pipeline of our own and, where its tree is at hand, on upstream's at tiny size."""

from __future__ import annotations

import contextlib
import sys
import types
import weakref

import pytest
import torch
import upstream
from models import worldplay_rollout as reduced
from test_policy import left_right
from tracing import relative

import li_compile
from li_compile.errors import ConfigError
from li_compile.patterns.families.hy_rollout import ENCODING_TIME

OPTIONS = {"lowering": "eager", "strict": True, "sparse.tile": (4, 2, 2), "sparse.block_size": 16, "context.policy": "authors", "cache.guard": None}


@pytest.fixture(autouse=True)
def quick():
    """One thread, since the models are tiny; no gradients, as upstream's pipeline has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reduced", pytest.param("upstream", marks=upstream.needs_upstream)])
def make(request, monkeypatch):
    """make(chunks) -> (pipeline, inputs of a rollout that turns left and back)"""
    def make(chunks: int):
        if request.param == "upstream":
            pipe = upstream.pipeline(upstream.transformer(), chunks)
            return pipe, reduced.inputs(chunks, left_right(), upstream.TINY["in_channels"], widths=upstream.WIDTHS)
        return reduced.pipeline(monkeypatch, chunks), reduced.inputs(chunks, left_right())

    return make


@pytest.fixture
def make_reduced(monkeypatch):
    return lambda chunks=2, **given: (reduced.pipeline(monkeypatch, chunks), reduced.inputs(chunks, left_right(), **given))


def rollout(pipe, given):
    """The latents of one rollout; its scheduler is new, as upstream's pipeline makes one a call."""
    pipe.scheduler.set_begin_index(None)
    pipe.scheduler.set_timesteps(pipe.num_inference_steps)
    return pipe.ar_rollout(**{**given, "latents": given["latents"].clone()})


def compiled(pipe, **options):
    torch._dynamo.utils.counters.clear()
    return li_compile.compile(pipe, li_compile.Config.from_options(OPTIONS | {k.replace("__", "."): v for k, v in options.items()}))


def graphs() -> int:
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def keeps_to_the_authors_schedule(fast, run):
    """Assert that 16 chunks turning left and back have the authors' context and calls, twice the same. run: to the latents."""
    got = run()
    stats = fast.rollout.session.stats()
    assert (stats["context_kept"], stats["calls"], stats["calls_possible"]) == (148, 48, 64)
    assert [c["context_kept"] for c in stats["per_chunk"]] == [0, 4, 8, 8, 8, 8, 8, 8] + 8 * [12]
    assert [c["reuse"] for c in stats["per_chunk"]] == 8 * [False] + 8 * [True]
    assert graphs() == 5
    assert fast.report().counts()["sparse_attention"] >= 1
    assert torch.equal(run(), got) and graphs() == 5, "a rollout leaves nothing that the next one sees"


def test_with_approximations_off_the_latents_are_upstreams(make):
    """Contexts of 4 to 20 latents, in a graph for the first chunk's steps, one for context encodings and one for steps."""
    pipe, given = make(7)
    want = rollout(pipe, given)
    fast = compiled(pipe, preset="exact")
    assert relative(rollout(fast, given), want) <= 1e-5 and graphs() == 3
    counts = fast.report().counts()
    assert counts["equal_rows"] >= 20 and counts["functional_writes"] and not counts.get("sparse_attention")
    stats = fast.rollout.session.stats()
    assert (stats["context_kept"], stats["calls"]) == (4 + 8 + 12 + 16 + 20 + 20, 28)
    assert fast.detach() is pipe and {"ar_rollout", "_ar_rollout_inner"}.isdisjoint(vars(pipe))
    assert torch.equal(rollout(pipe, given), want)


@upstream.needs_upstream
def test_in_half_precision_it_is_no_further_from_fp32_than_upstream():
    given = reduced.inputs(2, left_right(), upstream.TINY["in_channels"], widths=upstream.WIDTHS)
    model, half = upstream.transformer(), upstream.transformer(dtype=torch.bfloat16)
    for p, q in zip(half.parameters(), model.parameters()):
        p.copy_(q)
    want = rollout(upstream.pipeline(model, 2), given)
    cast = lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    given |= {k: cast(v) for k, v in given.items() if k not in ("viewmats", "Ks", "timesteps")}
    given["extra_kwargs"] = {k: cast(v) for k, v in given["extra_kwargs"].items()}
    pipe = upstream.pipeline(half, 2)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = rollout(pipe, given), rollout(compiled(pipe, preset="exact"), given)
    assert graphs() == 3 and relative(ours.float(), theirs.float()) <= 1e-2
    assert relative(ours.float(), want) <= 1.05 * relative(theirs.float(), want)


def test_inductor_takes_graphs_of_any_context_length(monkeypatch):
    """One block, so that it is quick: a first chunk, an encoding and steps over 4 and over 8 latents."""
    pipe, given = reduced.pipeline(monkeypatch, 3, depth=1), reduced.inputs(3, left_right())
    want = rollout(pipe, given)
    assert relative(rollout(compiled(pipe, preset="exact", lowering="inductor"), given), want) <= 1e-5 and graphs() == 3


def test_the_authors_context_and_calls_through_the_pipelines_loop(make):
    """The evaluation trajectory: 148 of 260 context latents, 48 of 64 calls; five graphs, sparse ones from 8 latents on."""
    pipe, given = make(16)
    fast = compiled(pipe, preset="all")
    keeps_to_the_authors_schedule(fast, lambda: rollout(fast, given))


def test_with_guidance_there_are_two_calls_a_step_and_one_output_to_hold(make_reduced):
    pipe, given = make_reduced(3, rows=2)
    pipe.guidance_scale = 3.0
    want, calls = rollout(pipe, given), []
    fast = compiled(pipe, preset="exact")
    assert relative(rollout(fast, given), want) <= 1e-5 and graphs() == 3
    fast.detach()
    pipe.transformer.register_forward_pre_hook(lambda model, args, kwargs: calls.append(kwargs["timestep"][0].item())
                                               if kwargs.get("ar_vision_inference") else None, with_kwargs=True)
    rollout(compiled(pipe, preset="cache", cache__gate="always", lowering="eager"), given)
    assert len(calls) == 3 * 2 * 2 + 2 * 2


def test_the_last_chunks_keys_and_values_are_gone_when_the_next_context_is_encoded(make_reduced, monkeypatch):
    pipe, given = make_reduced(4)
    made, seen = [], []
    run = reduced.Transformer.forward_vision

    def forward_vision(self, *args, **kwargs):
        if kwargs.get("cache_vision"):
            seen.append(sum(r() is not None for r in made))
        out = run(self, *args, **kwargs)
        made.extend(weakref.ref(e[k]) for e in (out if kwargs.get("cache_vision") else ()) for k in ("k_vision", "v_vision"))
        return out

    monkeypatch.setattr(reduced.Transformer, "forward_vision", forward_vision)
    rollout(pipe, given)
    assert seen == [0, 4, 4], "upstream holds on to them"
    made.clear(), seen.clear()
    with torch.compiler.set_stance("force_eager"):
        rollout(compiled(pipe, preset="exact"), given)
    assert seen == [0, 0, 0] and len(made) == 12


def test_context_is_told_apart_by_its_time(make_reduced, monkeypatch):
    pipe, given = make_reduced(2)
    times = []
    run = reduced.Transformer.forward_vision
    monkeypatch.setattr(reduced.Transformer, "forward_vision", lambda self, *a, **k: times.append(k["timestep"][0].item()) or run(self, *a, **k))
    with torch.compiler.set_stance("force_eager"):
        rollout(compiled(pipe, preset="exact"), given)
    steps = given["timesteps"].tolist()
    assert times == [*steps, ENCODING_TIME, *steps]


def test_the_scheduler_is_not_asked_where_it_is(make_reduced, monkeypatch):
    """It would compare times on the device and wait for the answer."""
    pipe, given = make_reduced(2)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: pytest.fail("the scheduler looked up a time"))
    with torch.compiler.set_stance("force_eager"):
        rollout(compiled(pipe, preset="exact", context__enabled=True), given)


def test_what_cannot_be_right_is_refused_with_what_to_do(make_reduced, monkeypatch):
    @contextlib.contextmanager
    def refused(match, chunks=2):
        pipe, given = make_reduced(chunks)
        before = dict(vars(pipe))
        with pytest.raises(ConfigError, match=match):
            yield pipe
            rollout(li_compile.compile(pipe, li_compile.Config.from_options(OPTIONS)), given)
        vars(pipe).update({k: v for k, v in before.items()})

    with refused("compiled already; call detach") as pipe:
        li_compile.compile(pipe, li_compile.Config.from_options(OPTIONS))
    with refused("OptimizedModule, not upstream's.*take off what was put around it") as pipe:
        pipe.transformer = torch.compile(pipe.transformer)
    with refused("no action parameters.*action_ckpt") as pipe:
        del pipe.transformer.action_in
    with refused("projections of all blocks are zero.*action_ckpt") as pipe:
        for block in pipe.transformer.double_blocks:
            block.camera_out.weight.zero_()
    with refused("no weights.*meta device") as pipe:
        pipe.transformer.to("meta")
    with refused(r"another version.*_ar_rollout_inner takes \(latents, other\).*revision") as pipe:
        pipe._ar_rollout_inner = lambda latents, other: latents
    with refused("another version.*nothing, it is missing") as pipe:
        monkeypatch.setattr(type(pipe), "_ar_rollout_inner", None)
    monkeypatch.undo()
    with refused("no select_aligned_memory_frames") as pipe:
        monkeypatch.delattr(sys.modules[type(pipe).__module__], "select_aligned_memory_frames")
    for flag, match in (("enable_torch_compile", "leave it off"), ("enable_sageattn", "cannot be read; leave it off")):
        with refused(match):
            state = types.SimpleNamespace(get_infer_state=lambda flag=flag: types.SimpleNamespace(**{flag: True}))
            monkeypatch.setitem(sys.modules, "hyvideo.commons.infer_state", state)
        monkeypatch.delitem(sys.modules, "hyvideo.commons.infer_state")
    with refused("sequence parallelism over 4 GPUs is not supported.*detach"):
        state = types.SimpleNamespace(get_parallel_state=lambda: types.SimpleNamespace(sp_enabled=True, sp=4))
        monkeypatch.setitem(sys.modules, "hyvideo.commons.parallel_states", state)


def test_the_bidirectional_mode_and_the_text_pass_run_as_they_are(make):
    pipe, given = make(2)
    model = compiled(pipe, preset="exact").rollout.compiled[0]
    extra = {k: v[:1] for k, v in given["extra_kwargs"].items()}
    text = dict(bi_inference=False, ar_txt_inference=True, timestep_txt=torch.zeros(1), text_states=given["prompt_embeds"], kv_cache=[],
                encoder_attention_mask=given["prompt_mask"], vision_states=given["vision_states"], extra_kwargs=extra, mask_type="i2v", cache_txt=True)
    got, want = model(**text), pipe.transformer(**text)
    assert all(torch.equal(a["k_txt"], b["k_txt"]) and a["k_vision"] is None for a, b in zip(got, want)) and graphs() == 0
    if isinstance(pipe, reduced.Pipeline):
        with pytest.raises(NotImplementedError, match="autoregressive"):
            model(bi_inference=True)

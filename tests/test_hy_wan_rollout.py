"""The rollout of HY-WorldPlay's Wan kind, on the reduced model in a pipeline of our own and, where its tree is at hand, on upstream's at
tiny size."""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref

import pytest
import test_hy_rollout
import torch
import upstream_wan as upstream
from models import worldplay_wan_rollout as reduced
from test_hy_rollout import graphs, keeps_to_the_authors_schedule, quick  # noqa: F401
from test_policy import left_right
from tracing import relative

from li_compile.errors import ConfigError
from li_compile.patterns.families.hy_wan_rollout import PIPELINE, SELECT

ENCODING_TIME, SIZE, TIMES = 14.0, reduced.CHUNK, [1000.0, 960.0, 888.9, 727.3]


@pytest.fixture(params=["reduced", pytest.param("upstream", marks=upstream.needs_upstream)])
def make(request, monkeypatch):
    """make(chunks) -> (pipeline, what its calls are given in a rollout that turns left and back)"""
    def make(chunks: int, **changes):
        poses = left_right()[:SIZE * chunks]
        if request.param == "reduced":
            common, each = reduced.inputs(poses)
            return reduced.pipeline(monkeypatch), (common | changes, each)
        common, each = reduced.inputs(poses, upstream.LATENT, upstream.WORDS)
        sizes = dict(height=16 * upstream.LATENT[1], width=16 * upstream.LATENT[2], num_frames=16 * chunks - 3, guidance_scale=1.0)
        return upstream.pipeline(monkeypatch, upstream.transformer()), (common | sizes | dict(output_type="latent") | changes, each)

    return make


@pytest.fixture
def make_reduced(monkeypatch):
    return lambda chunks=2, **changes: (reduced.pipeline(monkeypatch), (lambda c, e: (c | changes, e))(*reduced.inputs(left_right()[:SIZE * chunks])))


@pytest.fixture
def compiled():
    """compiled(pipe, **options); what was changed in the modules that tests share is changed back."""
    made = []
    yield lambda pipe, **options: made.append(test_hy_rollout.compiled(pipe, **options)) or made[-1]
    for fast in made:
        fast.detach()


def chunk(pipe, given, index):
    common, each = given
    pipe(**common, chunk_i=index, **{name: x[:, SIZE * index:SIZE * (index + 1)] for name, x in each.items()})


def rollout(pipe, given):
    """The latents of one rollout; upstream writes them where the noise was, and draws the points of its selection anew."""
    common, each = given
    common = common | {"latents": common["latents"].clone()}
    torch.manual_seed(0)
    for index in range(each["viewmats"].shape[1] // SIZE):
        chunk(pipe, (common, each), index)
    return pipe.ctx["latents"]


def called(monkeypatch, model):
    """The (time of the last latent, latents) of every call of this model that is made, also from compiled code that runs eagerly."""
    made, run = [], type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: made.append((round(k["timestep"][-1].item(), 1), k["hidden_states"].shape[2]))
                        or run(self, *a, **k))
    return made


def test_with_approximations_off_the_latents_are_upstreams(make, compiled):
    """Contexts of 4 to 16 latents, in a graph for the first chunk's steps, one for context encodings and one for steps."""
    pipe, given = make(6)
    kind, module = type(pipe), sys.modules[PIPELINE.rpartition(".")[0]]
    model, call, select = pipe.transformer, kind.__call__, getattr(module, SELECT)
    with torch.compiler.set_stance("force_eager"):
        want = rollout(pipe, given)
    fast = compiled(pipe, preset="exact")
    assert relative(rollout(fast, given), want) <= 1e-5 and graphs() == 3
    assert fast.report().counts()["functional_writes"] and not fast.report().counts().get("sparse_attention")
    stats = fast.rollout.session.stats()
    assert (stats["context_kept"], stats["calls"]) == (4 + 8 + 12 + 16 + 16, 24)
    assert fast.detach() is pipe and pipe.transformer is model and kind.__call__ is call and getattr(module, SELECT) is select
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(rollout(pipe, given), want)


def test_an_images_latent_stays_and_any_schedule_is_run(make, tmp_path, compiled):
    """With upstream's scheduler in place of the distilled model's four times, and a first latent that is given."""
    from PIL import Image

    path = tmp_path / "first.png"
    Image.new("RGB", (16 * 8, 16 * 6), (200, 30, 60)).save(path)
    pipe, given = make(3, few_step=False, num_inference_steps=6, image_path=str(path))
    with torch.compiler.set_stance("force_eager"):
        want = rollout(pipe, given)
        first = pipe.ctx["first_image_condition" if "first_image_condition" in pipe.ctx else "image"]
        assert torch.equal(want[:, :, :1], first) and not torch.equal(want[:, :, :1], given[0]["latents"][:, :, :1])
        fast = compiled(pipe, preset="exact")
        assert relative(rollout(fast, given), want) <= 1e-6
    assert fast.rollout.session.stats()["calls"] == 18


@upstream.needs_upstream
def test_in_half_precision_it_is_no_further_from_fp32_than_upstream(monkeypatch, compiled):
    common, each = reduced.inputs(left_right()[:8], upstream.LATENT, upstream.WORDS)
    common |= dict(height=16 * upstream.LATENT[1], width=16 * upstream.LATENT[2], num_frames=29, output_type="latent", guidance_scale=1.0)
    model, half = upstream.transformer(), upstream.transformer(torch.bfloat16)
    pipe = upstream.pipeline(monkeypatch, half)
    with torch.compiler.set_stance("force_eager"):
        want, theirs = rollout(upstream.pipeline(monkeypatch, model), (common, each)), rollout(pipe, (common, each))
    ours = rollout(compiled(pipe, preset="exact"), (common, each))
    assert graphs() == 3 and relative(ours, theirs) <= 2e-2 and relative(ours, want) <= 1.05 * relative(theirs, want)


def test_inductor_takes_graphs_of_any_context_length(monkeypatch, compiled):
    """One block, so that it is quick: a first chunk, an encoding and steps over 4 and over 8 latents."""
    pipe, given = reduced.pipeline(monkeypatch, depth=1), reduced.inputs(left_right()[:12])
    with torch.compiler.set_stance("force_eager"):
        want = rollout(pipe, given)
    assert relative(rollout(compiled(pipe, preset="exact", lowering="inductor"), given), want) <= 1e-5 and graphs() == 3


def test_the_authors_context_and_calls_through_the_pipelines_loop(make, compiled):
    """The evaluation trajectory: 148 of 216 context latents, 48 of 64 calls; five graphs, sparse ones from 8 latents on."""
    pipe, given = make(16)
    fast = compiled(pipe, preset="all")
    keeps_to_the_authors_schedule(fast, lambda: rollout(fast, given))


@pytest.mark.parametrize("preset, kept, calls", [("exact", 4 + 8 + 12 + 12 * 16, 64), ("context", 148, 64), ("cache", 4 + 8 + 12 + 12 * 16, 50)])
def test_each_part_by_itself(make_reduced, monkeypatch, preset, kept, calls, compiled):
    pipe, given = make_reduced(16)
    made = called(monkeypatch, pipe.transformer)
    with torch.compiler.set_stance("force_eager"):
        fast = compiled(pipe, preset=preset)
        rollout(fast, given)
    stats = fast.rollout.session.stats()
    assert (stats["context_kept"], stats["calls"]) == (kept, calls)
    encoded = [frames for time, frames in made if time == ENCODING_TIME]
    assert encoded == [c["context_kept"] for c in stats["per_chunk"][1:]] and len(made) - len(encoded) == calls


def test_context_is_told_apart_by_its_time(make_reduced, monkeypatch, compiled):
    pipe, given = make_reduced(2)
    made = called(monkeypatch, pipe.transformer)
    with torch.compiler.set_stance("force_eager"):
        rollout(compiled(pipe, preset="exact"), given)
    assert made == [*((t, 4) for t in TIMES), (ENCODING_TIME, 4), *((t, 4) for t in TIMES)]


def test_the_last_chunks_keys_and_values_are_gone_when_the_next_context_is_encoded(make_reduced, monkeypatch, compiled):
    pipe, given = make_reduced(4)
    made, seen, run = [], [], type(pipe.transformer).forward

    def forward(self, *args, **kwargs):
        if kwargs["is_cache"]:
            seen.append(sum(r() is not None for r in made))
        out = run(self, *args, **kwargs)
        made.extend(weakref.ref(x) for entry in (out if kwargs["is_cache"] else ()) for x in entry.values())
        return out

    monkeypatch.setattr(type(pipe.transformer), "forward", forward)
    with torch.compiler.set_stance("force_eager"):
        rollout(pipe, given)
        assert seen == [0, 4, 4], "upstream holds on to them"
        made.clear(), seen.clear()
        rollout(compiled(pipe, preset="exact"), given)
    assert seen == [0, 0, 0] and len(made) == 12


def test_a_chunk_without_context_is_run_as_a_first_one(make_reduced, monkeypatch, compiled):
    pipe, given = make_reduced(3)
    made = called(monkeypatch, pipe.transformer)
    with torch.compiler.set_stance("force_eager"):
        fast = compiled(pipe, preset="context", context__temporal_frames=0, context__anchor_frames=0, context__memory_frames=4, context__threshold=1.0)
        rollout(fast, given)
    assert [c["context_kept"] for c in fast.rollout.session.stats()["per_chunk"]] == [0, 0, 0] and made == 3 * [(t, 4) for t in TIMES]


def test_other_pipelines_of_the_class_run_as_they_are(make_reduced, compiled):
    """Two are compiled and one is not; what is theirs in common is put back when the last is detached, in whatever order."""
    first, given = make_reduced(5)
    second, plain = (type(first)(copy.deepcopy(first.transformer)) for _ in range(2))
    call = type(first).__call__
    with torch.compiler.set_stance("force_eager"):
        want = rollout(plain, given)
        pruned, exact = compiled(first, preset="context", context__memory_frames=8, context__temporal_frames=4), compiled(second, preset="exact")
        assert relative(rollout(exact, given), want) <= 1e-6 and torch.equal(rollout(plain, given), want)
        got = rollout(pruned, given)
        assert relative(got, want) > 1e-3 and torch.equal(rollout(first, given), got), "the pipeline itself, called"
        pruned.detach()
        assert torch.equal(rollout(first, given), want) and relative(rollout(exact, given), want) <= 1e-6
        exact.detach()
    assert type(first).__call__ is call


def test_its_transformer_called_by_itself_is_no_step_of_a_chunk(make_reduced, compiled):
    """Not outside of the pipeline's call, and not in a call of another pipeline."""
    def look(*_):
        seen.append(other.transformer(**call)[0])

    pipe, given = make_reduced(2)
    other, seen, call = type(pipe)(copy.deepcopy(pipe.transformer)), [], reduced.wan.call(4, 0)
    with torch.compiler.set_stance("force_eager"):
        want = pipe.transformer(**call)[0]
        fast, other = compiled(pipe, preset="exact"), compiled(other, preset="exact")
        look()
        rollout(fast, (given[0] | {"callback_on_step_end": look}, given[1]))
    assert len(seen) == 9 and all(relative(x, want) <= 1e-6 for x in seen)
    assert fast.rollout.session.stats()["calls"] == 8 and other.rollout.session.chunks == 0


def test_predictors_are_given_the_steps_times_and_the_chunks_actions(make_reduced, monkeypatch, compiled):
    pipe, given = make_reduced(3)
    monkeypatch.setattr(type(pipe.transformer), "forward", lambda self, hidden_states, timestep, kv_cache, is_cache, **_: kv_cache if is_cache else (
        0.1 * timestep[0] + torch.zeros_like(hidden_states),))
    with torch.compiler.set_stance("force_eager"):
        want = rollout(pipe, given)
        linear = compiled(pipe, preset="cache", cache__gate="always", cache__predictor="linear", cache__skip=(2,))
        assert relative(rollout(linear, given), want) <= 1e-6, "what is linear in time is predicted as it is"
        assert linear.rollout.session.stats()["calls"] == 9
        previous = compiled(linear.detach(), preset="cache", cache__gate="always", cache__predictor="previous")
        rollout(previous, given)
        assert previous.rollout.session.stats()["calls"] == 12, "other actions"
        rollout(previous, (given[0], given[1] | {"action": torch.zeros_like(given[1]["action"])}))
        assert previous.rollout.session.stats()["calls"] == 4 + 2 + 2


def test_the_transformer_is_moved_with_its_pipeline(make_reduced, compiled):
    pipe, _ = make_reduced()
    model = pipe.transformer
    fast = compiled(pipe, preset="exact")
    modules = [m for m in vars(pipe).values() if isinstance(m, torch.nn.Module)]  # how diffusers finds what it moves
    modules[0].to(torch.float64)
    assert model.dtype == fast.transformer.dtype == torch.float64 and fast.transformer.config is model.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        fast.transformer.no_such_thing


def test_what_goes_wrong_in_a_chunk_or_stops_it_leaves_nothing_to_reuse(make_reduced, compiled):
    def stop(pipe, i, t, _):
        pipe.interrupted = True

    def fail(*_):
        raise KeyError("the user's callback")

    pipe, given = make_reduced(3)
    with torch.compiler.set_stance("force_eager"):
        fast = compiled(pipe, preset="cache", cache__gate="always", cache__predictor="previous")
        chunk(fast, given, 0)
        chunk(fast, (given[0] | {"callback_on_step_end": stop}, given[1]), 1)
        assert fast.rollout.session.stats()["calls"] == 4, "of the chunk that was stopped nothing is recorded"
        chunk(fast, given, 2)
        assert fast.rollout.session.stats()["calls"] == 8, "computed in full, there is no chunk to go on from"
        chunk(fast, given, 0)
        with pytest.raises(KeyError):
            chunk(fast, (given[0] | {"callback_on_step_end": fail}, given[1]), 1)
        with pytest.raises(ConfigError, match="chunk_i is 1, and the last chunk did not finish.*chunk_i=0"):
            chunk(fast, given, 1)
        rollout(fast, given)
        assert fast.rollout.session.chunks == 3


def test_what_cannot_be_right_is_refused_with_what_to_do(make_reduced, monkeypatch, compiled):
    @contextlib.contextmanager
    def refused(match, **options):
        pipe, given = make_reduced(2)
        with pytest.raises(ConfigError, match=match), torch.compiler.set_stance("force_eager"):
            yield pipe, given
            rollout(compiled(pipe, preset="exact", **options), given)

    def call(self, prompt, viewmats, chunk_i=0):
        pass

    with refused("compiled already; call detach") as (pipe, _):
        compiled(pipe, preset="exact")
    with refused("OptimizedModule, not upstream's.*take off what was put around it") as (pipe, _):
        pipe.transformer = torch.compile(pipe.transformer)
    with refused("this is Wan 2.2, and WorldPlay's action checkpoint was not loaded.*add_discrete_action_parameters") as (pipe, _):
        del pipe.transformer.action
    with refused("projections of all blocks are zero.*load_state_dict") as (pipe, _):
        for block in pipe.transformer.blocks:
            block.camera_out.weight.zero_()
    with refused("no weights.*meta device") as (pipe, _):
        pipe.transformer.to("meta")
    with refused(r"another version.*its call takes \(self, prompt, viewmats, chunk_i\).*revision da2d0c2") as (pipe, _):
        monkeypatch.setattr(type(pipe), "__call__", call)
    with refused(f"no {SELECT}: this is not upstream's tree") as (pipe, _):
        monkeypatch.delattr(sys.modules[PIPELINE.rpartition(".")[0]], SELECT)
    for option in ("stream", "offload"):
        with refused("decodes each chunk before the next.*Leave them off", **{option: True}):
            pass
    with refused("sequence parallelism over 4 GPUs is not supported.*detach") as (pipe, _):
        pipe.parallel_run = True
        monkeypatch.setattr(sys.modules[PIPELINE.rpartition(".")[0]], "get_sp_world_size", lambda: 4, raising=False)
    with refused("first_chunk_size is 1 and a chunk has 4 latents.*first_chunk_size=4") as (_, given):
        given[0]["first_chunk_size"] = 1
    with refused("chunk_i is 2, and chunk 1 comes next.*in order") as (pipe, given):
        fast = compiled(pipe, preset="exact")
        chunk(fast, given, 0)
        chunk(fast, given, 2)

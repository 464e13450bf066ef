"""A model that is called step by step from Python: its Session recognises the loop, and never hands on what is stale."""

from __future__ import annotations

import pytest
import torch
from samplers import Denoiser, euler, in_two_threads, shifted, unipc
from test_policy import forward_back
from torch import nn
from tracing import relative

from li_compile import Config, Session
from li_compile.errors import LightInteractionError

LEVELS = shifted(4)
OPTIONS = {"preset": "cache", "lowering": "eager", "strict": True, "cache.gate": "always", "cache.guard": None}


class Counted:
    """A compiled model; how often it was really computed."""

    def __init__(self, model=None, **options):
        self.model, self.calls = model or Denoiser(), 0
        self.options = OPTIONS | {k.replace("__", "."): v for k, v in options.items()}

        def backend(module, inputs):
            from li_compile.backend import light_interaction
            from li_compile.dispatch import Variant

            run = light_interaction(module, inputs, options=self.options)
            forward = run.compiled[Variant(None, False)].run

            def counted(*args):
                self.calls += 1
                return forward(*args)

            object.__setattr__(run.compiled[Variant(None, False)], "run", counted)
            return run

        self.compiled = torch.compile(self.model, backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, *args):
        with torch.no_grad():
            return self.compiled(*args)

    def session(self) -> Session:
        session = Session(Config.from_options(self.options))
        session.extend(forward_back())
        return session


@pytest.fixture
def chunk():
    """chunk(call, ...): one chunk of a sampler that runs in Python, on inputs of its own."""
    def make(call, seed=0, levels=LEVELS, skip=(), sampler=euler, condition=None):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 4, generator=generator)
        condition = torch.randn(3, 1, generator=generator) if condition is None else condition

        def velocity(x, sigma, condition):
            return call(x, torch.full_like(condition, sigma), condition)

        with torch.no_grad():
            return sampler(velocity, levels, skip=skip)(x, condition)

    return make


@pytest.mark.parametrize("sampler", [euler, unipc])
@pytest.mark.parametrize("levels", [shifted(3, most=0.9998), shifted(4, most=0.9998), shifted(8, most=0.9998)], ids=["3", "4", "8"])
def test_the_first_chunk_is_learned_from_and_the_others_are_reused(chunk, sampler, levels):
    model, steps = Counted(), len(levels) - 1
    with model.session() as session:
        for i in range(4):
            with session.chunk(4 * i) as plan:
                got = chunk(model, seed=i, levels=levels, sampler=sampler)
            want = chunk(model.model, seed=i, levels=levels, sampler=sampler, skip=range(1, steps - 1) if i else ())
            assert relative(got, want) <= 1e-6
            assert not plan.indices or len(plan.indices) == 4 * i
    assert model.calls == steps + 3 * 2
    stats = session.stats()
    assert (stats["calls"], stats["calls_possible"], stats["reused_chunks"]) == (steps + 3 * 2, 4 * steps, 3)
    assert "the loop is not known yet" in stats["per_chunk"][0]["reason"]


def test_the_cameras_decide(chunk):
    """gate 'views': reuse from the chunk on at which the plan has it."""
    model = Counted(cache__gate="views")
    reuse = []
    with model.session() as session:
        for i in range(16):
            with session.chunk(4 * i) as plan:
                chunk(model, seed=i)
            reuse.append(plan.reuse)
    stats = session.stats()
    assert [c["reuse"] for c in stats["per_chunk"]] == reuse and 4 < sum(reuse) < 16
    assert model.calls == stats["calls"] == sum(2 if r else 4 for r in reuse)


@pytest.mark.parametrize("guidance", ["sequential", "batched"])
def test_guidance_keeps_one_output_a_branch(chunk, guidance):
    model = Counted()
    empty, text = torch.zeros(3, 1), torch.randn(3, 1)

    def velocity(call):
        def guided(x, time, condition):
            plain, given = call(x, time, empty), call(x, time, condition)
            return plain + 3 * (given - plain)

        def together(x, time, condition):
            both = call(torch.cat([x, x]), torch.cat([time, time]), torch.cat([empty, condition]))
            plain, given = both.chunk(2)
            return plain + 3 * (given - plain)

        return guided if guidance == "sequential" else together

    with model.session() as session:
        for i in range(3):
            with session.chunk(4 * i):
                got = chunk(velocity(model), seed=i, condition=text)
            want = chunk(velocity(model.model), seed=i, condition=text, skip=(1, 2) if i else ())
            assert relative(got, want) <= 1e-6
    assert model.calls == (4 + 2 + 2) * (2 if guidance == "sequential" else 1)
    assert session.stats()["calls"] == 4 + 2 + 2


@pytest.mark.parametrize(("predictor", "skip", "calls"), [("linear", (2,), 3), ("previous", (1, 2), 2)])
def test_predictors(chunk, predictor, skip, calls):
    model = Counted(cache__predictor=predictor, cache__skip=skip)
    condition, seen = torch.randn(3, 1), {}

    def by_hand(i):
        outputs = {}

        def call(x, time, condition):
            k = len(outputs)
            sigma = LEVELS[k]
            if i and k in skip:
                if predictor == "linear":
                    v = outputs[1] + (outputs[1] - outputs[0]) * (sigma - LEVELS[1]) / (LEVELS[1] - LEVELS[0])
                else:
                    v = outputs[0] + seen[k] - seen[0]
            else:
                v = model.model(x, time, condition)
            outputs[k] = v
            return v

        out = chunk(call, seed=i, condition=condition)
        if not i:
            seen.update(outputs)
        return out

    with model.session() as session:
        for i in range(3):
            with session.chunk(4 * i):
                got = chunk(model, seed=i, condition=condition)
            assert relative(got, by_hand(i)) <= 1e-5
    assert model.calls == 4 + 2 * calls


# What may not be reused.


def test_a_step_outside_of_a_chunk_is_computed(chunk):
    model = Counted()
    with model.session() as session:
        for _ in range(3):
            assert torch.equal(chunk(model), chunk(model.model))
    assert model.calls == 12 and session.stats()["chunks"] == 0


def test_a_schedule_that_changes_is_computed_and_learned_anew(chunk):
    model = Counted()
    with model.session() as session:
        for i, levels in enumerate([LEVELS, LEVELS, shifted(5), shifted(5), shifted(4, shift=3.0), shifted(4, shift=3.0)]):
            with session.chunk(4 * i):
                got = chunk(model, seed=i, levels=levels)
            reused = i % 2 == 1
            want = chunk(model.model, seed=i, levels=levels, skip=range(1, len(levels) - 2) if reused else ())
            assert relative(got, want) <= 1e-6
    assert [c["calls"] for c in session.stats()["per_chunk"]] == [4, 2, 5, 2, 4, 2]
    assert "every step computed from step 1 on: another time than before" in session.stats()["per_chunk"][2]["reason"]


def test_a_shorter_schedule_is_an_error_unless_it_was_said(chunk):
    """Steps 0 and 1 of four look like the whole of two; that the second was the last is known when it is too late."""
    model, short = Counted(), [LEVELS[0], LEVELS[1], 0.0]
    session = model.session()
    with session.chunk(0):
        chunk(model)
    with pytest.raises(LightInteractionError, match="ended after 2 calls of a model that made 4 steps.*steps="):
        with session.chunk(4):
            chunk(model, levels=short)
    with session.chunk(4):  # nothing is known any more
        assert torch.equal(chunk(model), chunk(model.model))
    with session.chunk(8, steps=2):
        assert torch.equal(chunk(model, levels=short), chunk(model.model, levels=short))
    assert "2 steps, 4 before" in session.stats()["per_chunk"][-1]["reason"]


def test_guidance_that_changes_its_scale_or_goes(chunk):
    """The scale is applied outside of the model; guidance itself makes two calls of one."""
    model, empty = Counted(), torch.zeros(3, 1)

    def guided(scale):
        return lambda call: lambda x, t, c: (p := call(x, t, empty)) + scale * (call(x, t, c) - p)

    plain = lambda call: lambda x, t, c: call(x, t, c)
    with model.session() as session:
        condition = torch.randn(3, 1)
        for i, way in enumerate([guided(3.0), guided(5.0), plain, plain, guided(3.0), guided(3.0)]):
            with session.chunk(4 * i):
                got = chunk(way(model), seed=i, condition=condition)
            want = chunk(way(model.model), seed=i, condition=condition, skip=(1, 2) if i % 2 else ())
            assert relative(got, want) <= 1e-6
    assert [c["calls"] for c in session.stats()["per_chunk"]] == [4, 2, 4, 2, 4, 2]


@pytest.mark.parametrize("spoil", ["in place", "another tensor"])
def test_a_condition_that_changes_inside_a_chunk(chunk, spoil):
    condition, wide = torch.randn(3, 1), [torch.randn(3, 1 << 14)]  # too large to be compared by value

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Denoiser()

        def forward(self, x, time, wide):
            return self.inner(x, time, wide.mean(1, keepdim=True))

    model = Counted(Wide())

    def run(call, change):
        count = [0]

        def velocity(x, time, condition):
            count[0] += 1
            if change and count[0] == 3:
                if spoil == "in place":
                    wide[0].mul_(2.0)
                else:
                    wide[0] = wide[0] * 2.0
            return call(x, time, wide[0])

        return chunk(velocity, condition=condition)

    session = model.session()
    for i in range(2):
        with session.chunk(4 * i):
            run(model, False)
    before = wide[0].clone()
    with session.chunk(8):
        got = run(model, True)
    after, wide[0] = wide[0], before
    assert session.stats()["per_chunk"][-1]["calls"] is None and "an input changed within the chunk" in \
        session.stats()["per_chunk"][-1]["reason"]
    calls = model.calls
    with session.chunk(12):
        wide[0] = after
        assert torch.equal(run(model, False), run(model.model, False))
    assert model.calls == calls + 4 and got.isfinite().all()


def test_an_exception_inside_a_chunk_leaves_nothing(chunk):
    model, session = Counted(cache__predictor="previous"), None
    session = model.session()
    condition = torch.randn(3, 1)
    with session.chunk(0):
        chunk(model, condition=condition)
    with pytest.raises(RuntimeError, match="boom"), session.chunk(4):
        model(torch.randn(3, 4), torch.full((3, 1), LEVELS[0]), condition)
        raise RuntimeError("boom")
    assert session.stats()["chunks"] == 1 and Session.current() is None
    calls = model.calls
    with session.chunk(4):
        assert torch.equal(chunk(model, condition=condition), chunk(model.model, condition=condition))
    assert model.calls == calls + 4


def test_a_rollout_that_stops_inside_a_chunk(chunk):
    """The user closes the window after step 1 and starts a new video."""
    model = Counted()
    session = model.session()
    for i in range(2):
        with session.chunk(4 * i):
            chunk(model, seed=i)

    def rollout():
        with session.chunk(8):
            model(torch.randn(3, 4), torch.full((3, 1), LEVELS[0]), torch.zeros(3, 1))
            yield

    generator = rollout()
    next(generator)
    generator.close()  # GeneratorExit inside the chunk
    session.reset()
    session.extend(forward_back())
    with session.chunk(0):
        assert torch.equal(chunk(model, seed=9), chunk(model.model, seed=9))


def test_two_sessions_on_one_model(chunk):
    model = Counted()
    one, other = model.session(), model.session()
    for i in range(3):
        for session, seed in ((one, i), (other, 10 + i)):
            with session.chunk(4 * i):
                got = chunk(model, seed=seed)
            assert relative(got, chunk(model.model, seed=seed, skip=(1, 2) if i else ())) <= 1e-6
    assert model.calls == 2 * (4 + 2 + 2)


def test_sessions_in_threads(chunk):
    model = Counted()
    with torch.no_grad():
        chunk(model)  # compile in one place

    def rollout(base, meet):
        session = model.session()
        for i in range(4):
            meet()
            with session.chunk(4 * i):
                got = chunk(model, seed=base + i)
            assert relative(got, chunk(model.model, seed=base + i, skip=(1, 2) if i else ())) <= 1e-6

    in_two_threads(rollout)


def test_a_chunk_inside_a_chunk():
    session = Counted().session()
    with session.chunk(0), pytest.raises(LightInteractionError, match="a chunk of this session is open already"):
        with session.chunk(4):
            pass


def test_inference_tensors_cannot_be_trusted(chunk):
    """PyTorch does not count writes to them: what is too large to compare may have changed."""
    model = Counted(nn.ModuleDict({"inner": Denoiser()}))
    model.model.forward = lambda x, time, wide: model.model["inner"](x, time, wide.mean(1, keepdim=True))
    session = model.session()
    with torch.inference_mode():
        wide = torch.randn(3, 1 << 14)
        for i in range(2):
            with session.chunk(4 * i):
                chunk(lambda x, t, c: model(x, t, wide), condition=torch.zeros(3, 1))
    assert session.stats()["reused_chunks"] == 0 and model.calls == 8
    assert "made under torch.inference_mode" in session.stats()["per_chunk"][-1]["reason"]


# What is no sampling loop.


@pytest.mark.parametrize(("times", "reason"), [
    ([14.0, 1000.0, 900.0, 800.0], "no input tells a time that falls or rises"),  # an encoding, and then steps
    ([1.0, 1.0, 1.0, 1.0], "no input tells a time"),
])
def test_other_calls_are_computed(times, reason):
    model, condition = Counted(), torch.randn(3, 1)
    session = model.session()
    for i in range(2):
        with session.chunk(4 * i):
            for t in times:
                x = torch.randn(3, 4)
                assert torch.equal(model(x, torch.full((3, 1), t), condition), model.model(x, torch.full((3, 1), t), condition))
    assert model.calls == 8
    assert reason in session.stats()["per_chunk"][0]["reason"]


def test_a_model_with_two_outputs_says_so():
    model = Denoiser()
    compiled = torch.compile(lambda x, t, c: (model(x, t, c), x * 2), backend="light_interaction",
                             options={k: v for k, v in OPTIONS.items() if k != "strict"})
    session = Session(Config.from_options(OPTIONS))
    session.extend(forward_back())
    with torch.no_grad(), session.chunk(0):
        compiled(torch.randn(3, 4), torch.ones(3, 1), torch.ones(3, 1))
    (chunk,) = session.stats()["per_chunk"]
    assert chunk["calls"] is None and "it returns 2 values" in chunk["reason"] and "wrap the model" in chunk["reason"]


def test_the_guard_watches_steps_from_python(chunk):
    model = Counted(cache__guard=1e-6, cache__guard_chunks=1)
    with model.session() as session:
        for i in range(5):
            with session.chunk(4 * i):
                chunk(model, seed=i)
    per_chunk = session.stats()["per_chunk"]
    assert [c["calls"] for c in per_chunk] == [4, 2, 4, 4, 4]
    assert per_chunk[1]["drift"] > 1e-6 and "drifted by" in per_chunk[2]["reason"]

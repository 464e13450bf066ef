"""The steps of a chunk whose loop is known: what is computed, what stands in, what is recorded and what the next chunk gets."""

from __future__ import annotations

import pytest
import torch
from tracing import relative

from li_compile import Config, Session
from li_compile.policy import ChunkPlan
from li_compile.stepping import ChunkSteps

TIMES = (1000.0, 937.5, 833.3, 625.0)


class Owner:
    """Whose loop it is."""


@pytest.fixture
def rollout():
    """rollout(**options) -> chunk(outputs, reuse): runs one chunk of a session, gives what each step got and which were computed."""
    def make(**options):
        session, owner = Session(Config.from_options({"preset": "cache", "cache.guard": None} | {f"cache.{k}": v for k, v in options.items()})), Owner()

        def chunk(outputs, reuse=True, controls=()):
            computed, got = [], []
            plan = ChunkPlan((0, 1), reuse, 0.9, {}, "planned", 8)
            with ChunkSteps(session, owner, plan, TIMES, controls) as steps:
                for i in range(len(TIMES)):
                    got.append(steps.output(i, lambda: computed.append(i) or outputs[i]))
            return got, computed

        chunk.session, chunk.owner = session, owner
        return chunk

    return make


def draw(seed: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, generator=g).to(dtype) for _ in TIMES]


def test_held_outputs_stand_in_where_the_plan_says_so(rollout):
    chunk, v = rollout(), draw(0)
    got, computed = chunk(v, reuse=False)
    assert computed == [0, 1, 2, 3] and all(map(torch.equal, got, v))
    got, computed = chunk(v)
    assert computed == [0, 3] and all(map(torch.equal, got, [v[0], v[0], v[0], v[3]]))
    stats = chunk.session.stats()
    assert (stats["calls"], stats["calls_possible"], stats["reused_chunks"], stats["context_kept"]) == (6, 8, 1, 4)
    assert [c["reuse"] for c in stats["per_chunk"]] == [False, True]


def test_an_output_that_is_overwritten_later_is_held_as_it_was(rollout):
    chunk, memory = rollout(), torch.zeros(2, 3)

    def outputs(i):
        return memory.fill_(i + 1)

    got, _ = chunk(type("Graph", (), {"__getitem__": lambda self, i: outputs(i)})())
    assert torch.equal(got[1], torch.ones(2, 3)) and got[1].data_ptr() != memory.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_previous_predict_as_their_formulas_say(rollout, dtype):
    v, w = draw(0, dtype), draw(1, dtype)
    got, computed = rollout(predictor="linear", skip=(2,))(v)
    a, b, c = TIMES[:3]
    want = v[1].double() + (v[1] - v[0]).double() * (c - b) / (b - a)
    assert computed == [0, 1, 3] and relative(got[2].double(), want) <= (1e-6 if dtype == torch.float32 else 2e-2) and got[2].dtype == dtype
    chunk, action = rollout(predictor="previous"), [torch.tensor([1.0])]
    got, computed = chunk(v, controls=action)
    assert computed == [0, 1, 2, 3], "there is no earlier chunk to take changes from"
    got, computed = chunk(w, controls=action)
    assert computed == [0, 3]
    for i in (1, 2):
        assert relative(got[i].double(), w[0].double() + v[i].double() - v[0].double()) <= (1e-6 if dtype == torch.float32 else 2e-2)
    assert chunk(w, controls=[torch.tensor([2.0])])[1] == [0, 1, 2, 3], "another action"


def test_the_guard_computes_the_next_chunks_in_full(rollout):
    chunk, v = rollout(guard=0.2, guard_chunks=2), draw(0)
    assert [chunk(v)[1] for _ in range(4)] == [[0, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    stats = chunk.session.stats()
    want = (v[3] - v[0]).abs().sum() / v[3].abs().sum()
    assert stats["guarded_chunks"] == 3 and stats["per_chunk"][0]["drift"] == pytest.approx(want.item()) and want > 0.2
    calm = rollout(guard=0.2)
    assert [calm([v[0]] * 4)[1] for _ in range(3)] == [[0, 3]] * 3


def test_what_goes_wrong_inside_leaves_nothing_for_the_next_chunk(rollout):
    chunk, v = rollout(predictor="previous"), draw(0)
    chunk(v)
    with pytest.raises(IndexError):
        chunk(v[:3], reuse=False)
    assert chunk(v)[1] == [0, 1, 2, 3] and chunk.session.chunks == 2


def test_a_chunk_that_was_stopped_is_not_recorded_and_leaves_nothing(rollout):
    chunk, v = rollout(predictor="previous"), draw(0)
    chunk(v)
    with ChunkSteps(chunk.session, chunk.owner, ChunkPlan((0, 1), False, 0.0, {}, "planned", 8), TIMES) as steps:
        steps.output(0, lambda: v[0])
    assert chunk(v)[1] == [0, 1, 2, 3] and chunk.session.chunks == 2


def test_switched_off_or_ungated_every_step_is_computed(rollout):
    assert rollout(enabled=False, gate="always")(draw(0))[1] == [0, 1, 2, 3]
    assert rollout()(draw(0), reuse=False)[1] == [0, 1, 2, 3]
    assert rollout(gate="always")(draw(0), reuse=False)[1] == [0, 3]
    assert rollout(min_steps=5)(draw(0))[1] == [0, 1, 2, 3]

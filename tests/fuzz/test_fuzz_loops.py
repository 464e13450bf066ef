"""Sampling loops in random spellings are found and read, and what only resembles one is left alone with the right reason."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import strategies as st
from loop_lookalikes import LOOKALIKES
from loop_spellings import GUIDANCE, MODELS, SAMPLERS, TIMES, Loop
from quick import Quick, as_dynamo
from tracing import Traced, relative

from li_compile.patterns.loop_body import Body

TABLES = {"sampler": SAMPLERS, "model": MODELS, "time": TIMES, "guidance": GUIDANCE, "steps": range(2, 9), "shift": [1.0, 3.0, 5.0],
          "scale": [1.5, 3.0, 7.0]}
LOOPS = st.builds(Loop, **{name: st.sampled_from(list(table)) for name, table in TABLES.items()})
TWO_CALLS = ("two_calls", "two_calls_weighted", "given_first")


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def check(loop: Loop, front=Quick, numerics=False) -> str:
    """The loop is found with its steps, branches, updates and times; its model, made one region, computes the same."""
    fn, inputs = seeded(loop.build)
    traced = front(fn, *inputs)
    facts = traced.facts()
    found = facts.loop
    assert found is not None, [m.reason for m in facts.misses if m.pattern == "denoising loop"]
    assert (found.steps, found.branches) == (loop.steps, 2 if loop.guidance in TWO_CALLS else 1)
    assert found.updates.kind == loop.kind and len(found.updates.times) == loop.steps
    assert isinstance(found.body, Body) and found.body.calls == found.steps * found.branches
    if numerics:
        shared = traced.compile(preset="exact")
        with torch.no_grad():
            want, got = (seeded(lambda: torch.manual_seed(1) and f(*inputs)) for f in (fn, shared))
        assert relative(got, want) <= 1e-5 and shared.report.counts()["share_steps"] == found.body.calls
    return str(facts.module.graph)


def check_lookalike(loop: Loop, name: str, front=Quick) -> str:
    make, reason = LOOKALIKES[name]
    fn, inputs = seeded(lambda: make(loop))
    facts = front(fn, *inputs).facts()
    assert facts.loop is None, facts.loop.calls
    reasons = [m.reason for m in facts.misses if m.pattern == "denoising loop"]
    assert any(re.search(reason, r) for r in reasons), reasons
    return name + str(facts.module.graph)


def test_every_choice_alone():
    for name, table in TABLES.items():
        for choice in table:
            check(Loop(**{name: choice}), numerics=name in ("model", "guidance"))


def test_random_spellings_are_loops(fuzz):
    fuzz(150, check, loop=LOOPS)


def test_random_loops_compute_the_same_with_one_compiled_model(fuzz):
    fuzz(12, lambda loop: check(loop, numerics=True), loop=LOOPS)


def test_random_lookalikes_are_refused(fuzz):
    fuzz(160, check_lookalike, loop=LOOPS, name=st.sampled_from(list(LOOKALIKES)))


def test_a_shared_layer_whose_output_is_reshaped_is_no_loop():
    """What one call hands on is no time of the next."""
    check_lookalike(Loop(model="convolutions", steps=2), "a shared layer")


def test_a_long_recurrence_is_read_in_groups():
    """Six calls are also two groups of three, which fold as wholes."""
    check_lookalike(Loop(steps=6), "rnn over a sequence")


def test_the_quick_front_end_writes_what_dynamo_writes(fuzz):
    fuzz(8, lambda loop: check(loop, as_dynamo), loop=LOOPS)
    for name in list(LOOKALIKES)[::4]:
        check_lookalike(Loop(), name, Traced)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_every_lookalike_is_refused(name):
    check_lookalike(Loop(steps=3), name)

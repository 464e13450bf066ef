"""Attention in random spellings is read, and what only resembles it is left alone with the right reason."""

from __future__ import annotations

import pytest
import torch
from attention_lookalikes import LOOKALIKES
from attention_spellings import (ATTEND, CANONICAL, CAST, EMBED, JOIN, MOVE, NORM, PROJECT, ROPE, SCALE, UNSUPPORTED, WHERE, Attention, Spelling)
from hypothesis import strategies as st
from quick import Quick, as_dynamo
from tracing import Traced, relative

TABLES = {"embed": EMBED, "project": PROJECT, "norm": NORM, "rope": ROPE, "move": MOVE, "join": JOIN, "where": WHERE, "cast": CAST,
          "attend": ATTEND, "text": [True, False], "context": [True, False], "frames": [2, 4, 5], "batch": [1, 2]}
SPELLINGS = st.builds(Spelling, **{name: st.sampled_from(list(table)) for name, table in TABLES.items()})
ROUNDING = {"bfloat16": 3e-2, "half, keyword": 3e-3}


def seeded(spelling: Spelling, make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = make(spelling)
    return model.eval(), inputs


def plain(spelling: Spelling):
    return Attention(spelling), spelling.inputs()


def check(spelling: Spelling, front=Quick, numerics=False, make=plain) -> str:
    """The spelling is one site with its segments and scale and, canonical or with every block chosen, computes the same."""
    model, inputs = seeded(spelling, make)
    traced = front(model, *inputs)
    facts = traced.facts()
    assert len(facts.sites) == 1, [m.reason for m in facts.misses if m.pattern == "attention"]
    (site,) = facts.sites
    assert [(s.role, s.length) for s in site.segments] == spelling.segments
    assert site.kind == ("decode" if spelling.context else "prefill") and site.grid == (2, 3) and site.branches == 1
    assert (site.scale or SCALE) == pytest.approx(ATTEND[spelling.attend][1] or SCALE)
    if numerics:
        with torch.no_grad():
            want = model(*inputs)
        near = ROUNDING.get(spelling.cast, 1e-5)
        with torch.no_grad():
            assert relative(facts.module(*traced.arguments(*inputs))[0], want) <= near
        dense = traced.compile(preset="sparse", sparse__topk_ratio=1.0, sparse__prefill_ratio=1.0, sparse__min_context=1, sparse__skip_layers=0)
        assert relative(dense(*inputs), want) <= near and dense.report.counts()["sparse_attention"] == 1
    return str(traced.module.graph)


def check_lookalike(spelling: Spelling, name: str, front=Quick) -> str:
    make, reason = LOOKALIKES[name]
    facts = front(*(lambda model, inputs: (model, *inputs))(*seeded(spelling, make))).facts()
    assert not facts.sites and facts.context is None
    reasons = [m.reason for m in facts.misses if m.pattern == "attention"]
    assert any(reason in r for r in reasons), reasons
    return name + str(facts.module.graph)


def test_every_choice_alone():
    for name, table in TABLES.items():
        for choice in table:
            check(Spelling(**{name: choice}), numerics=name in ("attend", "where", "cast"))


def test_random_spellings_are_sites(fuzz):
    fuzz(240, check, spelling=SPELLINGS)


def test_random_spellings_compute_the_same_with_every_block_chosen(fuzz):
    fuzz(40, lambda spelling: check(spelling, numerics=True), spelling=SPELLINGS)


@pytest.mark.parametrize("name", LOOKALIKES)
def test_every_lookalike_is_refused(name):
    check_lookalike(Spelling(), name)


def test_random_lookalikes_are_refused(fuzz):
    fuzz(220, check_lookalike, spelling=SPELLINGS, name=st.sampled_from(list(LOOKALIKES)))


def test_the_quick_front_end_writes_what_dynamo_writes(fuzz):
    """And the matchers say the same of what Dynamo wrote."""
    fuzz(12, lambda spelling: check(spelling, as_dynamo), spelling=SPELLINGS)
    for name in list(LOOKALIKES)[::8]:
        check_lookalike(Spelling(), name, Traced)


@pytest.mark.parametrize("name", CANONICAL)
def test_spellings_that_are_put_into_canonical_form_are_sites(name):
    check(Spelling(), numerics=True, make=CANONICAL[name])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_spellings_that_are_not_supported_are_missed_with_a_reason(name):
    make, reason = UNSUPPORTED[name]
    facts = Quick(*(lambda model, inputs: (model, *inputs))(*seeded(Spelling(), make))).facts()
    reasons = [m.reason for m in facts.misses if m.pattern == "attention"]
    assert not facts.sites and any(reason in r for r in reasons), reasons

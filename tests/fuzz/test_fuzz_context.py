"""Context in random spellings of its four forms is found; inputs that only look like context or cameras are not."""

from __future__ import annotations

import pytest
import torch
from attention_spellings import CAST, FRAME, JOIN, MOVE, NORM, PROJECT, WHERE
from context_spellings import EMBEDS, FORMS, Context, Model, inputs
from hypothesis import strategies as st
from quick import Quick

# A reshape that leaves a size to be solved (-1) where another is dynamic is not supported: see docs/limits.md.
PROJECTS = [name for name in PROJECT if name not in ("timm", "selected")]
MOVES = [name for name in MOVE if name != "einops"]
TABLES = {"embed": EMBEDS, "project": PROJECTS, "norm": NORM, "move": MOVES, "join": JOIN, "cast": CAST, "frames": [5, 9, 12],
          "current": [3, 4], "text": [True, False]}
DRAWN = {name: st.sampled_from(list(table)) for name, table in TABLES.items()}
WHERE_OF = {"frames": list(WHERE), "cache": ["heads first", "tokens first", "flat channels"], "latents": ["heads first"], "slices": ["heads first"]}


def traced(context: Context, change=lambda given: given) -> Quick:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Quick(Model(context).eval(), *change(inputs(context)))


def check(context: Context) -> str:
    facts = traced(context).facts()
    found = facts.context
    assert found is not None, [m.reason for m in facts.misses]
    assert (found.form, found.frames, found.current, found.tokens) == (context.form, context.frames, context.current, FRAME)
    held = {"frames": ["l_1_", "l_2_"], "latents": ["l_1_"], "slices": ["l_1_", "l_2_"],
            "cache": ["l_3_", "l_4_"] if context.text else ["l_1_", "l_2_"]}[context.form]
    assert sorted(found.inputs) == held
    return str(facts.module.graph)


@pytest.mark.parametrize("form", FORMS)
def test_random_spellings_hold_context(fuzz, form):
    fuzz(40 if form == "slices" else 5, lambda where, **drawn: check(Context(form=form, where=where, **drawn)),
         where=st.sampled_from(WHERE_OF[form]), **DRAWN)


@pytest.mark.parametrize("camera", [(1, 4, 3, 4), (1, 4, 16), (1, 5, 4, 4)], ids=["3 x 4", "flat", "of another number of frames"])
def test_matrices_that_are_no_cameras(camera):
    """Relative positions, action matrices: of 16 numbers, but not [frames, 4, 4] of the current frames."""
    context, model = Context(), Model(Context())
    model.posed = lambda tokens, poses: tokens + model.pose(poses.flatten(2)[..., :1].expand(-1, -1, 16)).mean(1, keepdim=True)
    given = inputs(context)
    given[3] = torch.zeros(camera)
    facts = Quick(model, *given).facts()
    reasons = [m.reason for m in facts.misses if m.pattern == "context"]
    assert facts.context is None and any("camera poses" in r for r in reasons), reasons


def test_context_of_a_constant_length_is_left_alone(fuzz):
    def check(**drawn):
        context = Context(**drawn)
        facts = traced(context, lambda given: [x.clone() for x in given]).facts()
        reasons = [m.reason for m in facts.misses if m.pattern == "context"]
        assert facts.context is None and any("is a constant of this graph" in r for r in reasons), reasons
        return str(facts.module.graph)

    fuzz(30, check, where=st.sampled_from(list(WHERE)), **DRAWN)


def test_text_and_image_tokens_without_a_cache(fuzz):
    """A text-to-video model concatenates text and video; nothing of it is context."""
    def check(**drawn):
        context = Context(form="cache", **(drawn | {"text": True}))
        facts = traced(context, lambda given: given[:3]).facts()
        assert facts.context is None and [s.kind for s in facts.sites] == ["prefill"]
        assert any(m.pattern == "context" for m in facts.misses)
        return str(facts.module.graph)

    fuzz(60, check, where=st.sampled_from(list(WHERE)), **DRAWN)


def test_a_cache_that_is_written_twice_is_left_alone():
    class Twice(Model):
        def slices(self, x, key_cache, value_cache):
            key_cache[:, :FRAME] = 0
            return super().slices(x, key_cache, value_cache)

    context = Context(form="slices")
    facts = Quick(Twice(context).eval(), *inputs(context)).facts()
    assert facts.context is None and any(m.pattern == "context" for m in facts.misses)

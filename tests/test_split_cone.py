"""Concatenation last: what is done to joined keys token by token is done to each segment, exactly, and only where that is right."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from context_models import Remembering, mark, remembering_inputs
from test_patterns_attention import FRAME, HEAD_DIM, HEADS, Block, block_inputs
from tracing import Traced, relative

from li_compile.passes.normalize import normalize
from li_compile.passes.propagate import propagate, tidy
from li_compile.passes.split_cone import split_cone
from li_compile.patterns import CONTEXT, CURRENT
from li_compile.patterns._compat import fake_mode_of
from li_compile.patterns.graph import SDPA, calls, cat_operands


def rewritten(module, inputs, traced=None):
    """(record, rewritten graph, result before, result after); the pass must find nothing when it is run again."""
    traced = traced or Traced(module, *inputs)
    graph = copy.deepcopy(traced.module)
    normalize(graph)
    record = split_cone(graph)
    tidy(graph)
    propagate(graph, traced.fakes, fake_mode_of(traced.fakes))
    assert split_cone(copy.deepcopy(graph)).count == 0
    with torch.no_grad():
        return record, graph, traced(*inputs), graph(*traced.arguments(*inputs))[0]


def turned(x, cos, sin):
    """Rotary embedding of [B, H, L, D] by tables [L, D / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def complex_turned(x, cos, sin):
    turn = torch.complex(cos, sin)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def tables(length: int):
    angles = torch.arange(length)[:, None] * 0.1 ** torch.arange(HEAD_DIM // 2)
    return angles.cos(), angles.sin()


CONES = {
    "layout": lambda k: k,
    "halves": lambda k: turned(k, *tables(k.shape[2])),
    "complex": lambda k: complex_turned(k, *tables(k.shape[2])),
    "every other": lambda k: torch.stack([k[..., ::2] * 2, k[..., 1::2] * 0.5], -1).flatten(-2),
    "a table of one row": lambda k: k * torch.linspace(1, 2, HEAD_DIM),
    "casts": lambda k: (k.double() * tables(k.shape[2])[0].double().repeat(1, 2)).float(),
}


class Joined(Block):
    """Context and current joined in [B, L, H, D], then ``cone`` on the keys; the values only change their layout."""

    def __init__(self, cone):
        super().__init__()
        self.cone = cone

    def forward(self, x, _, __, context_k, context_v):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (HEADS, -1)).chunk(3, -1)
        k, v = (torch.cat([c.transpose(1, 2), n], 1).transpose(1, 2) for c, n in ((context_k, k), (context_v, v)))
        return F.scaled_dot_product_attention(q.transpose(1, 2), self.cone(k), v)


@pytest.mark.parametrize("name", CONES)
@pytest.mark.parametrize("moving", [False, True], ids=["constant", "dynamic"])
def test_segments_are_told_apart(name, moving):
    module, inputs = Joined(CONES[name]), block_inputs()
    if moving:
        for tensor in inputs[3:]:
            torch._dynamo.mark_dynamic(tensor, 2)
    traced = Traced(module, *inputs)
    record, graph, want, got = rewritten(module, inputs, traced)
    assert record.count == 1 and relative(got, want) <= 1e-6
    (node,) = [n for n in graph.graph.nodes if calls(n, SDPA)]
    for operand in node.args[1:3]:
        parts, dim = cat_operands(operand)
        assert dim == 2 and len(parts) == 2
    (site,) = traced.facts().sites
    assert [s.role for s in site.segments] == [CONTEXT, CURRENT] and site.kind == "decode"


def test_what_mixes_tokens_is_left_alone():
    for cone in (lambda k: k.cumsum(2), lambda k: k.flip(2), lambda k: k.softmax(2), lambda k: F.layer_norm(k, k.shape[2:])):
        record, _, want, got = rewritten(Joined(cone), block_inputs())
        assert record.count == 0 and relative(got, want) <= 1e-6


def test_one_row_made_of_all_tokens_is_added_to_each_segment():
    record, _, want, got = rewritten(Joined(lambda k: k + k.mean(2, keepdim=True)), block_inputs())
    assert record.count == 1 and relative(got, want) <= 1e-6


def test_a_write_between_is_not_crossed():
    class Written(Joined):
        def forward(self, x, a, b, context_k, context_v):
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).unflatten(-1, (HEADS, -1)).chunk(3, -1)
            past = context_k.transpose(1, 2).clone()
            k, v = torch.cat([past, k], 1), torch.cat([context_v.transpose(1, 2), v], 1)
            past[:, :FRAME] = 0.0
            return F.scaled_dot_product_attention(q.transpose(1, 2), turned(k.transpose(1, 2), *tables(k.shape[1])), v.transpose(1, 2)), past

    record, _, want, got = rewritten(Written(None), block_inputs())
    assert record.count == 0 and relative(got, want) <= 1e-6


def test_memory_that_was_taken_apart_for_rope_is_no_context_of_its_own():
    """Matrix-Game-3.0: the segments are slices of one projection; its attention is read as it was."""
    inputs = mark(remembering_inputs(8))
    record, _, want, got = rewritten(Remembering().eval(), inputs)
    assert record.count == 0 and relative(got, want) <= 1e-6

"""The operators written out in ATen against the operators themselves."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import li_compile.kernels  # noqa: F401  (registers the operators)
from li_compile.kernels import native
from li_compile.kernels.layout import tile_order
from li_compile.kernels.plan import make_plan

HEIGHT, WIDTH, BATCH, HEADS, DIM, TILE, SIZE = 4, 6, 2, 2, 16, [4, 2, 2], 16


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def problem(frames, context, text):
    """(q, k, v, roles) of so many current and context frames and text tokens; 0: none."""
    random = torch.Generator().manual_seed(frames + context + text)
    draw = lambda length: torch.randn(BATCH, HEADS, length, DIM, generator=random)
    parts = [(n, role) for n, role in ((text, 0), (context * HEIGHT * WIDTH, 1), (frames * HEIGHT * WIDTH, 2)) if n]
    return draw(frames * HEIGHT * WIDTH), [draw(n) for n, _ in parts], [draw(n) for n, _ in parts], [role for _, role in parts]


def settings(topk, prefill, sub_blocks, heads=()):
    return HEIGHT, WIDTH, TILE, SIZE, topk, prefill, sub_blocks, DIM**-0.5, False, list(heads)


CASES = {  # frames, context, text, (topk, prefill, sub_blocks, head_ratios), protected frames
    "decode": (4, 12, 10, (0.3, 0.3, 1)),
    "decode, parts of blocks": (4, 12, 10, (0.3, 0.3, 4)),
    "decode, partial blocks, no text": (3, 5, 0, (0.3, 0.3, 2)),
    "decode, a budget a head": (4, 12, 7, (0.3, 0.3, 4, (0.2, 0.5))),
    "prefill": (12, 0, 9, (0.3, 0.4, 4)),
    "prefill, no text, partial blocks": (5, 0, 0, (0.3, 0.6, 2)),
    "prefill, new frames protected": (12, 0, 9, (0.3, 0.4, 4), 4),
    "prefill, new frames protected in blocks of both": (7, 0, 0, (0.5, 0.0, 2, (0.3, 0.7)), 2),
    "nothing of the history": (4, 12, 10, (0.0, 0.0, 1)),
    "dense": (4, 12, 10, (1.0, 1.0, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_sparse_attention(case):
    *sizes, ratios = CASES[case][:4]
    q, k, v, roles = problem(*sizes)
    given, more = (q, k, v, roles, *settings(*ratios)), {"protected": sum(CASES[case][4:])}
    want = torch.ops.li.sparse_attention(*given, **more)
    got = native.sparse_attention(*given, **more)
    assert relative(got, want) <= 1e-6 and got.stride() == want.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_in_half_precision_once_decomposed(case, dtype):
    """As the exporters hand it on: constants are tensors then, of the scores' dtype, which a GPU refuses to fill with a larger number."""
    *sizes, ratios = CASES[case][:4]
    q, k, v, roles = problem(*sizes)
    more = {"protected": sum(CASES[case][4:])}
    run = lambda q, k, v: native.sparse_attention(q, k, v, roles, *settings(*ratios), **more)
    half = q.to(dtype), [x.to(dtype) for x in k], [x.to(dtype) for x in v]
    run(*half)  # makes the tables that tracing could not
    decomposed = make_fx(run, decomposition_table=torch.export.default_decompositions())(*half)
    constants = [torch.scalar_tensor(*n.args, dtype=n.kwargs["dtype"]) for n in decomposed.graph.nodes if n.target is torch.ops.aten.scalar_tensor.default]
    assert all(c.isfinite() for c in constants) and (constants or "partial" not in case)
    want = run(half[0].float(), *([x.float() for x in xs] for xs in half[1:]))
    assert relative(decomposed(*half).float(), want) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("case", [c for c in CASES if "prefill" not in c])
def test_packed_context_and_decode(case):
    *sizes, ratios = CASES[case]
    q, k, v, roles = problem(*sizes)
    height, width, tile, size, topk, _, *rest = settings(*ratios)
    given = (k[:-1], v[:-1], roles[:-1], height, width, tile, size, rest[0])
    packed = torch.ops.li.pack_context(*given)
    for mine, theirs in zip(native.pack_context(*given), packed):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.allclose(mine, theirs, atol=1e-6)
    given = (q, k[-1], v[-1], *packed, [x.shape[2] for x in k[:-1]], roles[:-1], height, width, tile, size, topk, *rest)
    assert relative(native.sparse_decode(*given), torch.ops.li.sparse_decode(*given)) <= 1e-6


def test_what_is_not_kept_is_not_read():
    """One history block is what all queries look for; the values of all others are NaN."""
    q, k, v, roles = problem(4, 12, 10)
    wanted = tile_order(12, HEIGHT, WIDTH, tuple(TILE))[3 * SIZE : 4 * SIZE]
    q, k[1], v[1] = torch.ones_like(q), -torch.ones_like(k[1]), torch.full_like(v[1], torch.nan)
    k[1][:, :, wanted], v[1][:, :, wanted] = 1.0, torch.randn(BATCH, HEADS, SIZE, DIM)
    given = settings(1 / 18, 1.0, 2)
    got = native.sparse_attention(q, k, v, roles, *given)
    assert not got.isnan().any() and relative(got, torch.ops.li.sparse_attention(q, k, v, roles, *given)) <= 1e-6
    assert native.sparse_attention(q, k, v, roles, *settings(2 / 18, 1.0, 2)).isnan().any()


def test_frames_by_lists():
    q, k, v, roles = problem(2, 6, 5)
    given = (q, k, v, roles, torch.tensor([0, 3, 5]), HEIGHT * WIDTH, 8, DIM**-0.5)
    assert relative(native.frame_attention(*given), torch.ops.li.frame_attention(*given)) <= 1e-6


def test_query_blocks_that_choose_together():
    """Gathers a fraction, and is exact where all blocks of a group want the same, as where all are kept."""
    q, k, v, roles = problem(4, 12, 10)
    plan = make_plan([x.shape[2] for x in k], roles, HEIGHT, WIDTH, tuple(TILE), SIZE, 0.3, 0.3)
    assert native.gathered_share(plan, 3) == native.gathered_share(plan) / 3 and plan.current_blocks % 3 == 0
    want = torch.ops.li.sparse_attention(q, k, v, roles, *settings(0.3, 0.3, 1))
    shared = native.sparse_attention(q, k, v, roles, *settings(0.3, 0.3, 1), share=3)
    dense = torch.ops.li.sparse_attention(q, k, v, roles, *settings(1.0, 1.0, 1))
    assert 1e-6 < relative(shared, want) and relative(shared, dense) < 1.5 * relative(want, dense)
    alike = q[:, :, :1].expand_as(q).contiguous()
    assert relative(native.sparse_attention(alike, k, v, roles, *settings(0.3, 0.3, 1), share=3),
                    torch.ops.li.sparse_attention(alike, k, v, roles, *settings(0.3, 0.3, 1))) <= 1e-6


def test_no_size_depends_on_data():
    q, k, v, roles = problem(12, 0, 9)
    graph = make_fx(lambda q, k0, k1, v0, v1: native.sparse_attention(q, [k0, k1], [v0, v1], roles, *settings(0.3, 0.4, 4)),
                    tracing_mode="real")(q, *k, *v)
    names = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    assert "aten.topk.default" in names and "aten.gather.default" in names and not [n for n in names if any(w in n for w in ("nonzero", "_local_scalar", "li."))]


@pytest.mark.parametrize(("name", "arguments", "says"), [
    ("li::sparse_attention", {"summary": True}, "sparse.summary"), ("li::sparse_decode", {"q_camera": 1}, r"encodes its operands itself \(q_camera\)"),
    ("li::choose_blocks", {}, "it is not one of"), ("li::sparse_attention", {}, None),
])
def test_what_cannot_be_written_out(name, arguments, says):
    import re

    why = native.why_not_native(name, arguments)
    assert why is None if says is None else re.search(says, why)

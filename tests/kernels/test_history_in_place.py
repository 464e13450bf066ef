"""History that keeps its tile order from the call that makes it to the calls that read it: one contract for all providers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_pack import BOUND, DTYPES, MARKS, encoded, table

from li_compile.kernels import Encoding, density, in_raster_order, in_tile_order, sparse_attention, sparse_prefill, use_provider
from li_compile.kernels.layout import num_blocks, tile_order
from li_compile.kernels.pack import order_into
from li_compile.kernels.plan import CONTEXT, CURRENT, TEXT

H, W, TILE, BLOCK, SUB = 5, 7, [2, 4, 4], 64, 4  # tiles that the grid cuts off, blocks that straddle them, partial last ones


@pytest.fixture(params=[pytest.param((key, dtype), id=f"{key}-{str(dtype)[6:]}", marks=MARKS.get(key, ()))
                        for key, dtypes in {**DTYPES, "cpu-cpu": (torch.float32,)}.items() for dtype in dtypes])  # fmt: skip
def case(request):
    key, dtype = request.param
    name, device = key.split("-")
    with use_provider(name):
        yield dtype, device


def tokens(case, length, batch=1, heads=2, dim=32):
    """As models have them, strided."""
    dtype, device = case
    return torch.randn(batch, length, heads, dim, device=device).to(dtype).transpose(1, 2)


def in_poison(x):
    """x in memory that goes on, with NaN behind each head's last row."""
    memory = torch.full((*x.shape[:2], x.shape[2] + BLOCK, x.shape[3]), float("nan"), dtype=x.dtype, device=x.device)
    memory[:, :, : x.shape[2]] = x
    return memory[:, :, : x.shape[2]]


def close(got, want, dtype):
    assert got.isfinite().all()
    assert (got.double() - want.double()).norm() / want.double().norm() <= 3 * BOUND[dtype]


def test_there_and_back(case):
    x = tokens(case, 3 * H * W)
    got = in_tile_order(x, H, W, TILE)
    assert torch.equal(got, x[:, :, tile_order(3, H, W, tuple(TILE), x.device)]) and got.is_contiguous() and not torch.equal(got, x)
    assert torch.equal(in_raster_order(got, H, W, TILE), x)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("parts", ["", "norm cos sin camera"])
@pytest.mark.parametrize("wanted", ["tokens", "means", "tokens means"])
def test_order_without_padding(case, wanted, parts, ordered):
    """What is written is what pack writes, as much of it as there is; what lies behind stays."""
    x = tokens(case, 3 * H * W)
    given = {name: value for name, value in table(x, 3).items() if name in parts.split()}
    order = tile_order(3, H, W, tuple(TILE), x.device) if ordered else None
    want = encoded(x, **given)
    want = want if order is None else want[:, :, order]
    memory = torch.full((*want.shape[:2], want.shape[2] + BLOCK, want.shape[3]), float("nan"), dtype=x.dtype, device=x.device)
    means = torch.empty(*want.shape[:2], num_blocks(x.shape[2], BLOCK) * SUB, x.shape[3], device=x.device,
                        dtype=torch.promote_types(x.dtype, torch.float32)) if "means" in wanted else None  # fmt: skip
    out = memory[:, :, : want.shape[2]] if "tokens" in wanted else None
    order_into(x, order, out, means, BLOCK, SUB, Encoding(**given))
    assert memory[:, :, want.shape[2] :].isnan().all()
    if out is not None:
        close(out, want, case[0])
    for i, mean in enumerate(means.unbind(2) if means is not None else ()):
        part = want[:, :, i * BLOCK // SUB : (i + 1) * BLOCK // SUB].to(x.dtype).double()
        torch.testing.assert_close(mean.double(), part.mean(2) if part.shape[2] else torch.zeros_like(mean).double(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("more", [{}, {"summary": True}, {"head_ratios": [0.1, 0.6]}], ids=str)
@pytest.mark.parametrize("roles", [[TEXT, CONTEXT, CURRENT], [CONTEXT, TEXT, CURRENT, TEXT], [CONTEXT, CURRENT]], ids=str)
def test_history_in_place_is_history_that_is_packed(case, roles, more):
    lengths = {TEXT: 21, CONTEXT: 8 * H * W, CURRENT: 4 * H * W}
    k, v = ([tokens(case, lengths[role]) for role in roles] for _ in "kv")
    q, at = tokens(case, lengths[CURRENT]), roles.index(CONTEXT)
    run = lambda k, v, **how: sparse_attention(q, k, v, roles, H, W, TILE, BLOCK, 0.3, 0.4, SUB, 0.25, **more, **how)
    want = run(k, v)
    k, v = ([in_poison(in_tile_order(s, H, W, TILE)) if i == at else s for i, s in enumerate(x)] for x in (k, v))
    close(run(k, v, in_place=True), want, case[0])
    wrong = run(k, v)  # packed a second time, blocks are of tokens from everywhere
    assert (wrong.double() - want.double()).norm() / want.double().norm() > 0.05


@pytest.mark.parametrize("ratio", [0.4, 1.0])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("roles", [[TEXT, CURRENT], [CURRENT]], ids=str)
def test_a_prefill_returns_its_keys_and_values_in_order(case, roles, raw, ratio):
    """raw: encodings are yet to be applied, so that there are two branches."""
    frames, lengths = 6, {TEXT: 21, CURRENT: 6 * H * W}
    given = table(tokens(case, frames * H * W), frames) if raw else {}
    batch = lambda role: 1 if raw and role == CURRENT else 2
    k, v = ([tokens(case, lengths[role], batch=batch(role)) for role in roles] for _ in "kv")
    q = tokens(case, lengths[CURRENT], batch=batch(CURRENT))
    if raw:
        camera = given.pop("camera")[:1]
        given = {"q_norm": given["norm"], "k_norm": given["norm"], "cos": given["cos"], "sin": given["sin"], "q_camera": camera, "kv_camera": camera}
    at = (roles, H, W, TILE, BLOCK)
    want = sparse_attention(q, k, v, *at, 0.9, ratio, SUB, 0.25, **given)
    out, keys, values = sparse_prefill(q, k, v, *at, ratio, SUB, 0.25, **given)
    assert torch.equal(out, want)
    key_given = {n: given[o] for n, o in (("norm", "k_norm"), ("cos", "cos"), ("sin", "sin"), ("camera", "kv_camera"))} if raw else {}
    for got, x, how in ((keys, k[-1], key_given), (values, v[-1], {"camera": given["kv_camera"]} if raw else {})):
        assert got.is_contiguous() and got.dtype == x.dtype
        close(got, encoded(x, **how)[:, :, tile_order(frames, H, W, tuple(TILE), x.device)], case[0])


def test_any_attention_may_read_them():
    """Keys and values in one order are a set: who knows nothing of the order gets the same."""
    q, k, v = (tokens((torch.float64, "cpu"), 4 * H * W) for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, in_tile_order(k, H, W, TILE), in_tile_order(v, H, W, TILE)), want)


def test_density_in_place_counts_text_with_the_current_tokens():
    lengths, roles = [30, 8 * H * W, 4 * H * W], [TEXT, CONTEXT, CURRENT]
    apart, joined = (density(lengths, roles, H, W, tuple(TILE), BLOCK, 0.3, in_place=p) for p in (False, True))
    assert apart.total == 1 + num_blocks(280, 64) + num_blocks(140, 64) and joined.total == num_blocks(280, 64) + num_blocks(170, 64)
    assert set(joined.kept) == {num_blocks(170, 64) + int(0.3 * num_blocks(280, 64))}


def test_operators_like_any_other():
    q, k = (tokens((torch.float32, "cpu"), n * H * W) for n in (2, 4))
    check = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.li.in_tile_order.default, (k, H, W, TILE), test_utils=check)
    torch.library.opcheck(torch.ops.li.sparse_prefill.default, (k, [k], [k], [CURRENT], H, W, TILE, BLOCK, 0.4, SUB, 0.25), test_utils=check)
    torch.library.opcheck(torch.ops.li.sparse_attention.default, (q, [k, q], [k, q], [CONTEXT, CURRENT], H, W, TILE, BLOCK, 0.4, 0.4, SUB, 0.25),
                          {"in_place": True}, test_utils=check)  # fmt: skip


def test_what_does_not_fit_is_refused():
    q = tokens((torch.float32, "cpu"), 2 * H * W)
    attend = lambda roles, n, **more: sparse_attention(q, [q] * n, [q] * n, roles, H, W, TILE, BLOCK, 0.4, 0.4, SUB, 0.25, **more)
    with pytest.raises(ValueError, match="read in place where it is one segment of role 1; found roles"):
        attend([CONTEXT, CONTEXT, CURRENT], 3, in_place=True)
    with pytest.raises(ValueError, match="read in place where it is one segment of role 1; found roles"):
        attend([CURRENT], 1, in_place=True)
    with pytest.raises(ValueError, match="encoded without one; found roles"):
        sparse_prefill(q, [q, q], [q, q], [CONTEXT, CURRENT], H, W, TILE, BLOCK, 0.4, SUB, 0.25)
    with pytest.raises(ValueError, match="whole frames of 5 x 7"):
        in_tile_order(q[:, :, 1:], H, W, TILE)
    with pytest.raises(ValueError, match="out and means must be"):
        order_into(q, None, torch.empty(1, 2, 64, 32), None, BLOCK, SUB)
    with pytest.raises(ValueError, match="out must have the dtype"):
        order_into(q, None, torch.empty(1, 2, 70, 32, dtype=torch.float64), None, BLOCK, SUB)

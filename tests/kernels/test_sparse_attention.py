"""The graph-level operator: dense at ratio 1, otherwise equal to attention masked by an independent selection."""

import pytest
import torch
import torch.nn.functional as F

from li_compile.kernels import Encoding, density, pack, pack_context, sparse_attention, sparse_decode, use_provider
from li_compile.kernels.layout import block_valid, neighbour_mask, tile_order
from li_compile.kernels.plan import CONTEXT, CURRENT, TEXT

H, W, TILE, SIZE = 6, 8, [2, 4, 4], 32


def make(lengths, batch=2, heads=3, dim=16, dtype=torch.float32):
    segment = lambda n: torch.randn(batch, n, heads, dim, dtype=dtype).transpose(1, 2)  # BHLD strided as models have it
    lq = lengths[-1]
    return segment(lq), [segment(n) for n in lengths], [segment(n) for n in lengths]


def run(q, k, v, roles, topk=0.3, prefill=0.4, sub_blocks=1, height=H, width=W, **more):
    return sparse_attention(q, k, v, roles, height, width, TILE, SIZE, topk, prefill, sub_blocks, 0.25, **more)


def masked(q, k, v, roles, topk, prefill, height=H, width=W, protected=0):
    """Selection per segment by explicit loops, then SDPA with a token mask, all in the given order and fp64."""
    q, k, v = q.double(), [x.double() for x in k], [x.double() for x in v]
    members, owners = [], []  # token numbers in the concatenation, and role, of each block
    start = 0
    for x, role in zip(k, roles):
        n = x.shape[2]
        order = torch.arange(n) if role == TEXT else tile_order(n // (height * width), height, width, tuple(TILE))
        members += [start + part for part in order.split(SIZE)]
        owners += [role] * len(order.split(SIZE))
        start += n
    keys, values = torch.cat(k, 2), torch.cat(v, 2)
    frames = q.shape[2] // (height * width)
    queries = tile_order(frames, height, width, tuple(TILE)).split(SIZE)
    decode = CONTEXT in roles
    pool = [j for j, role in enumerate(owners) if role == (CONTEXT if decode else CURRENT)]
    near = neighbour_mask(frames, height, width, tuple(TILE), SIZE)
    late = {pool[n] for n, rows in enumerate(queries) if (rows // (height * width) >= frames - protected).any()} if protected else set()
    allowed = torch.zeros(*q.shape[:3], keys.shape[2], dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i, rows in enumerate(queries):
                mean = q[b, h, rows].mean(0)
                score = {j: (mean @ keys[b, h, members[j]].mean(0)).item() for j in pool}
                kept = {j for j, role in enumerate(owners) if role == TEXT or (decode and role == CURRENT)}
                if decode:
                    budget = int(topk * len(pool) + 1e-9)
                else:
                    forced = {j for n, j in enumerate(pool) if near[i, n] and j not in late}
                    kept |= forced | late
                    budget = max(int((topk if protected else prefill) * (len(pool) - len(late)) + 1e-9) - len(forced), 0)
                    score = {j: s for j, s in score.items() if j not in forced | late}
                kept |= set(sorted(score, key=score.get, reverse=True)[:budget])
                for j in kept:
                    allowed[b, h, rows[:, None], members[j]] = True
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed, scale=0.25), allowed


CASES = {
    "decode": ([20, 8 * H * W, 4 * H * W], [TEXT, CONTEXT, CURRENT]),
    "decode, current first": ([4 * H * W, 32, 8 * H * W], [CURRENT, TEXT, CONTEXT]),
    "two histories, two texts": ([7, 4 * H * W, 40, 3 * H * W, 2 * H * W], [TEXT, CONTEXT, TEXT, CONTEXT, CURRENT]),
    "decode without text": ([6 * H * W, 2 * H * W], [CONTEXT, CURRENT]),
    "prefill": ([33, 8 * H * W], [TEXT, CURRENT]),
    "prefill without text": ([5 * H * W], [CURRENT]),
}


@pytest.fixture(params=["cpu", "reference"])
def provider(request):
    with use_provider(request.param):
        yield


def pick(name, **kwargs):
    lengths, roles = CASES[name]
    q, k, v = make(lengths, **kwargs)
    current = roles.index(CURRENT)
    return torch.randn_like(k[current]), k, v, roles


@pytest.mark.parametrize("name", CASES)
def test_equals_masked_attention(name, provider):
    q, k, v, roles = pick(name)
    out = run(q, k, v, roles)
    want, allowed = masked(q, k, v, roles, 0.3, 0.4)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous(), "as models go on with it"
    assert not allowed.all(), "the case must leave something out"
    assert (out.double() - want).norm() / want.norm() <= 1e-5


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_grid_that_tiles_do_not_divide(name, provider):
    """Truncated tiles, blocks that straddle, a partial last block."""
    lengths, roles = CASES[name]
    lengths = [n if role == TEXT else n // (H * W) * 35 for n, role in zip(lengths, roles)]
    q, k, v = make(lengths)
    out = run(q, k, v, roles, height=5, width=7)
    want, _ = masked(q, k, v, roles, 0.3, 0.4, 5, 7)
    assert (out.double() - want).norm() / want.norm() <= 1e-5


#: History and new frames in one sequence: lengths, roles, new frames, rows and columns; the second with blocks that hold both.
ONE_SEQUENCE = {"protected": ([33, 10 * H * W], [TEXT, CURRENT], 4, H, W), "protected, no text": ([9 * 35], [CURRENT], 3, 5, 7)}


@pytest.mark.parametrize("sub_blocks", [1, 4])
@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_new_frames_of_one_sequence_are_protected(name, sub_blocks, provider):
    lengths, roles, protected, height, width = ONE_SEQUENCE[name]
    q, k, v = make(lengths)
    q = torch.randn_like(q)
    run_at = lambda topk, sub=1: run(q, k, v, roles, topk, 0.9, sub, height, width, protected=protected)
    want, allowed = masked(q, k, v, roles, 0.45, 0.9, height, width, protected)
    new = protected * height * width
    assert allowed[..., -new:].all() and not allowed[..., :-new].all()
    assert (run_at(0.45).double() - want).norm() / want.norm() <= 1e-5
    dense = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    torch.testing.assert_close(run_at(1.0, sub_blocks), dense)
    got = run_at(0.45, sub_blocks)
    with use_provider("reference"):
        torch.testing.assert_close(run_at(0.45, sub_blocks), got)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9])
def test_keys_of_new_frames_are_read_at_any_ratio(ratio, provider):
    """New values are ones and those of history zeros: an output is the mass on new frames, at least what dense attention gives them."""
    (length,), roles, protected, height, width = ONE_SEQUENCE["protected, no text"]
    q, k, v = make([length])
    new = protected * height * width
    v[0].zero_()[:, :, -new:] = 1.0
    got = run(q, k, v, roles, ratio, 0.0, 1, height, width, protected=protected)
    dense = F.scaled_dot_product_attention(q, k[0], v[0], scale=0.25)
    assert (got >= dense - 1e-6).all() and (got - dense).norm() / dense.norm() > 1e-3
    plan = density([length], roles, height, width, tuple(TILE), SIZE, ratio, 0.0, protected=protected)
    late = -(-length // SIZE) - min(i // SIZE for i, t in enumerate(tile_order(9, height, width, tuple(TILE)).tolist()) if t >= length - new)
    assert min(plan.kept) >= late + int(ratio * (plan.total - late) + 1e-9) and max(plan.kept) < plan.total


def test_all_frames_protected_is_dense():
    q, k, v = make([4 * H * W])
    want = F.scaled_dot_product_attention(q, k[0], v[0], scale=0.25)
    torch.testing.assert_close(run(q, k, v, [CURRENT], 0.0, 0.0, protected=4), want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_ratio_one_is_dense(name, ratio):
    q, k, v, roles = pick(name)
    want = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    torch.testing.assert_close(run(q, k, v, roles, ratio, ratio), want)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_ratio_just_below_one_is_nearly_dense(name):
    q, k, v, roles = pick(name)
    want = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    out = run(q, k, v, roles, 0.999, 0.999)  # one block in a query block's list is missing
    assert 0 < (out - want).norm() / want.norm() < 0.5


def test_ratio_zero_keeps_what_is_forced(provider):
    q, k, v, roles = pick("decode")
    want = F.scaled_dot_product_attention(q, torch.cat([k[0], k[2]], 2), torch.cat([v[0], v[2]], 2), scale=0.25)
    torch.testing.assert_close(run(q, k, v, roles, topk=0.0), want)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_four_sub_blocks(name):
    """Another choice of blocks, as many of them; both providers agree on it."""
    q, k, v, roles = pick(name)
    one, four = run(q, k, v, roles), run(q, k, v, roles, sub_blocks=4)
    with use_provider("reference"):
        torch.testing.assert_close(run(q, k, v, roles, sub_blocks=4), four)
    assert not torch.equal(one, four)


def parted(q, k, v, roles, topk=0.3, sub_blocks=1, **more):
    """The same call in its two parts."""
    static = [s for s, role in enumerate(roles) if role != CURRENT]
    names = ([k[s] for s in static], [v[s] for s in static], [roles[s] for s in static])
    summary = more.get("summary", False)
    packed = pack_context(*names, H, W, TILE, SIZE, sub_blocks, summary)
    current = roles.index(CURRENT)
    lengths = [x.shape[2] for x in names[0]]
    return sparse_decode(q, k[current], v[current], *packed, lengths, names[2], H, W, TILE, SIZE, topk, sub_blocks, 0.25, **more)


@pytest.mark.parametrize("sub_blocks", [1, 4])
@pytest.mark.parametrize("more", [{}, {"summary": True}, {"head_ratios": [0.1, 0.6, 0.2]}], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("decode") or n.startswith("two")])
def test_packed_once_equals_in_one_call(name, more, sub_blocks, provider):
    q, k, v, roles = pick(name)
    want = sparse_attention(q, k, v, roles, H, W, TILE, SIZE, 0.3, 0.4, sub_blocks, 0.25, **more)
    torch.testing.assert_close(parted(q, k, v, roles, sub_blocks=sub_blocks, **more), want)


@pytest.mark.parametrize("name", ["decode", "two histories, two texts"])
def test_packed_at_ratio_one_is_dense(name):
    q, k, v, roles = pick(name)
    want = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    torch.testing.assert_close(parted(q, k, v, roles, topk=1.0), want)


def test_head_ratios(provider):
    """Each head as if all had its ratio; a head may have all."""
    q, k, v, roles = pick("decode")
    ratios = [0.1, 1.0, 0.4]
    out = sparse_attention(q, k, v, roles, H, W, TILE, SIZE, 0.3, 0.4, 1, 0.25, head_ratios=ratios)
    for head, ratio in enumerate(ratios):
        torch.testing.assert_close(out[:, head], run(q, k, v, roles, topk=ratio)[:, head])
    plan = density([20, 8 * H * W, 4 * H * W], [TEXT, CONTEXT, CURRENT], H, W, tuple(TILE), SIZE, head_ratios=ratios)
    assert set(plan.kept) == {1 + 6 + (1 + 12 + 4) / 3}


@pytest.mark.parametrize("name", ["decode", "prefill", "prefill without text"])
def test_summaries_come_closer_to_dense(name, provider):
    """Keys that differ little within a block: means stand well for what was left out."""
    q, k, v, roles = pick(name)
    pairs = lambda x: torch.randn(*x.shape[:2], x.shape[2] // (H * W) + 1, x.shape[3]).repeat_interleave(2 * H * W, 2)  # tiles hold two frames
    smooth = lambda x: x if x.shape[2] < SIZE else x * 0.05 + pairs(x)[:, :, : x.shape[2]]
    k, v = [smooth(x) for x in k], [smooth(x) for x in v]
    dense = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    error = lambda out: (out - dense).norm() / dense.norm()
    plain, whole = (sparse_attention(q, k, v, roles, H, W, TILE, SIZE, 0.1, 0.2, 1, 0.25, summary=s) for s in (False, True))
    assert error(whole) < 0.2 * error(plain) and error(plain) > 0.1


def encodings(q, frames):
    length, dim = q.shape[2], q.shape[3]
    angle = (torch.rand(length, dim // 2) * 6).repeat_interleave(2, 1)
    return {"q_norm": torch.rand(dim) + 0.5, "k_norm": torch.rand(dim) + 0.5, "cos": angle.cos(), "sin": angle.sin(),
            "q_camera": torch.randn(1, frames, 4, 4) * 0.5, "kv_camera": torch.randn(1, frames, 4, 4) * 0.5}  # fmt: skip


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_encodings_are_applied_to_the_current_segment(name, ratio, provider):
    """Raw q, k and v and both branches, as in HY-WorldPlay, against encoding them first."""
    q, k, v, roles = pick(name)
    current = roles.index(CURRENT)
    raw = [x[:1] for x in (q, k[current], v[current])]
    more = encodings(q, q.shape[2] // (H * W))
    plain = lambda x, e: pack(x, None, 1, 1, e.norm, 1e-6, e.cos, e.sin, e.camera)[0]
    done = [plain(raw[0], Encoding(more["q_norm"], 1e-6, more["cos"], more["sin"], more["q_camera"])),
            plain(raw[1], Encoding(more["k_norm"], 1e-6, more["cos"], more["sin"], more["kv_camera"])),
            plain(raw[2], Encoding(camera=more["kv_camera"]))]  # fmt: skip
    beside = lambda xs, x: [x if s == current else y for s, y in enumerate(xs)]
    want = run(done[0], beside(k, done[1]), beside(v, done[2]), roles, ratio, ratio)
    args = (raw[0], beside(k, raw[1]), beside(v, raw[2]), roles)
    out = sparse_attention(*args, H, W, TILE, SIZE, ratio, ratio, 1, 0.25, **more)
    assert out.shape[0] == 2
    torch.testing.assert_close(out, want, atol=2e-5, rtol=2e-5)
    if name == "decode":
        torch.testing.assert_close(parted(*args, topk=ratio, **more), want, atol=2e-5, rtol=2e-5)


def test_expanded_segment_and_half_precision():
    q, k, v, roles = pick("decode")
    k[0], v[0] = (x[:1].expand_as(x) for x in (k[0], v[0]))  # text shared by both branches
    want, _ = masked(q, k, v, roles, 0.3, 0.4)
    assert (run(q, k, v, roles).double() - want).norm() / want.norm() <= 1e-5
    half = run(q.bfloat16(), [x.bfloat16() for x in k], [x.bfloat16() for x in v], roles, topk=0.0)
    full = run(q, k, v, roles, topk=0.0)
    assert half.dtype == torch.bfloat16 and (half - full).norm() / full.norm() <= 1e-2


def test_scratch_memory_does_not_leak_between_calls():
    q, k, v, roles = pick("decode")
    first = run(q, k, v, roles)
    kept = first.clone()
    run(*pick("prefill"))
    assert torch.equal(first, kept)
    torch.testing.assert_close(run(q, k, v, roles), kept, rtol=0, atol=0)


def test_inference_mode_between_calls():
    q, k, v, roles = pick("decode")
    with torch.inference_mode():
        inside = run(q, k, v, roles)
    torch.testing.assert_close(run(q, k, v, roles), inside)


@pytest.mark.parametrize("name", CASES)
def test_density_is_what_runs(name):
    lengths, roles = CASES[name]
    q, k, v, roles = pick(name)
    plan = density(lengths, roles, H, W, tuple(TILE), SIZE, 0.3, 0.4)
    _, allowed = masked(q, k, v, roles, 0.3, 0.4)
    order = tile_order(q.shape[2] // (H * W), H, W, tuple(TILE))
    tokens = allowed[0, 0, order[::SIZE]].sum(-1)
    assert len(plan.kept) == len(tokens)
    sizes = sum((block_valid(n, SIZE).tolist() for n in lengths), [])
    assert plan.total == len(sizes)
    for blocks, seen in zip(plan.kept, tokens.tolist()):
        assert seen <= blocks * SIZE and (set(sizes) != {SIZE} or seen == blocks * SIZE)


def test_density_of_the_paper():
    """HY-WorldPlay decode at context 20: 45 of 260 history blocks there; 49 instead of 52 blocks a chunk here."""
    plan = density([1000, 20 * 1560, 6240], [TEXT, CONTEXT, CURRENT], 30, 52, (4, 8, 4), 128, 0.175, 0.3)
    history = -(-20 * 1560 // 128)
    assert set(plan.kept) == {8 + 49 + int(0.175 * history)} and plan.total == 8 + 49 + history
    assert density([64], [CURRENT], 4, 4, prefill_ratio=1.0).ratio == 1.0
    assert density([100 * 64, 64], [CONTEXT, CURRENT], 4, 4, topk_ratio=0.29).kept == (30,)  # not floor(28.999...)


def test_wrong_arguments_say_what_is_wrong():
    q, k, v, roles = pick("decode")
    for arguments, words in (
        ((q, k, v, [0, 1]), "needs a role"),
        ((q, k, v, [0, 1, 1]), "exactly one is current"),
        ((q[:, :, :-1], k, v, roles), "current segment's 192 tokens"),
        ((q, [k[0], k[1][:, :, :-1], k[2]], v, roles), "whole frames"),
        ((q, k, [v[0], v[0], v[2]], roles), "same segments"),
        ((q.double(), k, v, roles), "dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            run(*arguments)
    with pytest.raises(ValueError, match="protected counts frames .* without a context segment"):
        run(q, k, v, roles, protected=1)
    q, k, v, roles = pick("prefill")
    with pytest.raises(ValueError, match="of at most 8 here"):
        run(q, k, v, roles, protected=9)


@pytest.mark.parametrize("summary", [False, True])
def test_operators_are_well_formed(summary):
    q, k, v, roles = pick("decode")
    torch.library.opcheck(sparse_attention, (q, k, v, roles, H, W, TILE, SIZE, 0.3, 0.4, 1, 0.25, summary))
    torch.library.opcheck(sparse_attention, (q, k[2:], v[2:], [CURRENT], H, W, TILE, SIZE, 0.3, 0.4, 1, 0.25, summary), {"protected": 2})
    torch.library.opcheck(pack_context, (k[:2], v[:2], roles[:2], H, W, TILE, SIZE, 4, summary))
    packed = pack_context(k[:2], v[:2], roles[:2], H, W, TILE, SIZE, 1, summary)
    lengths = [x.shape[2] for x in k[:2]]
    torch.library.opcheck(sparse_decode, (q, k[2], v[2], *packed, lengths, roles[:2], H, W, TILE, SIZE, 0.3, 1, 0.25, summary))


def test_parts_that_do_not_fit_are_refused():
    q, k, v, roles = pick("decode")
    packed = pack_context(k[:2], v[:2], roles[:2], H, W, TILE, SIZE, 1)
    settings = (roles[:2], H, W, TILE, SIZE, 0.3, 1, 0.25)
    with pytest.raises(ValueError, match="must hold 4 blocks"):
        sparse_decode(q, k[2], v[2], *packed, [20, 2 * H * W], *settings)
    with pytest.raises(ValueError, match="must share batch"):
        sparse_decode(q, k[2][:1], v[2][:1], *packed, [20, 8 * H * W], *settings)
    with pytest.raises(ValueError, match="go together"):
        sparse_decode(q, k[2], v[2], *packed, [20, 8 * H * W], *settings, q_camera=torch.zeros(2, 4, 4, 4))
    with pytest.raises(ValueError, match="same segments, of roles 0 and 1"):
        pack_context(k[:2], v[1:], roles[:2], H, W, TILE, SIZE, 1)


def test_compiles_with_symbolic_lengths():
    q, k, v, roles = pick("decode")
    traced = torch.compile(lambda q, k, v: run(q, k, v, roles).transpose(1, 2).flatten(2) * 2, backend="aot_eager", dynamic=True, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(traced(q, k, v), run(q, k, v, roles).transpose(1, 2).flatten(2) * 2)
        q, k, v, roles = pick("decode")
        k[1], v[1] = (torch.cat((x, x), 2) for x in (k[1], v[1]))

"""One contract for block-sparse attention; every provider has to keep it.

Without a GPU, run with TRITON_INTERPRET=1 (test_interpreter.py does) to hold the Triton kernel to it as well.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from li_compile.kernels import Problem, block_sparse_attention, explain_provider, providers, use_provider
from li_compile.kernels._compat import has_triton, interpreting
from li_compile.kernels.block_sparse import attend

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative L2
GPU = torch.cuda.is_available() and not interpreting()
HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9


def _gpu(ok=GPU, what="a CUDA device"):
    return [pytest.mark.gpu, pytest.mark.skipif(not ok, reason=f"needs {what}")]


def _cases():
    def case(name, dtype, device, marks=()):
        return pytest.param((name, dtype, device), id=f"{name}-{str(dtype)[6:]}-{device}", marks=marks)

    yield case("reference", torch.float64, "cpu")
    yield case("cpu", torch.float32, "cpu")
    yield case("cpu", torch.bfloat16, "cpu")
    if interpreting() and has_triton():
        yield case("triton", torch.float32, "cpu")
        yield case("triton", torch.float16, "cpu")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield case("triton", dtype, "cuda", _gpu())
    for dtype in (torch.float16, torch.bfloat16):
        yield case("hopper", dtype, "cuda", _gpu(HOPPER, "a Hopper GPU"))


@pytest.fixture(params=_cases())
def case(request):
    name, dtype, device = request.param
    with use_provider(name):
        yield name, dtype, device


def unit(case):
    """Tests count tokens in sixteenths of their smallest block; the Hopper kernel's smallest is 64."""
    return 4 if case[0] == "hopper" else 1


def make(case, batch=1, heads=3, nq=2, nk=4, dim=None, block=16, valid=None):
    name, dtype, device = case
    block, dim = block * unit(case), dim or (64 if name == "hopper" else 32)
    q, k, v = (torch.randn(batch, heads, n * block, dim, device=device).to(dtype) for n in (nq, nk, nk))
    valid = torch.tensor([n * unit(case) for n in valid] if valid else [block] * nk, dtype=torch.int32, device=device)
    return q, k, v, valid, block


def lists(kept, pitch, device, poison=0):
    """kept: nested [B][H][nq] lists of blocks -> block_indices, block_counts."""
    counts = torch.tensor([[[len(r) for r in h] for h in b] for b in kept], dtype=torch.int32)
    indices = torch.tensor([[[list(r) + [poison] * (pitch - len(r)) for r in h] for h in b] for b in kept], dtype=torch.int32)
    return indices.to(device), counts.to(device)


def oracle(q, k, v, indices, counts, valid, block, scale, summary=None):
    """Masked softmax in fp64 over the same kept set, built another way than any provider."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    allowed = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        for j in indices[b, h, i, : counts[b, h, i]].tolist():
            allowed[b, h, i * block : (i + 1) * block, j * block : j * block + int(valid[j])] = True
    k, v = (torch.where(allowed.any((0, 1, 2))[:, None], x, 0.0) for x in (k, v))
    scores = ((q @ k.mT) * scale).masked_fill(~allowed, float("-inf"))
    if summary is not None:
        k_mean, v_mean, bias = (x.double().cpu() for x in summary)
        scores = torch.cat((scores, (q @ k_mean.mT) * scale + bias.repeat_interleave(block, 2)), -1)
        v = torch.cat((v, v_mean), 2)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.where(weights > 0, weights, 0.0) @ v.nan_to_num(0.0), scores.logsumexp(-1)


def check(case, q, k, v, indices, counts, valid, block, scale=0.3, summary=None, split=None, tails=None, slack=1.0):
    """Run and compare; split: blocks in the first of two sources; slack: by how much scores are larger than usual."""
    first, second = (k, v), (None, None)
    if split is not None:
        first, second = ((k[:, :, :n], v[:, :, :n]) if part == 0 else (k[:, :, n:], v[:, :, n:]) for part, n in ((0, split * block), (1, split * block)))
    out, lse = block_sparse_attention(q, *first, indices, counts, valid, block, scale, tails, *second, *(summary or ()))
    want, want_lse = oracle(q, k, v, indices, counts, valid, block, scale, summary)
    assert out.dtype == q.dtype and out.shape == q.shape and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    assert out.isfinite().all(), "every row is written, and no poison leaks"
    error = (out.double().cpu() - want).norm() / want.norm().clamp(min=1e-9)
    assert error <= BOUND[q.dtype] * slack, f"relative L2 {error:.1e}"
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-3, rtol=1e-6)
    return out, lse


def test_counts_zero_one_max_and_odd_heads(case):
    q, k, v, valid, block = make(case)
    kept = [[[[], [2]], [[0, 1, 2, 3], [1, 3]], [[0], []]]]
    indices, counts = lists(kept, 4, q.device, poison=-7)  # what lies past the count must not be looked at
    out, lse = check(case, q, k, v, indices, counts, valid, block)
    for head, row in ((0, 0), (2, 1)):
        rows = slice(row * block, (row + 1) * block)
        assert (out[0, head, rows] == 0).all() and lse[0, head, rows].isneginf().all()


@pytest.mark.parametrize("valid", [[16, 16, 16, 5], [3, 16, 16, 1], [16, 0, 16, 16]], ids=str)
def test_padding_is_poisoned(case, valid):
    q, k, v, valid, block = make(case, valid=valid)
    poison_padding(k, v, valid, block)
    kept = [[[[0, 1, 2, 3], [0, 3]], [[1, 3], [3]], [[0, 1], [1]]]]
    check(case, q, k, v, *lists(kept, 4, q.device), valid, block)


def poison_padding(k, v, valid, block):
    for j, n in enumerate(valid.tolist()):
        k[:, :, j * block + n : (j + 1) * block] = float("nan")
        v[:, :, j * block + n : (j + 1) * block] = float("nan")


def test_unselected_blocks_are_poisoned(case):
    q, k, v, valid, block = make(case)
    for x in (k, v):
        x[:, 0, block : 2 * block] = float("nan")
        x[:, 2, :block] = float("inf")
    kept = [[[[0, 2], [3]], [[0, 1, 2, 3], [0, 1, 2, 3]], [[1, 2], [3]]]]
    check(case, q, k, v, *lists(kept, 4, q.device), valid, block)


@pytest.mark.parametrize("split", [None, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_storage_ends_at_the_last_key(case, split, shared):
    """The last block is not there as a whole; behind its last key there is something else's memory."""
    q, k, v, valid, block = make(case, valid=[16, 16, 16, 5])
    poison_padding(k, v, valid, block)
    length = 3 * block + int(valid[3])
    kept = [[[[0, 2, 3], [1, 2, 3]]] * 3] if shared else [[[[0, 3], [1]], [[3], [0, 1, 2]], [[], [0, 3]]]]
    indices, counts = lists(kept, 4, q.device)
    long = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]  # as models have it: [B, L, H, D] in memory
    cut = [x[:, :, :length] for x in long]
    first, second = (cut, (None, None)) if split is None else ([x[:, :, : split * block] for x in cut], [x[:, :, split * block :] for x in cut])
    out, lse = block_sparse_attention(q, *first, indices, counts, valid, block, 0.3, None, *second)
    want, want_lse = oracle(q, k, v, indices, counts, valid, block, 0.3)
    assert (out.double().cpu() - want).norm() / want.norm() <= BOUND[q.dtype]
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("lengths", [(21, 16), (5, 48), (37, 9)], ids=str)
def test_both_sources_end_at_their_last_keys(case, lengths):
    """Blocks begin anew with the second source; behind either one's last key there is something else's memory. One list for all, expanded."""
    q, k, v, _, block = make(case, nk=8)
    lengths = [n * unit(case) for n in lengths]
    blocks = [-(-n // block) for n in lengths]
    valid = torch.tensor([min(block, n - i * block) for n, m in zip(lengths, blocks) for i in range(m)], dtype=torch.int32, device=q.device)
    whole = [x[:, :, : sum(blocks) * block].clone() for x in (k, v)]  # as one source, padded
    poison_padding(*whole, valid, block)
    first, second = ([x[:, :, at * block : at * block + n].transpose(1, 2).contiguous().transpose(1, 2) for x in whole]
                     for at, n in ((0, lengths[0]), (blocks[0], lengths[1])))  # fmt: skip
    order = torch.argsort((valid < block).int(), stable=True).int()
    indices = order.expand(1, 3, 2, -1)
    counts = torch.full((1, 3, 2), len(valid), dtype=torch.int32, device=q.device)
    tails = torch.full_like(counts, int((valid < block).sum()))
    out, lse = block_sparse_attention(q, *first, indices, counts, valid, block, 0.3, tails, *second)
    want, want_lse = oracle(q, *whole, indices, counts, valid, block, 0.3)
    assert (out.double().cpu() - want).norm() / want.norm() <= BOUND[q.dtype]
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("last", [7, 16])
def test_shared_run_of_blocks(case, last):
    """All rows keep 1 to 3, side by side; the rest differs in number. Then all to the partly filled end."""
    q, k, v, valid, block = make(case, nk=6, valid=[16] * 5 + [last])
    poison_padding(k, v, valid, block)
    kept = [[[[1, 2, 3], [0, 1, 2, 3, 5]], [[0, 1, 2, 3], [1, 2, 3, 4]], [[1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]]]
    check(case, q, k, v, *lists(kept, 6, q.device), valid, block)
    kept = [[[[3, 4, 5], [0, 3, 4, 5]], [[0, 1, 3, 4, 5], [3, 4, 5]], [[3, 4, 5], [3, 4, 5]]]]
    check(case, q, k, v, *lists(kept, 6, q.device), valid, block)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_density_one_is_dense(case, dim):
    if case[0] == "hopper" and dim == 32:
        pytest.skip("no kernel for it; the Triton kernel takes it")
    q, k, v, valid, block = make(case, batch=2, heads=1, nq=1, nk=3, dim=dim, valid=[16, 16, 9])
    indices, counts = lists([[[[0, 1, 2]]]] * 2, 3, q.device)
    out, _ = check(case, q, k, v, indices, counts, valid, block, dim**-0.5)
    real = int(valid.sum())
    dense = F.scaled_dot_product_attention(*(x.double() for x in (q, k[:, :, :real], v[:, :, :real])))
    assert (out.double() - dense).norm() / dense.norm() <= BOUND[q.dtype]


def test_asymmetric_with_views(case):
    """More keys than queries, K and V are views with odd strides, blocks of two kernel tiles."""
    q, k, v, valid, block = make(case, heads=2, nq=1, nk=3, block=32, valid=[32, 20, 32])
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    check(case, q, k, v, *lists([[[[1, 2]], [[0, 1]]]], 3, q.device), valid, block)


@pytest.mark.parametrize("split", [0, 1, 3, 4])
def test_two_sources(case, split):
    """Blocks are numbered on from one source into the other; either may be empty or a part of something larger."""
    q, k, v, valid, block = make(case, batch=2, valid=[16, 9, 16, 5])
    poison_padding(k, v, valid, block)
    kept = [[[[0, 1, 2, 3], [0, 3]], [[2], [1]], [[], [1, 2]]]] * 2
    check(case, q, k, v, *lists(kept, 4, q.device), valid, block, split=split)


def test_tails(case):
    """Whole blocks first, then as many partly filled ones as are said; none of the lists ascends throughout."""
    q, k, v, valid, block = make(case, nk=6, valid=[16, 4, 16, 16, 9, 16])
    poison_padding(k, v, valid, block)
    kept = [[[[0, 2, 1, 4], [1]], [[3], [0, 5, 4]], [[], [2, 3, 5, 0, 4, 1]]]]
    tails = torch.tensor([[[2, 1], [0, 1], [0, 2]]], dtype=torch.int32, device=q.device)
    indices, counts = lists(kept, 6, q.device)
    for split in (None, 2):
        check(case, q, k, v, indices, counts, valid, block, tails=tails, split=split)
    check(case, q, k, v, indices, counts, valid, block, tails=torch.minimum(tails + 1, counts))  # more than needed is fine


def means(case, k, v, valid, block):
    """Key and value of each block's mean over true tokens, as summaries."""
    real = torch.arange(block, device=k.device) < valid[:, None]
    mean = lambda x: (x.unflatten(2, (-1, block)).float().nan_to_num() * real[..., None]).sum(3) / valid.clamp(min=1)[:, None]
    return mean(k).to(k.dtype), mean(v).to(v.dtype)


def test_all_blocks_summarised(case):
    """Nothing kept: a closed form, the softmax over block means with the blocks' sizes as weights."""
    q, k, v, valid, block = make(case, nk=5, valid=[16, 16, 3, 16, 11])
    k_mean, v_mean = means(case, k, v, valid, block)
    bias = valid.float().log().expand(1, 3, 2, 5).contiguous()
    poison_padding(k, v, valid, block)
    out, lse = check(case, q, k, v, *lists([[[[], []]] * 3], 5, q.device), valid, block, summary=(k_mean, v_mean, bias))
    scores = 0.3 * q.double() @ k_mean.double().mT
    weights = scores.exp() * bias[0, 0, 0].double().exp()
    want = (weights / weights.sum(-1, keepdim=True)) @ v_mean.double()
    assert (out.double() - want).norm() / want.norm() <= BOUND[q.dtype]
    torch.testing.assert_close(lse.double(), weights.sum(-1).log(), atol=1e-3, rtol=1e-6)


def test_some_blocks_summarised(case):
    """Kept blocks count by their tokens, dropped ones by their mean, none by both."""
    q, k, v, valid, block = make(case, nk=70, heads=1, valid=[16, 5] * 35)
    k_mean, v_mean = means(case, k, v, valid, block)
    poison_padding(k, v, valid, block)
    kept = [[[[1, 2, 33, 69], list(range(70))]]]
    bias = valid.float().log().expand(1, 1, 2, 70).clone()
    for row, blocks in enumerate(kept[0][0]):
        bias[0, 0, row, blocks] = float("-inf")
    check(case, q, k, v, *lists(kept, 70, q.device), valid, block, summary=(k_mean, v_mean, bias), split=30)


@pytest.mark.parametrize("rise", [5, 30, 90, 300])
def test_later_blocks_outweigh_the_first(case, rise):
    """Scores that rise by so much (in natural units) after the first block: kernels that take its maximum as reference
    overflow at some point and must notice; rows that don't rise share a block with those that do."""
    q, k, v, valid, block = make(case, heads=2, nk=4, valid=[16, 16, 16, 7])
    q[:, :, :, 0], q[:, :, ::3, 0] = 1, 0
    k[:, :, :, 0] = 0
    k[:, :, 2 * block : 3 * block, 0] = rise / 0.3
    poison_padding(k, v, valid, block)
    kept = [[[[0, 1, 2, 3], [0, 2]], [[0, 1], [2]]]]
    tails = torch.tensor([[[1, 0], [0, 0]]], dtype=torch.int32, device=q.device)
    slack = max(1.0, rise / 50)  # scores are rounded in proportion to their size
    check(case, q, k, v, *lists(kept, 4, q.device), valid, block, tails=tails, slack=slack)
    check(case, q, k, v, *lists(kept, 4, q.device), valid, block, slack=slack)


def test_large_scores(case):
    q, k, v, valid, block = make(case, heads=1, nq=1, nk=2)
    out, lse = block_sparse_attention(q * 30, k * 30, v, *lists([[[[0, 1]]]], 2, q.device), valid, block, 1.0)
    assert out.isfinite().all() and lse.isfinite().all()


def test_first_key_has_no_weight(case):
    q, k, v, valid, block = make(case, heads=1, nq=1, nk=3)
    k[:, :, 0] = -q[:, :, 0] * 40  # the first query gives it e**-hundreds
    check(case, q, k, v, *lists([[[[0, 2]]]], 3, q.device), valid, block, 0.3)


def test_nothing_kept_at_all(case):
    q, k, v, valid, block = make(case)
    out, lse = block_sparse_attention(q, k, v, *lists([[[[], []]] * 3], 4, q.device), valid, block, 1.0)
    assert (out == 0).all() and lse.isneginf().all()


def test_empty_lists(case):
    q, k, v, valid, block = make(case)
    out, lse = block_sparse_attention(q, k, v, *lists([[[[], []]] * 3], 0, q.device), valid, block, 1.0)
    assert (out == 0).all() and lse.isneginf().all()


def test_rows_go_where_they_are_sent(case):
    """As the graph operators use it: out of block order into the model's, padding rows nowhere, V's padding known finite."""
    q, k, v, valid, block = make(case, valid=[16, 16, 16, 5])
    for j, n in enumerate(valid.tolist()):
        k[:, :, j * block + n : (j + 1) * block], v[:, :, j * block + n : (j + 1) * block] = float("nan"), 0
    length = 2 * block - 3
    places = torch.cat((torch.randperm(length), torch.full((3,), -1))).int().to(q.device)
    problem = Problem(q, k, v, *lists([[[[0, 1, 2, 3], [0, 3]]] * 3], 4, q.device), valid, block, 0.3, clean=True)
    straight, lse = attend(problem)
    out, lse_too = attend(dataclasses.replace(problem, rows=places, length=length))
    assert out.shape == (1, 3, length, q.shape[3]) and out.transpose(1, 2).is_contiguous()
    assert torch.equal(out[:, :, places[:-3].long()], straight[:, :, :-3]) and torch.equal(lse[:, :, :-3], lse_too[:, :, :-3])
    # The queries' storage may end at the last true row, too.
    long = torch.full((1, length + 3, 3, q.shape[3]), float("nan"), dtype=q.dtype, device=q.device)
    long[:, :length] = q[:, :, :length].transpose(1, 2)
    short, _ = attend(dataclasses.replace(problem, q=long[:, :length].transpose(1, 2), rows=places, length=length))
    assert torch.equal(short, out)


# The tile sizes that are used for real, which the interpreter would take long over.
REAL = [pytest.param((name, dtype, "cuda"), block, dim, id=f"{name}-{str(dtype)[6:]}-{block}-{dim}", marks=marks)
        for name, marks in (("triton", _gpu()), ("hopper", _gpu(HOPPER, "a Hopper GPU")))
        for dtype in (torch.float16, torch.bfloat16) for block, dim in ((64, 64), (64, 128), (128, 64), (128, 128))]  # fmt: skip


@pytest.mark.parametrize("case,block,dim", REAL)
def test_real_tiles(case, block, dim):
    with use_provider(case[0]):
        q, k, v, valid, block = make(case, nq=3, nk=7, dim=dim, block=block // unit(case))
        valid[-1] -= 9
        k[:, :, -9:], v[:, :, -9:] = float("nan"), float("nan")
        kept = [[[[0, 2, 6], [6], [1, 3, 4, 5]], [[], [0, 1, 2, 3, 4, 5, 6], [2]], [[5, 6], [0], [3, 4]]]]
        tails = torch.tensor([[[1, 1, 0], [0, 1, 0], [1, 0, 0]]], dtype=torch.int32, device="cuda")
        for split in (None, 4):
            for given in (None, tails):
                check(case, q, k, v, *lists(kept, 7, "cuda"), valid, block, dim**-0.5, tails=given, split=split)
        k_mean, v_mean = means(case, k, v, valid, block)
        bias = valid.float().log().expand(1, 3, 3, 7).clone()
        for head in range(3):
            for row in range(3):
                bias[0, head, row, kept[0][head][row]] = float("-inf")
        check(case, q, k, v, *lists(kept, 7, "cuda"), valid, block, dim**-0.5, tails=tails, split=4, summary=(k_mean, v_mean, bias))


@pytest.mark.parametrize("case,block,dim", [p for p in REAL if p.id.endswith("bfloat16-128-128")])
def test_many_query_blocks(case, block, dim):
    """More than the device holds at a time, of uneven numbers of keys; compared with the reference on the device."""
    torch.manual_seed(1)
    heads, nq, nk = 5, 67, 40
    q, k, v = (torch.randn(2, heads, n * block, dim, device="cuda", dtype=case[1]) for n in (nq, nk, nk))
    valid = torch.full((nk,), block, dtype=torch.int32, device="cuda")
    counts = torch.randint(0, nk + 1, (2, heads, nq), device="cuda", dtype=torch.int32)
    indices = torch.rand(2, heads, nq, nk, device="cuda").argsort(-1).int()
    args = (q, k, v, indices, counts, valid, block, dim**-0.5, torch.zeros_like(counts))
    with use_provider("reference"):
        want, want_lse = block_sparse_attention(*(x.float() if x is q or x is k or x is v else x for x in args))
    with use_provider(case[0]):
        out, lse = block_sparse_attention(*args)
    assert (out.float() - want).norm() / want.norm() <= BOUND[case[1]]
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("case,block,dim", [p for p in REAL if p.id.endswith("bfloat16-128-128")])
def test_offsets_past_32_bits(case, block, dim):
    """Keys of more than 2**31 elements: the last head's last blocks are read from where they are."""
    blocks = 2**31 // (16 * block * dim) + 2
    k = torch.zeros(1, 16, blocks * block, dim, device="cuda", dtype=case[1])
    k[:, -1, -2 * block :] = torch.randn(2 * block, dim, device="cuda", dtype=case[1])
    q = torch.randn(1, 16, block, dim, device="cuda", dtype=case[1])
    indices = torch.tensor([blocks - 2, blocks - 1], dtype=torch.int32, device="cuda").expand(1, 16, 1, 2).contiguous()
    counts = torch.full((1, 16, 1), 2, dtype=torch.int32, device="cuda")
    valid = torch.full((blocks,), block, dtype=torch.int32, device="cuda")
    with use_provider(case[0]):
        out, _ = block_sparse_attention(q, k, k, indices, counts, valid, block, 0.1, torch.zeros_like(counts))
    keys = k[0, -1, -2 * block :].double()
    want = ((q[0, -1].double() @ keys.T) * 0.1).softmax(-1) @ keys
    assert (out[0, -1].double() - want).norm() / want.norm() <= BOUND[case[1]]


@pytest.mark.parametrize("case,block,dim", [p for p in REAL if "float16-64-64" in p.id and "bf" not in p.id])
def test_graph_replay_with_changed_lists(case, block, dim):
    with use_provider(case[0]):
        q, k, v, valid, block = make(case, heads=1, block=block // unit(case), dim=dim)
        indices, counts = lists([[[[0, 1], [2]]]], 4, "cuda")
        run = lambda: block_sparse_attention(q, k, v, indices, counts, valid, block, 0.125)
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = run()
        for kept in ([[[[1, 3], [0, 1, 2, 3]]]], [[[[], [3]]]]):
            new = lists(kept, 4, "cuda")
            indices.copy_(new[0]), counts.copy_(new[1])
            graph.replay()
            want, _ = oracle(q, k, v, indices, counts, valid, block, 0.125)
            assert (out.double().cpu() - want).norm() / want.norm() <= 1e-3


def one_block(dtype=torch.float32, **more):
    q = torch.randn(1, 1, 16, 32).to(dtype)
    return Problem(q, q, q, *lists([[[[0]]]], 1, "cpu"), torch.tensor([16], dtype=torch.int32), 16, 1.0, **more)


def test_explains_its_choice():
    name = "block_sparse_attention"
    assert [p.name for p in providers(name)] == ["cpu", "hopper", "triton", "reference"]
    assert explain_provider(name, one_block())[0] == "cpu"
    chosen, reason = explain_provider(name, one_block(torch.float64))
    assert chosen == "reference" and "cpu: it computes in fp32" in reason and "hopper: it needs a Hopper GPU" in reason
    with use_provider("reference"):
        assert explain_provider(name, one_block())[0] == "reference"
    with use_provider("cpu"), pytest.raises(ValueError, match="float64"):
        explain_provider(name, one_block(torch.float64))


@pytest.mark.skipif(not has_triton() or interpreting(), reason="asks the compiled providers")
@pytest.mark.parametrize("change,words", [
    ({"dtype": torch.float32}, "fp16 or bf16"), ({"dim": 32}, "head_dim 64 or 128"), ({"block": 32}, "block_size of 64 or 128"),
])  # fmt: skip
def test_hopper_says_what_it_does_not_take(monkeypatch, change, words):
    """With a GPU that claims to be one: dtype, head size and block size that have no kernel are refused with the reason."""
    from li_compile.kernels import block_sparse_hopper

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    given = {"dtype": torch.bfloat16, "dim": 128, "block": 128} | change
    q = torch.empty(1, 1, given["block"], given["dim"], dtype=given["dtype"], device="meta")

    class Pretended(Problem):
        @property
        def q(self):
            return type("Q", (), {"device": torch.device("cuda"), "dtype": q.dtype, "shape": q.shape})()

    problem = object.__new__(Pretended)
    object.__setattr__(problem, "block_size", given["block"])
    assert words in block_sparse_hopper.supports(problem)


def test_environment_overrides(monkeypatch):
    monkeypatch.setenv("LI_COMPILE_PROVIDER", "reference")
    assert explain_provider("block_sparse_attention", one_block())[0] == "reference"


def test_wrong_arguments_say_what_is_wrong():
    q = torch.randn(1, 1, 16, 32)
    indices, counts = lists([[[[0]]]], 1, "cpu")
    valid = torch.tensor([16], dtype=torch.int32)
    good = (q, q, q, indices, counts, valid, 16, 1.0)
    for bad, more, words in (
        ((q[:, :, :15], q, q, indices, counts, valid, 16, 1.0), {}, "whole blocks"),
        ((q, q[..., :16], q, indices, counts, valid, 16, 1.0), {}, "same B, H and D"),
        ((q, q, q, indices.long(), counts, valid, 16, 1.0), {}, "int32"),
        ((q, q, q, indices, counts[:, :, :0], valid, 16, 1.0), {}, "block_counts"),
        ((q, q, q, indices, counts, valid, 16, 0.0), {}, "scale"),
        (good, {"tails": counts[0]}, "tails"),
        (good, {"current_k": q}, "go together"),
        (good, {"current_k": q[..., :8], "current_v": q[..., :8]}, "like k"),
        (good, {"current_k": q, "current_v": q}, r"kv_valid \[2\]"),
        (good, {"summary_k": q}, "all or none"),
        (good, {"summary_k": q, "summary_v": q, "summary_bias": torch.zeros(1, 1, 1, 3)}, "summary_bias"),
    ):
        with pytest.raises(ValueError, match=words):
            block_sparse_attention(*bad, **more)


def test_operator_is_well_formed():
    q = torch.randn(1, 2, 32, 32)
    args = (q, q, q, *lists([[[[0], [0, 1]]] * 2], 2, "cpu"), torch.tensor([16, 9], dtype=torch.int32), 16, 1.0)
    torch.library.opcheck(block_sparse_attention, args)
    torch.library.opcheck(block_sparse_attention, (*args[:5], torch.tensor([16, 9, 16, 16], dtype=torch.int32), 16, 1.0, args[4], q, q))

"""Selection against a brute-force top-k: exact sets, exact counts, order, padding without influence.

The Triton kernel is held to it on a GPU, and in the interpreter by test_interpreter.py.
"""

import math

import pytest
import torch

from li_compile.kernels import choose_blocks, pack, use_provider
from li_compile.kernels._compat import has_triton, interpreting
from li_compile.kernels.selection import part_counts

BLOCK, DIM = 16, 16
GPU = torch.cuda.is_available() and not interpreting()
PROVIDERS = [pytest.param(("reference", "cpu"), id="reference-cpu"),
             pytest.param(("triton", "cpu"), id="triton-cpu",
                          marks=pytest.mark.skipif(not (has_triton() and interpreting()), reason="runs in the interpreter")),
             pytest.param(("triton", "cuda"), id="triton-cuda",
                          marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")])]  # fmt: skip


@pytest.fixture(params=PROVIDERS)
def device(request):
    name, device = request.param
    with use_provider(name):
        yield device


def make(batch=2, heads=3, nq=3, nk=9, q_valid=None, kv_valid=None):
    q_valid, kv_valid = (torch.tensor(x or [BLOCK] * n, dtype=torch.int32) for x, n in ((q_valid, nq), (kv_valid, nk)))
    q, k = (torch.randn(batch, heads, n * BLOCK, DIM) for n in (nq, nk))
    return q, k, q_valid, kv_valid


def part_means(x, valid, sub_blocks):
    """Means over true tokens, by loops: [B, H, n * sub_blocks, D]; NaN where a part is empty."""
    size = BLOCK // sub_blocks
    out = torch.full((*x.shape[:2], len(valid) * sub_blocks, x.shape[3]), float("nan"))
    for i, n in enumerate(valid.tolist()):
        for s in range(sub_blocks):
            end = min(i * BLOCK + (s + 1) * size, i * BLOCK + n)
            if end > i * BLOCK + s * size:
                out[:, :, i * sub_blocks + s] = x[:, :, i * BLOCK + s * size : end].double().mean(2).float()
    return out


def choose(device, q, k, q_valid, kv_valid, keep, forced=None, before=0, after=0, sub_blocks=1, pitch=None, summary=False, around=None):
    """Run, with so many blocks around the candidates that are always kept; returns what was listed, by row."""
    around = around or [BLOCK] * (before + after)
    valid = torch.tensor([*around[:before], *kv_valid.tolist(), *around[before:]], dtype=torch.int32)
    keep = torch.tensor([[keep]] if isinstance(keep, int) else keep, dtype=torch.int32)
    zeroed = [part_means(x, v, sub_blocks).nan_to_num() for x, v in ((q, q_valid), (k, kv_valid))]
    counts = [part_counts(v, BLOCK, sub_blocks) for v in (q_valid, kv_valid)]
    pitch = len(valid) if pitch is None else pitch
    args = (*zeroed, *counts, valid, keep, forced)
    indices, counts, tails, bias = choose_blocks(*(x if x is None else x.to(device) for x in args), before, BLOCK, sub_blocks, 0.7, pitch, summary)
    assert indices.dtype == counts.dtype == tails.dtype == torch.int32 and indices.shape == (*counts.shape, pitch)
    rows = [row[:n].tolist() for row, n in zip(indices.flatten(0, 2).cpu(), counts.flatten().tolist())]
    for row, tail in zip(rows, tails.flatten().tolist()):
        partly = [j for j in row if valid[j] < BLOCK]
        whole = [j for j in row if valid[j] == BLOCK]
        assert row == [*whole, *partly] and whole == sorted(whole) and partly == sorted(partly) and tail == len(partly)
    return rows, bias.cpu(), valid


def brute(q, k, q_valid, kv_valid, forced, keep, sub_blocks):
    """Chosen candidates of each row, as sets."""
    batch, heads, nq, nk = *q.shape[:2], len(q_valid), len(kv_valid)
    a, b = (part_means(x, v, sub_blocks).double() for x, v in ((q, q_valid), (k, kv_valid)))
    chosen = []
    for at in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(nq)).tolist():
        n, h, i = at
        mine = [x for x in a[n, h, i * sub_blocks : (i + 1) * sub_blocks] if not x.isnan().any()]

        def score(j):
            theirs = [y for y in b[n, h, j * sub_blocks : (j + 1) * sub_blocks] if not y.isnan().any()]
            pairs = [0.7 * (x @ y).item() for x in mine for y in theirs]
            return math.log(sum(map(math.exp, pairs))) if sub_blocks > 1 else pairs[0]

        must = {j for j in range(nk) if forced is not None and forced[i, j]}
        others = sorted((j for j in range(nk) if j not in must), key=score, reverse=True)
        number = keep if isinstance(keep, int) else keep[h if len(keep) > 1 else 0][i if len(keep[0]) > 1 else 0]
        chosen.append(must | set(others[:number]))
    return chosen


@pytest.mark.parametrize("sub_blocks", [1, 4])
@pytest.mark.parametrize("keep", [0, 1, 4, 9, 50, [[1, 2, 0]], [[0], [3], [9]], [[0, 1, 2], [3, 4, 5], [6, 7, 8]]], ids=str)
def test_top_k(device, keep, sub_blocks):
    args = make()
    rows, _, _ = choose(device, *args, keep, sub_blocks=sub_blocks)
    assert [set(row) for row in rows] == brute(*args, None, keep, sub_blocks)


@pytest.mark.parametrize("keep", [0, 2, 9, [[0, 3, 1]]], ids=str)
def test_forced(device, keep):
    args, forced = make(), torch.rand(3, 9) < 0.3
    rows, _, _ = choose(device, *args, keep, forced)
    assert [set(row) for row in rows] == brute(*args, forced, keep, 1)


@pytest.mark.parametrize("sub_blocks", [1, 2, 4])
def test_around_and_partly_filled(device, sub_blocks):
    """Kept blocks on both sides; a mean divides by true counts, so that a short block is not shrunk."""
    args = make(nq=4, q_valid=[16, 16, 16, 3], kv_valid=[16, 1, 16, 16, 16, 16, 5, 16, 9])
    rows, _, _ = choose(device, *args, 3, before=3, after=2, sub_blocks=sub_blocks, around=[16, 16, 7, 16, 2])
    want = brute(*args, None, 3, sub_blocks)
    assert [set(row) for row in rows] == [{0, 1, 2, 12, 13} | {3 + j for j in each} for each in want]


def test_many_query_blocks_and_candidates(device):
    """More than one program's rows, and a number of candidates that is no power of two."""
    args = make(batch=1, heads=2, nq=21, nk=70)
    rows, _, _ = choose(device, *args, 11, before=1)
    assert [set(row) for row in rows] == [{0} | {1 + j for j in each} for each in brute(*args, None, 11, 1)]


def test_summary(device):
    args = make(kv_valid=[16, 1, 16, 16, 16, 16, 5, 16, 9])
    rows, bias, valid = choose(device, *args, 3, before=1, summary=True)
    for row, line in zip(rows, bias.flatten(0, 2)):
        kept = torch.tensor([1 + j in row for j in range(9)])
        assert line[kept].isneginf().all()
        torch.testing.assert_close(line[~kept], valid[1:][~kept].float().log(), atol=1e-5, rtol=0)


def test_pitch(device):
    rows, _, _ = choose(device, *make(), 2, before=1, after=1, pitch=4)
    assert all(len(row) == 4 for row in rows)
    rows, _, _ = choose(device, *make(), 2, pitch=40)
    assert all(len(row) == 2 for row in rows)


def test_ties_keep_the_count(device):
    q, k, *valid = make()
    rows, _, _ = choose(device, torch.ones_like(q), torch.ones_like(k), *valid, 4)
    assert all(row == [0, 1, 2, 3] for row in rows)


def test_negative_and_close_scores(device):
    """Sign, zero, and scores that bf16 could not tell apart still rank right."""
    q = torch.ones(1, 1, BLOCK, DIM)
    values = torch.tensor([-3.0, -1 - 2.0**-11, -1.0, -0.0, 1e-30, 1.0, 1 + 2.0**-11, 1 + 2.0**-10, 2.0])
    k = values.repeat_interleave(BLOCK)[None, None, :, None].expand(1, 1, 9 * BLOCK, DIM)
    valid = torch.full((9,), BLOCK, dtype=torch.int32)
    for keep in (1, 3, 4, 7, 8):
        rows, _, _ = choose(device, q, k, valid[:1], valid, keep)
        assert rows == [list(range(9 - keep, 9))]


def test_half_precision_means_are_fp32():
    """Packed in bf16, compared in fp32: means that differ by less than bf16 resolves."""
    k = torch.ones(1, 1, 9 * BLOCK, DIM).bfloat16()
    k.view(9, BLOCK, DIM)[:, 0] += (torch.arange(9) * 2.0**-7)[:, None].bfloat16()
    _, means = pack(k, None, BLOCK, 1)
    assert means.dtype == torch.float32 and (means[0, 0, 1:, 0] > means[0, 0, :-1, 0]).all()
    assert (means.bfloat16()[0, 0, 1:, 0] == means.bfloat16()[0, 0, :-1, 0]).any()


def test_wrong_sizes_are_refused():
    q = torch.zeros(1, 2, 3, DIM)
    ones = torch.ones(9, dtype=torch.int32)
    args = lambda keep, forced=None, first=0: (q, torch.zeros(1, 2, 9, DIM), ones[:3], ones, ones, keep, forced, first, BLOCK, 1, 1.0, 9, False)
    with pytest.raises(ValueError, match="keep must be"):
        choose_blocks(*args(ones[:2][None]))
    with pytest.raises(ValueError, match="forced must be"):
        choose_blocks(*args(ones[:1][None], torch.zeros(3, 8, dtype=torch.bool)))
    with pytest.raises(ValueError, match="must cover 10 blocks"):
        choose_blocks(*args(ones[:1][None], first=1))


def test_operator_is_well_formed():
    q, k, q_valid, kv_valid = make()
    keep = torch.tensor([[3]], dtype=torch.int32)
    means = [part_means(x, v, 1) for x, v in ((q, q_valid), (k, kv_valid))]
    for summary in (False, True):
        torch.library.opcheck(choose_blocks, (*means, q_valid, kv_valid, kv_valid, keep, None, 0, BLOCK, 1, 0.7, 9, summary))

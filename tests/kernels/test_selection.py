"""Selection against a brute-force top-k: exact sets, exact counts, ascending, padding without influence."""

import math

import pytest
import torch

from li_compile.kernels import select_blocks

BLOCK = 16


def make(batch=2, heads=3, nq=3, nk=9, dim=8, q_valid=None, kv_valid=None, poison=True):
    q_valid, kv_valid = (torch.tensor(x or [BLOCK] * n, dtype=torch.int32) for x, n in ((q_valid, nq), (kv_valid, nk)))
    q, k = torch.randn(batch, heads, nq * BLOCK, dim), torch.randn(batch, heads, nk * BLOCK, dim)
    for x, valid in ((q, q_valid), (k, kv_valid)):
        for i, n in enumerate(valid.tolist()):
            x[:, :, i * BLOCK + n : (i + 1) * BLOCK] = float("nan") if poison else 0
    return q, k, q_valid, kv_valid


def brute(q, k, q_valid, kv_valid, forced, candidates, keep, scale, sub_blocks):
    batch, heads, nq, nk = *q.shape[:2], q_valid.numel(), kv_valid.numel()
    size = BLOCK // sub_blocks

    def means(x, block, n):
        starts = [block * BLOCK + s for s in range(0, BLOCK, size) if s < n]
        return [x[s : min(s + size, block * BLOCK + n)].double().mean(0) for s in starts]

    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(nq):
                def score(j):
                    pairs = [scale * (a @ c).item() for a in means(q[b, h], i, int(q_valid[i])) for c in means(k[b, h], j, int(kv_valid[j]))]
                    return math.log(sum(map(math.exp, pairs))) if sub_blocks > 1 else pairs[0]

                must = {j for j in range(nk) if forced is not None and forced[i, j]}
                others = [j for j in range(nk) if j not in must and (candidates is None or candidates[i, j])]
                rows.append(sorted(must | set(sorted(others, key=score, reverse=True)[: keep if isinstance(keep, int) else keep[i]])))
    return rows


def check(args, *, forced=None, candidates=None, keep, sub_blocks=1, pitch=None):
    indices, counts = select_blocks(
        *args, block_size=BLOCK, forced=forced, candidates=candidates, keep=keep, scale=0.7, sub_blocks=sub_blocks, pitch=pitch
    )
    assert indices.dtype == counts.dtype == torch.int32
    got = [row[:n].tolist() for row, n in zip(indices.flatten(0, 2), counts.flatten().tolist())]
    assert got == brute(*args, forced, candidates, keep, 0.7, sub_blocks)
    return indices, counts


@pytest.mark.parametrize("sub_blocks", [1, 4])
@pytest.mark.parametrize("keep", [0, 1, 4, 9, 50])
def test_top_k(keep, sub_blocks):
    check(make(), keep=keep, sub_blocks=sub_blocks)


@pytest.mark.parametrize("sub_blocks", [1, 4])
@pytest.mark.parametrize("keep", [0, 2, 9, (0, 3, 1)], ids=str)
def test_forced_and_candidates(keep, sub_blocks):
    forced = torch.rand(3, 9) < 0.3
    candidates = torch.rand(3, 9) < 0.6
    check(make(), forced=forced, keep=keep, sub_blocks=sub_blocks)
    check(make(), candidates=candidates, keep=keep, sub_blocks=sub_blocks)
    check(make(), forced=forced, candidates=candidates, keep=keep, sub_blocks=sub_blocks)


@pytest.mark.parametrize("sub_blocks", [1, 4])
def test_padding_has_no_influence(sub_blocks):
    """Poisoned padding, and a mean over true counts: a short block is not shrunk."""
    check(make(q_valid=[16, 16, 3], kv_valid=[16, 1, 16, 16, 16, 16, 5, 16, 9]), keep=3, sub_blocks=sub_blocks)


def test_pitch():
    indices, _ = check(make(), keep=2, pitch=5)
    assert indices.shape[-1] == 5
    indices, _ = check(make(), forced=torch.eye(3, 9, dtype=torch.bool), keep=2, pitch=3)
    assert indices.shape[-1] == 3


def test_ties_keep_the_count():
    q, k, *valid = make(poison=False)
    indices, counts = select_blocks(torch.ones_like(q), torch.ones_like(k), *valid, block_size=BLOCK, keep=4, scale=1.0)
    assert (counts == 4).all() and (indices[..., 1:4] > indices[..., :3]).all()


def test_half_precision_scores_in_fp32():
    """Means that bf16 could not tell apart still rank right."""
    q = torch.ones(1, 1, BLOCK, 8)
    steps = 1 + torch.arange(9) * 2.0**-11  # closer than bf16 resolves
    k = torch.ones(1, 1, 9 * BLOCK, 8).bfloat16()
    k.view(9, BLOCK, 8)[:, 0] += (steps.view(9, 1) - 1) * BLOCK
    valid = torch.full((9,), BLOCK, dtype=torch.int32)
    indices, _ = select_blocks(q.bfloat16(), k, valid[:1], valid, block_size=BLOCK, keep=3, scale=1.0)
    assert indices.flatten().tolist() == [6, 7, 8]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="sub-blocks"):
        select_blocks(*make(), block_size=BLOCK, keep=1, scale=1.0, sub_blocks=3)
    with pytest.raises(ValueError, match="keep"):
        select_blocks(*make(), block_size=BLOCK, keep=(1, 2), scale=1.0)

"""The Triton kernel of selection.py, apart from it because decorating it imports Triton."""

import triton
import triton.language as tl


@triton.jit
def _ordered(x):
    """fp32 as uint32 that compare alike."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _threshold(keys, allowed, keep, ROWS: tl.constexpr):
    """The keep-th largest allowed key of each row, bit by bit from the top; 0 where there are fewer."""
    found = tl.zeros([ROWS], tl.uint32)
    bit = tl.full([ROWS], 0x80000000, tl.uint32)
    for _ in range(32):
        tried = found | bit
        above = tl.sum(((keys >= tried[:, None]) & allowed).to(tl.int32), 1)
        found = tl.where(above >= keep, tried, found)
        bit = bit >> 1
    return found


@triton.jit
def _append(ids, chosen, whole, to, tails_to, written):
    """Store ids of chosen blocks, whole ones from ``to`` on and partly filled ones from ``tails_to`` on."""
    place = tl.cumsum((chosen & whole).to(tl.int32), 1) - 1
    tl.store(to + place, ids, mask=chosen & whole & written)
    place = tl.cumsum((chosen & ~whole).to(tl.int32), 1) - 1
    tl.store(tails_to + place, ids, mask=chosen & ~whole & written)


@triton.jit
def select_kernel(
    Q_MEANS, K_MEANS, Q_COUNTS, K_COUNTS, VALID, FORCED, KEEP, SCORES, INDICES, COUNTS, TAILS, BIAS,
    heads, query_blocks, candidates, first, total, pitch, stride_keep_h, stride_keep_q, scale,
    DIM: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    AROUND: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, HAS_FORCED: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """Scores, exact top-k and lists for ROWS query blocks of one head. Grid: (query blocks / ROWS, heads, batch)."""
    scale = tl.full([], scale, tl.float32)  # ahead of time, Inductor hands in fp64
    group = tl.program_id(0)
    head = tl.program_id(1)
    line0 = (tl.program_id(2) * heads + head).to(tl.int64) * query_blocks
    dims = tl.arange(0, DIM)
    rows = group * ROWS + tl.arange(0, ROWS)

    parts = group * ROWS * SUB + tl.arange(0, ROWS * SUB)
    known = parts < query_blocks * SUB
    q = tl.load(Q_MEANS + (line0 * SUB + parts)[:, None] * DIM + dims[None, :], mask=known[:, None], other=0.0) * scale
    q_real = tl.load(Q_COUNTS + parts, mask=known, other=0) > 0
    k_means = K_MEANS + (tl.program_id(2) * heads + head).to(tl.int64) * candidates * SUB * DIM
    for start in range(0, candidates, CHUNK):
        blocks = start + tl.arange(0, CHUNK)
        there = blocks < candidates
        # Log-sum-exp over pairs of sub-block means. One product for each key sub-block: summing over them is then a matter
        # of a thread's own values, where one product with all of them side by side would need its columns shuffled.
        top = tl.full([ROWS * SUB, CHUNK], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS * SUB, CHUNK], tl.float32)
        for part in range(SUB):
            columns = blocks * SUB + part
            k = tl.load(k_means + columns.to(tl.int64)[None, :] * DIM + dims[:, None], mask=there[None, :], other=0.0)
            s = tl.dot(q, k, input_precision="tf32x3")
            if SUB > 1:
                k_real = tl.load(K_COUNTS + columns, mask=there, other=0) > 0
                s = tl.where(q_real[:, None] & k_real[None, :], s, float("-inf"))
                higher = tl.maximum(top, s)
                base = tl.where(higher == float("-inf"), 0.0, higher)
                weight = weight * tl.exp(top - base) + tl.exp(s - base)
                top = higher
            else:
                top = s
        if SUB == 1:
            scores = top
        else:
            top = top.reshape(ROWS, SUB, CHUNK)
            highest = tl.max(top, 1)
            base = tl.where(highest == float("-inf"), 0.0, highest)
            scores = tl.log(tl.sum(weight.reshape(ROWS, SUB, CHUNK) * tl.exp(top - base[:, None, :]), 1)) + base
        at = SCORES + (line0 + rows)[:, None] * candidates + blocks[None, :]
        tl.store(at, scores, mask=(rows < query_blocks)[:, None] & there[None, :])
    tl.debug_barrier()  # the scores are read again by other threads of this program

    columns = tl.arange(0, WIDTH)
    inside = columns < candidates
    size = tl.load(VALID + first + columns, mask=inside, other=0)
    whole = size == BLOCK
    around = tl.arange(0, AROUND)
    before = around < first
    before_whole = tl.load(VALID + around, mask=before, other=0) == BLOCK
    last = first + candidates + around
    after = last < total
    after_whole = tl.load(VALID + last, mask=after, other=0) == BLOCK
    wholes_before = tl.sum((before & before_whole).to(tl.int32), 0)
    wholes_after = tl.sum((after & after_whole).to(tl.int32), 0)
    for start in tl.static_range(0, ROWS, AT_ONCE):
        row = group * ROWS + start + tl.arange(0, AT_ONCE)
        written = (row < query_blocks)[:, None]
        line = line0 + row
        scores = tl.load(SCORES + line[:, None] * candidates + columns[None, :], mask=written & inside[None, :], other=0.0)
        allowed = inside[None, :] & (columns >= 0)[None, :] & (row >= 0)[:, None]
        forced = allowed & (columns < 0)[None, :]
        if HAS_FORCED:
            forced = tl.load(FORCED + row[:, None] * candidates + columns[None, :], mask=written & inside[None, :], other=0) != 0
            allowed = allowed & ~forced
        keep = tl.load(KEEP + head * stride_keep_h + row * stride_keep_q, mask=row < query_blocks, other=0)
        keys = _ordered(scores)
        least = _threshold(keys, allowed, keep, AT_ONCE)
        above = allowed & (keys > least[:, None])
        level = allowed & (keys == least[:, None])  # equal scores: the first of them
        room = keep - tl.sum(above.to(tl.int32), 1)
        kept = above | (level & (tl.cumsum(level.to(tl.int32), 1) <= room[:, None])) | forced

        wholes = wholes_before + tl.sum((kept & whole[None, :]).to(tl.int32), 1)
        tails = first - wholes_before + tl.sum((kept & ~whole[None, :]).to(tl.int32), 1)
        to = INDICES + line[:, None] * pitch
        ends = to + (wholes + wholes_after)[:, None]
        here = (row >= 0)[:, None]
        _append(here * around[None, :], here & before[None, :], here & before_whole[None, :], to, ends, written)
        _append(here * (first + columns)[None, :], kept, here & whole[None, :], to + wholes_before, ends + (first - wholes_before), written)
        _append(here * last[None, :], here & after[None, :], here & after_whole[None, :], to + wholes[:, None], ends + tails[:, None], written)
        behind = total - first - candidates
        tl.store(COUNTS + line, wholes + tails + behind, mask=row < query_blocks)
        tl.store(TAILS + line, tails + behind - wholes_after, mask=row < query_blocks)
        if SUMMARY:
            bias = tl.where(kept, float("-inf"), tl.log(tl.maximum(size, 1).to(tl.float32))[None, :])
            tl.store(BIAS + line[:, None] * candidates + columns[None, :], bias, mask=written & inside[None, :])

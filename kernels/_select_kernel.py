"""The Triton kernels of selection.py, apart from it because decorating it imports Triton."""

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
def _halves(x):
    """fp32 as the sum of two fp16: 22 bits of it, and no infinity where fp16 ends."""
    high = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    low = tl.minimum(tl.maximum(x - high.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return high, low


@triton.jit
def score_kernel(
    Q_MEANS, K_MEANS, Q_COUNTS, K_COUNTS, SCORES, query_blocks, candidates, scale,
    DIM: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of ROWS query blocks of one head. Grid: (query blocks / ROWS, splits of the candidates, batch * heads).

    Rows and columns of the products are ordered by part first, so that the parts of a block are a thread's own values,
    where it has them, and the log-sum-exp over them moves little between threads.
    """
    scale = tl.full([], scale, tl.float32)  # ahead of time, Inductor hands in fp64
    group = tl.program_id(0)
    line0 = tl.program_id(2).to(tl.int64) * query_blocks
    dims = tl.arange(0, DIM)
    row = tl.arange(0, ROWS * SUB)
    part = (group * ROWS + row % ROWS) * SUB + row // ROWS
    known = group * ROWS + row % ROWS < query_blocks
    q_high, q_low = _halves(tl.load(Q_MEANS + (line0 * SUB + part)[:, None] * DIM + dims[None, :], mask=known[:, None], other=0.0))
    q_real = tl.load(Q_COUNTS + part, mask=known, other=0) > 0
    k_means = K_MEANS + tl.program_id(2).to(tl.int64) * candidates * SUB * DIM
    column = tl.arange(0, CHUNK * SUB)
    rows = group * ROWS + tl.arange(0, ROWS)
    for start in range(tl.program_id(1) * CHUNK, candidates, CHUNK * tl.num_programs(1)):
        there = start + column % CHUNK < candidates
        place = (start + column % CHUNK) * SUB + column // CHUNK
        k_high, k_low = _halves(tl.load(k_means + place.to(tl.int64)[None, :] * DIM + dims[:, None], mask=there[None, :], other=0.0))
        s = tl.dot(q_high, k_low)
        s = tl.dot(q_low, k_high, s)
        s = tl.dot(q_high, k_high, s) * scale
        if SUB > 1:
            k_real = tl.load(K_COUNTS + place, mask=there, other=0) > 0
            s = tl.where(q_real[:, None] & k_real[None, :], s, float("-inf")).reshape(SUB, ROWS, SUB, CHUNK)
            top = tl.max(tl.max(s, 2), 0)
            base = tl.where(top == float("-inf"), 0.0, top)
            s = tl.log(tl.sum(tl.sum(tl.exp(s - base[None, :, None, :]), 2), 0)) + base
        blocks = start + tl.arange(0, CHUNK)
        at = SCORES + (line0 + rows)[:, None] * candidates + blocks[None, :]
        tl.store(at, s, mask=(rows < query_blocks)[:, None] & (blocks < candidates)[None, :])


@triton.jit
def rank_kernel(
    SCORES, VALID, FORCED, KEEP, INDICES, COUNTS, TAILS, BIAS,
    heads, query_blocks, candidates, first, total, pitch, stride_keep_h, stride_keep_q,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, AROUND: tl.constexpr, BLOCK: tl.constexpr, HAS_FORCED: tl.constexpr,
    SUMMARY: tl.constexpr,
):  # fmt: skip
    """Exact top-k and lists for ROWS query blocks of one head. Grid: (query blocks / ROWS, heads, batch)."""
    head = tl.program_id(1)
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
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    written = (row < query_blocks)[:, None]
    line = (tl.program_id(2) * heads + head).to(tl.int64) * query_blocks + row
    scores = tl.load(SCORES + line[:, None] * candidates + columns[None, :], mask=written & inside[None, :], other=0.0)
    allowed = inside[None, :] & (row >= 0)[:, None]
    forced = allowed & (columns < 0)[None, :]
    if HAS_FORCED:
        forced = tl.load(FORCED + row[:, None] * candidates + columns[None, :], mask=written & inside[None, :], other=0) != 0
        allowed = allowed & ~forced
    keep = tl.load(KEEP + head * stride_keep_h + row * stride_keep_q, mask=row < query_blocks, other=0)
    keys = _ordered(scores)
    least = _threshold(keys, allowed, keep, ROWS)
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

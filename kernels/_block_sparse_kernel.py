"""The Triton kernel of block_sparse_triton.py, apart from it because decorating it imports Triton."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _key_tile(block, inner, first, second, stride_first, stride_second, first_blocks, BLOCK: tl.constexpr, TWO: tl.constexpr):
    """Address of a tile's first row, and its row stride, in the source that holds the block."""
    if TWO:
        in_first = block < first_blocks
        local = tl.where(in_first, block, block - first_blocks).to(tl.int64) * BLOCK + inner
        stride = tl.where(in_first, stride_first, stride_second)
        if in_first:
            start = first
        else:
            start = second
        return start + local * stride, stride
    return first + (block.to(tl.int64) * BLOCK + inner) * stride_first, stride_first


@triton.jit
def _update(scores, top, total, acc, v, FIXED: tl.constexpr, precision: tl.constexpr):
    """One step of the softmax over scores in base 2 that are -inf where masked."""
    if FIXED:
        weights = tl.math.exp2(scores - top[:, None])
        total += tl.sum(weights, 1)
    else:
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: avoid inf - inf
        weights = tl.math.exp2(scores - base[:, None])
        shrink = tl.math.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        top = new_top
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=precision)
    return top, total, acc


@triton.jit
def block_sparse_kernel(
    Q, K, V, K1, V1, SUMMARY_K, SUMMARY_V, BIAS, OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, FLAGS,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n,
    stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_om,
    heads, query_blocks, tiles, pitch, first_blocks, summaries, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    TWO: tl.constexpr, TAILED: tl.constexpr, SUMMARY: tl.constexpr, MAPPED: tl.constexpr, FIXED: tl.constexpr,
    REDO: tl.constexpr, FLAGS_A_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one (batch, head) at a time against the blocks listed for their query block.

    ``scale`` has log2(e) folded in. FIXED: the softmax's reference is the row maximum of the first tile and stays, which
    saves the running maximum and the rescaling; what overflows is flagged. REDO: the running maximum, for query blocks
    whose flags are set only. Otherwise the grid has a program for each ``tile`` of ROWS queries; with REDO any number.
    """
    if REDO:
        flagged = 0
        for start in range(tl.program_id(0), tiles, 64 * tl.num_programs(0)):  # hardly ever is any: look at many at once
            tile = start + tl.arange(0, 64) * tl.num_programs(0)
            for i in tl.static_range(FLAGS_A_BLOCK):
                flagged += tl.sum(tl.load(FLAGS + tile // (BLOCK // ROWS) * FLAGS_A_BLOCK + i, mask=tile < tiles, other=0), 0)
        stop = tiles
        if flagged == 0:
            stop = 0
        for tile in range(tl.program_id(0), stop, tl.num_programs(0)):
            line = tile // (BLOCK // ROWS)
            flagged = tl.load(FLAGS + line * FLAGS_A_BLOCK)
            for i in tl.static_range(1, FLAGS_A_BLOCK):
                flagged += tl.load(FLAGS + line * FLAGS_A_BLOCK + i)
            if flagged != 0:
                _attend(tile, Q, K, V, K1, V1, SUMMARY_K, SUMMARY_V, BIAS, OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, FLAGS,
                        stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                        stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n,
                        stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_om,
                        heads, query_blocks, pitch, first_blocks, summaries, scale,
                        DIM, ROWS, KEYS, BLOCK, EXACT, TWO, TAILED, SUMMARY, MAPPED, FIXED)  # fmt: skip
    else:
        _attend(tl.program_id(0), Q, K, V, K1, V1, SUMMARY_K, SUMMARY_V, BIAS, OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, FLAGS,
                stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n,
                stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_om,
                heads, query_blocks, pitch, first_blocks, summaries, scale,
                DIM, ROWS, KEYS, BLOCK, EXACT, TWO, TAILED, SUMMARY, MAPPED, FIXED)  # fmt: skip


@triton.jit
def _attend(
    tile, Q, K, V, K1, V1, SUMMARY_K, SUMMARY_V, BIAS, OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, FLAGS,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_k1b, stride_k1h, stride_k1n, stride_v1b, stride_v1h, stride_v1n,
    stride_skb, stride_skh, stride_skn, stride_svb, stride_svh, stride_svn, stride_ob, stride_oh, stride_om,
    heads, query_blocks, pitch, first_blocks, summaries, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
    TWO: tl.constexpr, TAILED: tl.constexpr, SUMMARY: tl.constexpr, MAPPED: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    scale = tl.full([], scale, tl.float32)  # ahead of time, Inductor hands in fp64
    PARTS: tl.constexpr = BLOCK // KEYS
    TILES: tl.constexpr = BLOCK // ROWS
    precision: tl.constexpr = "ieee" if EXACT else "tf32"  # only fp32 looks at it
    rows = tl.arange(0, ROWS)
    keys = tl.arange(0, KEYS)
    dims = tl.arange(0, DIM)
    line = tile // TILES
    query_block = line % query_blocks
    head = (line // query_blocks % heads).to(tl.int64)
    batch = (line // (query_blocks * heads)).to(tl.int64)
    first = query_block * BLOCK + (tile % TILES) * ROWS

    q_at = Q + batch * stride_qb + head * stride_qh + (first + rows).to(tl.int64)[:, None] * stride_qm + dims[None, :]
    if MAPPED:  # its storage may end at the last true row
        q = tl.load(q_at, mask=(tl.load(ROWS_TO + first + rows) >= 0)[:, None], other=0.0)
    else:
        q = tl.load(q_at)
    k_first, v_first = K + batch * stride_kb + head * stride_kh, V + batch * stride_vb + head * stride_vh
    k_second, v_second = K1 + batch * stride_k1b + head * stride_k1h, V1 + batch * stride_v1b + head * stride_v1h
    count = tl.load(COUNTS + line)
    listed = INDICES + line.to(tl.int64) * pitch
    full = 0
    if TAILED:
        full = count - tl.load(TAILS + line)

    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if FIXED:
        top = tl.zeros([ROWS], tl.float32)
        if count > 0:
            block = tl.load(listed)
            at, stride = _key_tile(block, 0, k_first, k_second, stride_kn, stride_k1n, first_blocks, BLOCK, TWO)
            real = (keys < tl.load(VALID + block))[None, :]
            k = tl.load(at + keys[None, :] * stride + dims[:, None], mask=real, other=0.0)
            seen = tl.dot(q, k, input_precision=precision) * scale
            top = tl.max(tl.where(real, seen, float("-inf")), 1)
            top = tl.where(top == float("-inf"), 0.0, top)
    for step in range(full * PARTS):
        block = tl.load(listed + step // PARTS)
        inner = (step % PARTS) * KEYS
        at, stride = _key_tile(block, inner, k_first, k_second, stride_kn, stride_k1n, first_blocks, BLOCK, TWO)
        scores = tl.dot(q, tl.load(at + keys[None, :] * stride + dims[:, None]), input_precision=precision) * scale
        at, stride = _key_tile(block, inner, v_first, v_second, stride_vn, stride_v1n, first_blocks, BLOCK, TWO)
        v = tl.load(at + keys[:, None] * stride + dims[None, :])
        top, total, acc = _update(scores, top, total, acc, v, FIXED, precision)
    for step in range(full * PARTS, count * PARTS):
        block = tl.load(listed + step // PARTS)
        inner = (step % PARTS) * KEYS
        real = tl.load(VALID + block) - inner  # keys of this tile that are no padding; may be negative or beyond KEYS
        at, stride = _key_tile(block, inner, k_first, k_second, stride_kn, stride_k1n, first_blocks, BLOCK, TWO)
        k = tl.load(at + keys[None, :] * stride + dims[:, None], mask=(keys < real)[None, :], other=0.0)
        scores = tl.where((keys < real)[None, :], tl.dot(q, k, input_precision=precision) * scale, float("-inf"))
        at, stride = _key_tile(block, inner, v_first, v_second, stride_vn, stride_v1n, first_blocks, BLOCK, TWO)
        v = tl.load(at + keys[:, None] * stride + dims[None, :], mask=(keys < real)[:, None], other=0.0)
        top, total, acc = _update(scores, top, total, acc, v, FIXED, precision)
    if SUMMARY:
        k_head = SUMMARY_K + batch * stride_skb + head * stride_skh
        v_head = SUMMARY_V + batch * stride_svb + head * stride_svh
        for start in range(0, summaries, KEYS):
            here = start + keys
            known = here < summaries
            bias = tl.load(BIAS + line.to(tl.int64) * summaries + here, mask=known, other=float("-inf"))
            k = tl.load(k_head + here[None, :] * stride_skn + dims[:, None], mask=known[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision=precision) * scale
            scores = tl.where((bias == float("-inf"))[None, :], float("-inf"), scores + (bias * LOG2E)[None, :])
            v = tl.load(v_head + here[:, None] * stride_svn + dims[None, :], mask=known[:, None], other=0.0)
            top, total, acc = _update(scores, top, total, acc, v, FIXED, precision)

    if FIXED:  # 0 where all is finite, else NaN; several programs of a block may say the same
        overflow = tl.sum(acc - acc, 1) + (total - total)
        if tl.max((overflow != 0.0).to(tl.int32), 0) != 0:
            tl.store(FLAGS + line, 1)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if LSE is not None:
        lse = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN2)
        tl.store(LSE + line.to(tl.int64) * BLOCK + (tile % TILES) * ROWS + rows, lse)
    to = first + rows
    written = to >= 0
    if MAPPED:
        to = tl.load(ROWS_TO + to)
        written = to >= 0
    out = OUT + batch * stride_ob + head * stride_oh + to.to(tl.int64)[:, None] * stride_om + dims[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=written[:, None])

"""The Triton kernel of block_sparse_triton.py, apart from it because decorating it imports Triton."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_sparse_kernel(
    Q, K, V, OUT, LSE, INDICES, COUNTS, VALID,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    heads, query_blocks, pitch, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one (batch, head) against the blocks listed for their query block.

    Grid: (queries / ROWS, heads, batch). ``scale`` has log2(e) folded in. Offsets over batch, heads and blocks are int64.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    keys = tl.arange(0, KEYS)
    dims = tl.arange(0, DIM)
    PER_BLOCK: tl.constexpr = BLOCK // KEYS
    precision: tl.constexpr = "ieee" if EXACT else "tf32"  # only fp32 looks at it

    first = tile.to(tl.int64) * ROWS
    q = tl.load(Q + batch * stride_qb + head * stride_qh + first * stride_qm + rows[:, None] * stride_qm + dims[None, :])
    k_head = K + batch * stride_kb + head * stride_kh + keys[None, :] * stride_kn + dims[:, None]
    v_head = V + batch * stride_vb + head * stride_vh + keys[:, None] * stride_vn + dims[None, :]

    line = (batch * heads + head) * query_blocks + tile // (BLOCK // ROWS)
    count = tl.load(COUNTS + line)
    indices = INDICES + line * pitch

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for step in range(count * PER_BLOCK):
        block = tl.load(indices + step // PER_BLOCK)
        inner = (step % PER_BLOCK) * KEYS
        real = tl.load(VALID + block) - inner  # keys of this tile that are no padding; may be negative or beyond KEYS
        offset = block.to(tl.int64) * BLOCK + inner
        k = tl.load(k_head + offset * stride_kn)
        scores = tl.dot(q, k, input_precision=precision)
        scores = tl.where((keys < real)[None, :], scores * scale, float("-inf"))  # drops NaN of poisoned padding too
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: avoid inf - inf
        weights = tl.math.exp2(scores - base[:, None])
        shrink = tl.math.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = tl.load(v_head + offset * stride_vn, mask=(keys < real)[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=precision)
        top = new_top

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN2)
    out_row = ((batch * heads + head) * query_blocks * BLOCK + first) + rows  # OUT and LSE are contiguous
    tl.store(OUT + out_row[:, None] * DIM + dims[None, :], acc.to(OUT.dtype.element_ty))
    tl.store(LSE + out_row, lse)

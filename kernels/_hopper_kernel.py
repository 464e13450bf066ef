"""The Gluon kernel of block_sparse_hopper.py, apart from it because decorating it imports Triton.

A producer warp fetches tiles of K and V by TMA; one consumer warp group for each 64 query rows multiplies them (wgmma).
Persistent: a program takes every ``num_programs``-th query block, and the producer runs ahead into the next one while the
consumers finish the last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _place(tile, query_blocks, heads):
    """Query blocks run fastest: programs that run together share a head's K and V in the L2 cache."""
    return tile % query_blocks, (tile // query_blocks) % heads, tile // (query_blocks * heads)


@gluon.jit
def _fetch(first, second, first_blocks, block, batch, head, offset, barrier, buffer, BLOCK: gl.constexpr, TWO: gl.constexpr):
    """Start the copy of a tile of K or V from the source that holds the block."""
    if TWO:
        if block < first_blocks:
            tma.async_copy_global_to_shared(first, [batch, head, block * BLOCK + offset, 0], barrier, buffer)
        else:
            tma.async_copy_global_to_shared(second, [batch, head, (block - first_blocks) * BLOCK + offset, 0], barrier, buffer)
    else:
        tma.async_copy_global_to_shared(first, [batch, head, block * BLOCK + offset, 0], barrier, buffer)


@gluon.jit
def _producer(buffers, barriers, sources, pointers, numbers, BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
              STAGES: gl.constexpr, QUERIES: gl.constexpr, GROUPS: gl.constexpr, TWO: gl.constexpr, SUMMARY: gl.constexpr,
              MAPPED: gl.constexpr, CLEAN: gl.constexpr):  # fmt: skip
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = barriers
    q_source, k_source, v_source, k_second, v_second, k_summary, v_summary = sources
    OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS = pointers
    scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om = numbers
    PARTS: gl.constexpr = BLOCK // KEYS
    step = 0
    taken = 0
    fixed = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query_block, head, batch = _place(tile, query_blocks, heads)
        count = gl.load(COUNTS + tile)
        rest = 0
        if SUMMARY:
            rest = (summaries + KEYS - 1) // KEYS
        if count + rest > 0:
            slot = taken % QUERIES
            mbarrier.wait(q_empty.index(slot), ((taken // QUERIES) & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), q_source.block_type.nbytes * GROUPS)
            for group in gl.static_range(GROUPS):
                tma.async_copy_global_to_shared(q_source, [batch, head, query_block * BLOCK + group * 64, 0], q_full.index(slot),
                                                q_smem.index(slot * GROUPS + group))  # fmt: skip
            taken += 1
            listed = INDICES + tile.to(gl.int64) * pitch
            full = count - gl.load(TAILS + tile)
            for i in range(count):
                block = gl.load(listed + i)
                for part in gl.static_range(PARTS):
                    stage = step % STAGES
                    phase = ((step // STAGES) & 1) ^ 1
                    mbarrier.wait(k_empty.index(stage), phase)
                    mbarrier.expect(k_full.index(stage), k_source.block_type.nbytes)
                    _fetch(k_source, k_second, first_blocks, block, batch, head, part * KEYS, k_full.index(stage), k_smem.index(stage), BLOCK, TWO)
                    mbarrier.wait(v_empty.index(stage), phase)
                    if CLEAN:
                        mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
                        _fetch(v_source, v_second, first_blocks, block, batch, head, part * KEYS, v_full.index(stage), v_smem.index(stage), BLOCK, TWO)
                    else:
                        if i < full:
                            mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
                            _fetch(v_source, v_second, first_blocks, block, batch, head, part * KEYS, v_full.index(stage), v_smem.index(stage), BLOCK, TWO)
                        else:  # padding may be NaN, and 0 * NaN is NaN: overwrite it before the consumers see the tile
                            mbarrier.expect(v_raw, v_source.block_type.nbytes)
                            _fetch(v_source, v_second, first_blocks, block, batch, head, part * KEYS, v_raw, v_smem.index(stage), BLOCK, TWO)
                            mbarrier.wait(v_raw, fixed & 1)
                            fixed += 1
                            real = gl.load(VALID + block) - part * KEYS
                            _zero_from(v_smem.index(stage).reshape((KEYS, DIM)), real, KEYS, DIM)
                            fence_async_shared()
                            mbarrier.arrive(v_full.index(stage), count=1)
                    step += 1
            if SUMMARY:
                for i in range(rest):
                    stage = step % STAGES
                    phase = ((step // STAGES) & 1) ^ 1
                    mbarrier.wait(k_empty.index(stage), phase)
                    mbarrier.expect(k_full.index(stage), k_source.block_type.nbytes)
                    tma.async_copy_global_to_shared(k_summary, [batch, head, i * KEYS, 0], k_full.index(stage), k_smem.index(stage))
                    mbarrier.wait(v_empty.index(stage), phase)
                    mbarrier.expect(v_full.index(stage), v_source.block_type.nbytes)
                    tma.async_copy_global_to_shared(v_summary, [batch, head, i * KEYS, 0], v_full.index(stage), v_smem.index(stage))
                    step += 1


@gluon.jit
def _zero_from(tile, real, KEYS: gl.constexpr, DIM: gl.constexpr):
    """Zero the rows of a shared tile from row ``real`` on; one warp, eight rows at a time."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (DIM // 8), DIM // 8], [1, 1], [1, 0])
    for start in gl.static_range(0, KEYS, 8):
        if start + 8 > real:
            part = tile.slice(start, 8)
            rows = start + gl.arange(0, 8, gl.SliceLayout(1, LAYOUT))
            values = part.load(LAYOUT)
            part.store(gl.where((rows < real)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _row_sums(p, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Sums over the registers of each thread only, [ROWS, 4]: the four threads of a row are added once a query block."""
    return gl.sum(gl.sum(p.reshape((ROWS, KEYS // 8, 4, 2)), 3), 1)


@gluon.jit
def _masked(s, i, columns, listed, listed_tiles, VALID, bias_row, summaries, KEYS: gl.constexpr, PARTS: gl.constexpr,
            SUMMARY: gl.constexpr):  # fmt: skip
    """Scores of the i-th tile with padding at -inf or, for a tile of summaries, with its bias."""
    if SUMMARY:
        real = KEYS
        if i < listed_tiles:
            real = gl.load(VALID + gl.load(listed + i // PARTS)) - (i % PARTS) * KEYS
        s = gl.where((columns < real)[None, :], s, float("-inf"))
        if i >= listed_tiles:
            at = (i - listed_tiles) * KEYS + columns
            bias = gl.load(bias_row + at, mask=at < summaries, other=float("-inf"))
            s = gl.where((bias == float("-inf"))[None, :], float("-inf"), s + (bias * LOG2E)[None, :])
    else:
        real = gl.load(VALID + gl.load(listed + i // PARTS)) - (i % PARTS) * KEYS
        s = gl.where((columns < real)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _consumer(GROUP: gl.constexpr, buffers, barriers, pointers, numbers, BLOCK: gl.constexpr, KEYS: gl.constexpr,
              DIM: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, GROUPS: gl.constexpr, SUMMARY: gl.constexpr,
              MAPPED: gl.constexpr):  # fmt: skip
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw = barriers
    OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS = pointers
    scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om = numbers
    ROWS: gl.constexpr = 64
    PARTS: gl.constexpr = BLOCK // KEYS
    dtype: gl.constexpr = q_smem.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=VALUES, k_width=2)
    PER_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, VALUES)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    zeros = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    step = 0
    taken = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        query_block, head, batch = _place(tile, query_blocks, heads)
        count = gl.load(COUNTS + tile)
        listed_tiles = count * PARTS
        all_tiles = listed_tiles
        if SUMMARY:
            all_tiles += (summaries + KEYS - 1) // KEYS
        # The softmax's reference is the row maximum of the first tile and stays: no running maximum, no rescaling. What a
        # later score would make overflow is flagged and computed again by the kernel with the running maximum.
        base = gl.zeros([ROWS], gl.float32, PER_ROW)
        total = _row_sums(zeros, ROWS, KEYS)
        acc = gl.zeros([ROWS, DIM], gl.float32, VALUES)
        if all_tiles > 0:
            listed = INDICES + tile.to(gl.int64) * pitch
            full = (count - gl.load(TAILS + tile)) * PARTS
            slot = taken % QUERIES
            mbarrier.wait(q_full.index(slot), (taken // QUERIES) & 1)
            q = q_smem.index(slot * GROUPS + GROUP).reshape((ROWS, DIM))
            # The first tile is peeled off whatever it is: where the first product of q stood behind a branch, the compiler
            # (Triton 3.6) made q's descriptors in that branch only. test_aot.py looks for such descriptors.
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            scores = warpgroup_mma(q, k_smem.index(stage).reshape((KEYS, DIM)).permute((1, 0)), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[scores]) * scale
            mbarrier.arrive(k_empty.index(stage), count=1)
            s = _masked(s, 0, columns, listed, listed_tiles, VALID, BIAS + tile.to(gl.int64) * summaries, summaries, KEYS, PARTS, SUMMARY)
            base = gl.max(s, 1)
            base = gl.where(base == float("-inf"), 0.0, base)
            # Kept in fp32 and rounded just before use, behind the next product: as bf16 it would be carried from
            # iteration to iteration in halves of registers and packed again each time.
            p = gl.exp2(s - base[:, None])
            total = _row_sums(p, ROWS, KEYS)
            for i in range(1, full):
                last = step % STAGES
                last_phase = (step // STAGES) & 1
                step += 1
                stage = step % STAGES
                mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
                scores = warpgroup_mma(q, k_smem.index(stage).reshape((KEYS, DIM)).permute((1, 0)), zeros, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(last), last_phase)
                weights = gl.convert_layout(p.to(dtype), WEIGHTS)
                attended = warpgroup_mma(weights, v_smem.index(last).reshape((KEYS, DIM)), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                p = gl.exp2(s * scale - base[:, None])
                total += _row_sums(p, ROWS, KEYS)
                acc, weights = warpgroup_mma_wait(0, deps=[attended, weights])
                mbarrier.arrive(v_empty.index(last), count=1)
            stage = step % STAGES
            mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
            attended = warpgroup_mma(gl.convert_layout(p.to(dtype), WEIGHTS), v_smem.index(stage).reshape((KEYS, DIM)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[attended])
            mbarrier.arrive(v_empty.index(stage), count=1)
            step += 1
            # Partly filled blocks and block summaries: few, so one after the other; the other group fills the gaps.
            for i in range(gl.maximum(full, 1), all_tiles):
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(k_full.index(stage), phase)
                scores = warpgroup_mma(q, k_smem.index(stage).reshape((KEYS, DIM)).permute((1, 0)), zeros, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[scores]) * scale
                mbarrier.arrive(k_empty.index(stage), count=1)
                s = _masked(s, i, columns, listed, listed_tiles, VALID, BIAS + tile.to(gl.int64) * summaries, summaries, KEYS, PARTS, SUMMARY)
                p = gl.exp2(s - base[:, None])
                total += _row_sums(p, ROWS, KEYS)
                mbarrier.wait(v_full.index(stage), phase)
                attended = warpgroup_mma(gl.convert_layout(p.to(dtype), WEIGHTS), v_smem.index(stage).reshape((KEYS, DIM)), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[attended])
                mbarrier.arrive(v_empty.index(stage), count=1)
                step += 1
            mbarrier.arrive(q_empty.index(slot), count=1)
            taken += 1
        sums = gl.convert_layout(gl.sum(total, 1), PER_ROW)
        overflow = gl.convert_layout(gl.sum(acc - acc, 1), PER_ROW) + (sums - sums)  # 0 where all is finite, else NaN
        gl.store(FLAGS + tile * GROUPS + GROUP, gl.max((overflow != 0.0).to(gl.int32), 0))
        empty = sums == 0.0
        acc = acc * gl.convert_layout(1.0 / gl.where(empty, 1.0, sums), OUT_ROW)[:, None]
        lse = gl.where(empty, float("-inf"), (base + gl.log2(gl.where(empty, 1.0, sums))) * LN2)
        first = query_block * BLOCK + GROUP * ROWS
        packed = (batch * heads + head).to(gl.int64) * (query_blocks * BLOCK) + first
        gl.store(LSE + packed + gl.arange(0, ROWS, PER_ROW), lse)
        rows = first + gl.arange(0, ROWS, OUT_ROW)
        written = rows >= 0
        if MAPPED:
            rows = gl.load(ROWS_TO + rows)
            written = rows >= 0
        out = OUT + batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh + rows.to(gl.int64)[:, None] * stride_om
        dims = gl.arange(0, DIM, gl.SliceLayout(0, VALUES))
        gl.store(out + dims[None, :], acc.to(dtype), mask=written[:, None])


@gluon.jit
def _first_group(buffers, barriers, sources, pointers, numbers, BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
                 STAGES: gl.constexpr, QUERIES: gl.constexpr, GROUPS: gl.constexpr, TWO: gl.constexpr, SUMMARY: gl.constexpr,
                 MAPPED: gl.constexpr, CLEAN: gl.constexpr):  # fmt: skip
    _consumer(0, buffers, barriers, pointers, numbers, BLOCK, KEYS, DIM, STAGES, QUERIES, GROUPS, SUMMARY, MAPPED)


@gluon.jit
def _second_group(buffers, barriers, sources, pointers, numbers, BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
                  STAGES: gl.constexpr, QUERIES: gl.constexpr, GROUPS: gl.constexpr, TWO: gl.constexpr, SUMMARY: gl.constexpr,
                  MAPPED: gl.constexpr, CLEAN: gl.constexpr):  # fmt: skip
    _consumer(1, buffers, barriers, pointers, numbers, BLOCK, KEYS, DIM, STAGES, QUERIES, GROUPS, SUMMARY, MAPPED)


@gluon.jit
def hopper_kernel(
    q_source, k_source, v_source, k_second, v_second, k_summary, v_summary,
    OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS,
    scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om,
    BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    TWO: gl.constexpr, SUMMARY: gl.constexpr, MAPPED: gl.constexpr, CLEAN: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All query blocks of [batch, heads]; arguments as in block_sparse_hopper.py, None what there is not. ``scale`` has log2(e) folded in."""
    GROUPS: gl.constexpr = BLOCK // 64
    q_smem = gl.allocate_shared_memory(q_source.dtype, [QUERIES * GROUPS, 1, 1, 64, DIM], q_source.layout)
    k_smem = gl.allocate_shared_memory(k_source.dtype, [STAGES, 1, 1, KEYS, DIM], k_source.layout)
    v_smem = gl.allocate_shared_memory(v_source.dtype, [STAGES, 1, 1, KEYS, DIM], v_source.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_raw = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    mbarrier.init(v_raw, count=1)
    fence_async_shared()
    # Written out three times: a tuple that is given a name turns its constexpr members into tensors.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_first_group, ((q_smem, k_smem, v_smem), (q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw), (q_source, k_source, v_source, k_second, v_second, k_summary, v_summary), (OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS), (scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om), BLOCK, KEYS, DIM, STAGES, QUERIES, GROUPS, TWO, SUMMARY, MAPPED, CLEAN)),
                (_second_group, ((q_smem, k_smem, v_smem), (q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw), (q_source, k_source, v_source, k_second, v_second, k_summary, v_summary), (OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS), (scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om), BLOCK, KEYS, DIM, STAGES, QUERIES, GROUPS, TWO, SUMMARY, MAPPED, CLEAN)),
                (_producer, ((q_smem, k_smem, v_smem), (q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw), (q_source, k_source, v_source, k_second, v_second, k_summary, v_summary), (OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS), (scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om), BLOCK, KEYS, DIM, STAGES, QUERIES, GROUPS, TWO, SUMMARY, MAPPED, CLEAN)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_first_group, ((q_smem, k_smem, v_smem), (q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw), (q_source, k_source, v_source, k_second, v_second, k_summary, v_summary), (OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS), (scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om), BLOCK, KEYS, DIM, STAGES, QUERIES, GROUPS, TWO, SUMMARY, MAPPED, CLEAN)),
                (_producer, ((q_smem, k_smem, v_smem), (q_full, q_empty, k_full, k_empty, v_full, v_empty, v_raw), (q_source, k_source, v_source, k_second, v_second, k_summary, v_summary), (OUT, LSE, ROWS_TO, INDICES, COUNTS, TAILS, VALID, BIAS, FLAGS), (scale, heads, query_blocks, tiles, pitch, first_blocks, summaries, stride_ob, stride_oh, stride_om), BLOCK, KEYS, DIM, STAGES, QUERIES, GROUPS, TWO, SUMMARY, MAPPED, CLEAN)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip

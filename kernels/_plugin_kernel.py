"""The Triton kernel of plugin_ptx.py, apart from it because decorating it imports Triton."""

import triton
import triton.language as tl

from ._block_sparse_kernel import LOG2E, _attend


@triton.jit
def block_sparse_plugin_kernel(
    Q, K, V, CURRENT_K, CURRENT_V, INDICES, COUNTS, TAILS, VALID, ROWS_TO, SCALE, OUT,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERY_BLOCKS: tl.constexpr, PITCH: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one (batch, head) a program, with the running maximum: there is one launch, and so nobody who would mend an overflow.

    QUERIES, FIRST, SECOND: rows of q, of the first and of the second source. All tensors are contiguous, and OUT is [B, QUERIES, HEADS, DIM].
    """
    _attend(tl.program_id(0), Q, K, V, CURRENT_K, CURRENT_V, K, V, None, OUT, None, ROWS_TO, INDICES, COUNTS, TAILS, VALID, None,
            HEADS * QUERIES * DIM, QUERIES * DIM, DIM, HEADS * FIRST * DIM, FIRST * DIM, DIM, HEADS * FIRST * DIM, FIRST * DIM, DIM,
            HEADS * SECOND * DIM, SECOND * DIM, DIM, HEADS * SECOND * DIM, SECOND * DIM, DIM, 0, 0, 0, 0, 0, 0,
            QUERIES * HEADS * DIM, DIM, HEADS * DIM, HEADS, QUERY_BLOCKS, PITCH, FIRST_BLOCKS, 0, tl.load(SCALE) * LOG2E,
            DIM, ROWS, KEYS, BLOCK, EXACT, TWO, True, False, True, False)  # fmt: skip

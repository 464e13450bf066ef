"""The Triton kernel of pack.py, apart from it because decorating it imports Triton."""

import triton
import triton.language as tl


@triton.jit
def _rotate(x, cos0, cos1, sin0, sin1, ROWS: tl.constexpr, DIM: tl.constexpr):
    """RoPE on interleaved pairs: x cos + (-x1, x0) sin."""
    x0, x1 = tl.split(x.reshape(ROWS, DIM // 2, 2))
    return tl.join(x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1).reshape(ROWS, DIM)


@triton.jit
def _project(x, MATRIX, at, real, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Each group of four channels times its row's 4 x 4 matrix (PRoPE)."""
    even, odd = tl.split(x.reshape(ROWS, DIM // 4, 2, 2))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    y0 = _row(MATRIX, at, real, x0, x1, x2, x3)
    y1 = _row(MATRIX + 4, at, real, x0, x1, x2, x3)
    y2 = _row(MATRIX + 8, at, real, x0, x1, x2, x3)
    y3 = _row(MATRIX + 12, at, real, x0, x1, x2, x3)
    return tl.join(tl.join(y0, y2), tl.join(y1, y3)).reshape(ROWS, DIM)


@triton.jit
def _row(MATRIX, at, real, x0, x1, x2, x3):
    y = tl.load(MATRIX + at, mask=real, other=0.0).to(tl.float32)[:, None] * x0
    y += tl.load(MATRIX + at + 1, mask=real, other=0.0).to(tl.float32)[:, None] * x1
    y += tl.load(MATRIX + at + 2, mask=real, other=0.0).to(tl.float32)[:, None] * x2
    y += tl.load(MATRIX + at + 3, mask=real, other=0.0).to(tl.float32)[:, None] * x3
    return y


@triton.jit
def _write(y, OUT, MEANS, slots, real, part, count, DIM: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr, AVERAGED: tl.constexpr):
    dims = tl.arange(0, DIM)
    stored = y.to(OUT.dtype.element_ty)  # rows past the end were loaded as zeros and stay zero under all that was done
    if TOKENS:
        at = OUT + slots.to(tl.int64)[:, None] * DIM + dims[None, :]
        if PADDED:
            tl.store(at, stored)
        else:
            tl.store(at, stored, mask=real[:, None])
    if AVERAGED:
        mean = tl.sum(stored.to(tl.float32), 0) / tl.maximum(count, 1)
        tl.store(MEANS + part.to(tl.int64) * DIM + dims, mean)


@triton.jit
def pack_kernel(
    X, ORDER, NORM, COS, SIN, CAMERA, OUT, MEANS,
    stride_xb, stride_xh, stride_xl, stride_ob, stride_oh, stride_mb, stride_mh, stride_cb,
    batch, length, tokens_a_frame, eps,
    DIM: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, ORDERED: tl.constexpr, NORMED: tl.constexpr,
    ROTATED: tl.constexpr, PROJECTED: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr, AVERAGED: tl.constexpr,
):  # fmt: skip
    """One part of a block (ROWS tokens), HEADS heads of it. Grid: (heads / HEADS, parts, batch). TOKENS: what becomes of them is written, if
    PADDED with zeros to the end of the part. AVERAGED: so is their mean.

    Heads run fastest: in a model's [B, L, H, D] memory they lie side by side, so that programs which run together read
    whole pages.
    """
    eps = tl.full([], eps, tl.float32)  # ahead of time, Inductor hands in fp64
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    slots = part * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    real = slots < length
    source = slots
    if ORDERED:
        source = tl.load(ORDER + slots, mask=real, other=0).to(tl.int32)
    count = tl.minimum(tl.maximum(length - part * ROWS, 0), ROWS)
    if ROTATED:
        table = source[:, None] * DIM + dims[None, :]
        cos0, cos1 = tl.split(tl.load(COS + table, mask=real[:, None], other=0.0).to(tl.float32).reshape(ROWS, DIM // 2, 2))
        sin0, sin1 = tl.split(tl.load(SIN + table, mask=real[:, None], other=0.0).to(tl.float32).reshape(ROWS, DIM // 2, 2))
    for i in tl.static_range(HEADS):
        head = (tl.program_id(0) * HEADS + i).to(tl.int64)
        at = X + b * stride_xb + head * stride_xh + source.to(tl.int64)[:, None] * stride_xl
        given = tl.load(at + dims[None, :], mask=real[:, None], other=0.0)
        x = given.to(tl.float32)
        if NORMED:
            x = x * tl.math.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
            x = x.to(given.dtype).to(tl.float32) * tl.load(NORM + dims).to(tl.float32)[None, :]
        y = x
        if ROTATED:
            y = _rotate(x, cos0, cos1, sin0, sin1, ROWS, DIM)
        _write(y, OUT + b * stride_ob + head * stride_oh, MEANS + b * stride_mb + head * stride_mh, slots, real, part, count, DIM, TOKENS,
               PADDED, AVERAGED)  # fmt: skip
        if PROJECTED:
            second = b + batch
            y = _project(x, CAMERA + b * stride_cb, source // tokens_a_frame * 16, real, ROWS, DIM)
            _write(y, OUT + second * stride_ob + head * stride_oh, MEANS + second * stride_mb + head * stride_mh, slots, real, part, count, DIM, TOKENS,
                   PADDED, AVERAGED)  # fmt: skip

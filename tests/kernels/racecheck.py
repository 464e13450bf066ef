"""What compute-sanitizer's racecheck says of the Hopper kernel, beside a textbook kernel of a dozen lines::

    compute-sanitizer --tool racecheck python tests/kernels/racecheck.py textbook     # two consumers and a producer pass two barriers to and fro
    compute-sanitizer --tool racecheck python tests/kernels/racecheck.py alone        # the same warps without barriers
    compute-sanitizer --tool racecheck python tests/kernels/racecheck.py ours 128     # block size
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _write(X, at, n):
    total = 0
    for i in range(n):
        total += gl.load(X + 16 + (total + i) % 7)
    gl.store(X + at, total)


@gluon.jit
def _first(X, n):
    _write(X, 0, n)


@gluon.jit
def _second(X, n):
    _write(X, 1, n)


@gluon.jit
def _third(X, n):
    _write(X, 2, n)


@gluon.jit
def alone(X, n):
    gl.warp_specialize([(_first, (X, n)), (_second, (X, n)), (_third, (X, n))], [4, 1], [240, 24])


@gluon.jit
def _consume(X, barriers, at, n):
    for i in range(n):
        mbarrier.wait(barriers.index(0), i & 1)
        mbarrier.arrive(barriers.index(1), count=1)
    gl.store(X + at, n)


@gluon.jit
def _first_consumer(X, barriers, n):
    _consume(X, barriers, 0, n)


@gluon.jit
def _second_consumer(X, barriers, n):
    _consume(X, barriers, 1, n)


@gluon.jit
def _produce(X, barriers, n):
    for i in range(n):
        mbarrier.wait(barriers.index(1), (i & 1) ^ 1)
        mbarrier.arrive(barriers.index(0), count=1)
    gl.store(X + 2, n)


@gluon.jit
def textbook(X, n):
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barriers.index(0), count=1)
    mbarrier.init(barriers.index(1), count=2)
    fence_async_shared()
    gl.warp_specialize([(_first_consumer, (X, barriers, n)), (_second_consumer, (X, barriers, n)), (_produce, (X, barriers, n))], [4, 1], [240, 24])


def ours(size: int) -> None:
    from li_compile.kernels import block_sparse_attention, use_provider

    q, k, v = (torch.randn(1, 1, n * size, 128, device="cuda", dtype=torch.bfloat16) for n in (2, 4, 4))
    lists = torch.arange(4, device="cuda", dtype=torch.int32).repeat(1, 1, 2, 1)
    counts = torch.full((1, 1, 2), 4, device="cuda", dtype=torch.int32)
    valid = torch.tensor([size] * 3 + [7], device="cuda", dtype=torch.int32)
    with use_provider("hopper"):
        block_sparse_attention(q, k, v, lists, counts, valid, size, 0.1, torch.ones_like(counts))


if __name__ == "__main__":
    if sys.argv[1] == "ours":
        ours(int(sys.argv[2]))
    else:
        {"alone": alone, "textbook": textbook}[sys.argv[1]][(1,)](torch.zeros(64, dtype=torch.int32, device="cuda"), 50, num_warps=4, maxnreg=168)
    torch.cuda.synchronize()

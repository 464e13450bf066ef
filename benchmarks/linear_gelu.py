"""A linear layer with tanh GELU: ours beside Inductor's product and fused activation, and beside the product alone, on this GPU.

    python benchmarks/linear_gelu.py

CUDA graph replays, medians of rounds in turn; errors are relative L2 from fp32. The sizes are those of HY-WorldPlay's step, of its encodings
of 8 and 12 latents, of Matrix-Game-3.0, and a small one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
import typer

from li_compile.kernels import linear_gelu

SIZES = ((6240, 2048, 8192), (12480, 2048, 8192), (18720, 2048, 8192), (17600, 3072, 14336), (1000, 2048, 8192))
CALLS = 10  # in a graph


def replayed(call: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """Seconds of a call, by a graph of several."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()

    def once() -> float:
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / CALLS

    return once


def main(rounds: int = 7, dtype: str = "bfloat16") -> None:
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    two = torch.compile(lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}")
    print("| rows, in, out | linear alone ms | Inductor's two ms | ours ms | ratio | error, two | error, ours |\n|---|---:|---:|---:|---:|---:|---:|")
    for rows, inner, outer in SIZES:
        given = [x.to("cuda", getattr(torch, dtype)) for x in (torch.randn(rows, inner), torch.randn(outer, inner) / inner**0.5, torch.randn(outer))]
        want = F.gelu(F.linear(*(x.float() for x in given)), approximate="tanh")
        ways = [lambda: F.linear(*given), lambda: two(*given), lambda: linear_gelu(*given)]
        timers = [replayed(way) for way in ways]
        taken = [statistics.median(times) for times in zip(*([timer() for timer in timers] for _ in range(rounds)))]
        errors = [((way().float() - want).norm() / want.norm()).item() for way in ways[1:]]
        print(f"| {rows}, {inner}, {outer} | {' | '.join(f'{t:.3f}' for t in taken)} | {taken[1] / taken[2]:.2f}x | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)


if __name__ == "__main__":
    typer.run(main)

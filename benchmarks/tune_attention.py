"""Measure launch configurations of the block-sparse attention kernels on this GPU and write kernels/tuned.json.

    python benchmarks/tune_attention.py

For each kernel, head size and block size: every candidate is compiled (in processes beside each other; one that needs too
much shared memory is out), checked against fp32 attention over the same blocks, and timed in turn with the others at
HY-WorldPlay's decode shape with 12 context latents; the least median wins, an earlier candidate where two are within half
a percent. Entries of other architectures stay as they are in the file.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import pathlib
import statistics
from typing import Annotated

import torch
import triton
import typer
from attention import Case, Inputs, event_times  # beside this file
from rich.console import Console
from rich.table import Table

from li_compile.kernels import block_sparse_attention, tuning, use_provider

FILE = pathlib.Path(__file__).parents[1] / "kernels" / tuning.TABLE
SHAPES = [(128, 128), (128, 64), (64, 128), (64, 64)]  # head_dim, block_size


def candidates(kernel: str, block: int) -> list[dict[str, int]]:
    """The rule's choice need not be here: it is measured too, as "rule"."""
    if kernel == "hopper":
        return [{"keys": k, "stages": s, "queries": q} for k, s, q in itertools.product((64, 128), (3, 4, 5, 6), (1, 2)) if k <= block]
    tiles = [(rows, keys) for rows, keys in itertools.product((64, 128), (32, 64, 128)) if max(rows, keys) <= block]
    return [{"rows": r, "keys": k, "num_warps": r // 16, "num_stages": s} for (r, k), s in itertools.product(tiles, (2, 3, 4, 5, 6))]


def inputs(dim: int, block: int) -> Inputs:
    tile = (4, 8, 4) if block == 128 else (4, 4, 4)
    return Inputs(Case("tune", 1, 16, dim, 30, 52, tile, block, 879, 12, 4, 0.175), "cuda", torch.bfloat16)


def runner(kernel: str, x: Inputs, launch: dict[str, int] | None):
    """launch: None for what the kernel's own rule says."""
    capability = 10 * torch.cuda.get_device_capability()[0]

    def run():
        with tuning.trial(kernel, capability, x.case.dim, x.case.block, launch), use_provider(kernel):
            return block_sparse_attention(x.blocks_q, x.blocks_k, x.blocks_v, x.indices, x.counts, x.valid, x.case.block, x.scale, x.tails)[0]

    return run


def prepare(kernel: str, dim: int, block: int, launch: dict[str, int]) -> str | None:
    """Compile a candidate (Triton keeps it on disk for the other processes) and check it; why it is out, or None."""
    x = inputs(dim, block)
    try:
        out = runner(kernel, x, launch)()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - whatever stops a candidate is its reason
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    error = x.error(out, packed=True, dense=False)
    return None if error < 0.01 else f"relative L2 {error:.2g}"


def measure(runs: dict[str, object], rounds: int) -> dict[str, float]:
    times = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            times[name].append(event_times(runs[name], 40.0))
    return {name: statistics.median(took) for name, took in times.items()}


def main(
    kernels: str = "hopper,triton",
    rounds: int = 3,
    jobs: Annotated[int, typer.Option(help="Processes that compile; each takes half a GiB of the GPU's memory.")] = 12,
    write_to: pathlib.Path = FILE,
) -> None:
    console = Console(width=120)
    capability = 10 * torch.cuda.get_device_capability()[0]
    tasks = [(k, d, b, c) for k in kernels.split(",") for d, b in SHAPES for c in candidates(k, b)]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        reasons = list(pool.map(prepare, *zip(*tasks)))
    rows = json.loads(FILE.read_text())["configurations"]
    for kernel, (dim, block) in itertools.product(kernels.split(","), SHAPES):
        x = inputs(dim, block)
        fit = [c for (k, d, b, c), why in zip(tasks, reasons) if (k, d, b) == (kernel, dim, block) and why is None]
        runs = {"rule": runner(kernel, x, None)} | {json.dumps(c): runner(kernel, x, c) for c in fit}
        times = measure(runs, rounds)
        best = min(times.values())
        winner = next((c for c in fit if times[json.dumps(c)] <= 1.005 * best), None)
        if winner is None:  # the kernel's own rule wins: there is nothing to note
            rows.pop(tuning.key(kernel, capability, dim, block), None)
        else:
            tflops = x.kept_flops / times[json.dumps(winner)] / 1e9
            rows[tuning.key(kernel, capability, dim, block)] = {
                "launch": winner, "tflops": round(tflops), "of_rule": round(times["rule"] / times[json.dumps(winner)], 3),
                "device": torch.cuda.get_device_name(), "triton": triton.__version__}  # fmt: skip
        table = Table(title=f"{kernel}, head_dim {dim}, block {block}", title_justify="left")
        for column in ("candidate", "ms", "TFLOP/s"):
            table.add_column(column)
        for name, ms in sorted(times.items(), key=lambda item: item[1])[:6]:
            table.add_row(name, f"{ms:.4f}", f"{x.kept_flops / ms / 1e9:.0f}")
        console.print(table)
        del x, runs
    for task, why in zip(tasks, reasons):
        if why and "OutOfResources" not in why:
            console.print("out:", *task, why)
    write_to.write_text(json.dumps({"configurations": dict(sorted(rows.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

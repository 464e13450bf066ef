"""What the rewrites give on the reduced models of tests/models, on this machine: seconds a chunk, against plain Inductor.

    python benchmarks/families.py
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import li_compile  # noqa: E402
from li_compile import Config  # noqa: E402
from models import axial, axial_family, paired, paired_family, posed, posed_family, rolling, rolling_family  # noqa: E402, F401

ROUNDS = 15
OPTIONS = {"cache.gate": "always", "cache.guard": None, "sparse.tile": (4, 2, 2), "sparse.block_size": 16, "sparse.min_context": 4,
           "sparse.skip_layers": 0, "context.enabled": False}


def cases() -> dict[str, tuple]:
    """Name -> (function, inputs)."""
    draw = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(0))
    video = (1, rolling.CHANNELS, rolling.CHUNK, 8, 8)
    return {
        "rolling (Self-Forcing, Matrix-Game-2)": (rolling.ChunkSampler(rolling.RollingWorld().eval()), [
            draw(*video), draw(3, *video), draw(1, 4, 3), *rolling.caches(24, 20), 20]),
        "paired (LingBot, Wan2.2)": (paired.GuidedSampler(paired.PairedWorld().eval()), paired.inputs()),
        "axial (open-oasis)": (axial.FrameSampler(axial.AxialWorld().eval()), axial.inputs(7)),
        "posed (Matrix-Game-3.5), one step": (posed.PosedWorld().eval(), posed.inputs(20)),
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the models are small, and a second thread that waits costs more than it gives
    print("| form | eager, padded or masked as written | Inductor, prepared | exact | exact and cached steps | counts |")
    print("|---|---:|---:|---:|---:|---|")
    for name, (fn, inputs) in cases().items():
        columns, counts = {"eager": timed(fn, inputs)}, {}
        for preset in ("off", "exact", "cache"):
            torch._dynamo.reset()
            run = li_compile.compile(fn, Config.from_options(OPTIONS | {"preset": preset}))
            columns[preset] = timed(run, inputs)
            counts = {k: v for k, v in run.report().counts().items() if v} or counts
            run.detach()
        cells = " | ".join(f"{1000 * s:.2f} ms" for s in columns.values())
        print(f"| {name} | {cells} | {', '.join(f'{k} {v}' for k, v in counts.items())} |", flush=True)


def timed(run, inputs) -> float:
    with torch.no_grad():
        for _ in range(3):
            run(*inputs)
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            run(*inputs)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()

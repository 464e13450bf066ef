"""Doom World on this machine: every preset against the same model through plain Inductor, in one process.

    python benchmarks/doom_world.py --trajectory revisit --presets exact,context,sparse,cache,all

All runs are free-running and take turns chunk by chunk, so that they see the same machine. A call that compiled
something is made again and its second time counts. Ratios are of summed chunk times (prefill and denoising). With more
rounds, each call is made so often and the fastest counts: for a machine that others use too.
"""

from __future__ import annotations

import copy
import json
import pathlib
import sys
import time

import torch
import typer

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from doom_world.data import load_trajectory, trajectory_folder  # noqa: E402
from doom_world.metrics import psnr  # noqa: E402
from doom_world.model import ChunkSampler  # noqa: E402
from doom_world.rollout import FOV, play  # noqa: E402
from doom_world.weights import load_world  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import li_compile  # noqa: E402


def compiled_so_far(report) -> tuple:
    variants = sum(len(g.variants) for g in report.graphs) if report is not None else 0
    return counters["stats"].get("unique_graphs", 0), variants


def main(trajectory: str = "revisit", presets: str = "exact,context,sparse,cache,all", chunks: int = 16,
         forced: bool = False, rounds: int = 1, out: pathlib.Path = pathlib.Path("out/doom_world.json")) -> None:
    from li_compile.backend import last_report

    model, codec = load_world()
    film = load_trajectory(trajectory_folder() / f"{trajectory}.npz")
    truth = torch.from_numpy(film.frames).permute(0, 3, 1, 2).float()[: 4 * chunks] / 255
    latents = codec.encode(truth)
    runs = {}
    for name in ["inductor", *presets.split(",")]:
        # One sampler object a run: Dynamo keeps compiled code by the function's code and options.
        sampler, options = ChunkSampler(model), {"preset": name, "context.fov": FOV}
        compiled = torch.compile(sampler, backend="inductor") if name == "inductor" else \
            torch.compile(sampler, backend="light_interaction", options=options)
        session = li_compile.Session(li_compile.Config.from_options(options if name != "inductor" else {"preset": "off"}))
        runs[name] = {"compiled": compiled, "session": session, "seconds": [], "compile": 0.0, "calls": 0, "context": 0,
                      "reports": None}

    def timed(run):
        def call(*args):
            before, start = compiled_so_far(run["reports"]), time.perf_counter()
            with run["session"]:
                result = run["compiled"](*args)
            took = time.perf_counter() - start
            run["reports"] = last_report()
            if compiled_so_far(run["reports"]) != before:
                start = time.perf_counter()
                with copy.deepcopy(run["session"]):  # the same chunk again: the same plan, and no second record
                    result = run["compiled"](*args)
                again = time.perf_counter() - start
                run["compile"], took = run["compile"] + took - again, again
            for _ in range(rounds - 1):
                start = time.perf_counter()
                run["compiled"](*args)
                took = min(took, time.perf_counter() - start)
            run["seconds"].append(took)
            return result
        return call

    # All runs share one function's code, and each needs a few graphs of it.
    torch._dynamo.config.recompile_limit = 64
    players = {n: play(model, timed(r), latents, film.w2c[: 4 * chunks], film.intrinsics, film.action[: 4 * chunks], forced)
               for n, r in runs.items()}
    done = {}
    for chunk in range(chunks):
        for name, player in players.items():
            done[name] = next(player)
            print(f"chunk {chunk} {name}: {runs[name]['seconds'][-1]:.2f} s", flush=True)
    dense, rows = codec.decode(done["inductor"]), {}
    total = sum(runs["inductor"]["seconds"])
    for name, run in runs.items():
        frames, stats = codec.decode(done[name]), run["session"].stats()
        rows[name] = {
            "seconds": round(sum(run["seconds"]), 2), "ratio": round(total / sum(run["seconds"]), 2),
            "compile_seconds": round(run["compile"], 1),
            "psnr_truth": round(float(psnr(frames[1:], truth[1:]).mean), 2),
            "psnr_dense": round(float(psnr(frames[1:], dense[1:]).mean), 2) if name != "inductor" else None,
            "calls": stats["calls"], "context": stats["context_kept"], "reused_chunks": stats["reused_chunks"]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"trajectory": trajectory, "chunks": chunks, "forced": forced, "rounds": rounds, "torch": torch.__version__,
                               "threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)

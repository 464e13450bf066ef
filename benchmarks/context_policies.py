"""Context policies on Doom World: quality over context tokens, planning time, and what the latents' change looks like.

    python benchmarks/context_policies.py quality --device cuda --seeds 0,1,2
    python benchmarks/context_policies.py report
    python benchmarks/context_policies.py planning
    python benchmarks/context_policies.py calibrate

``quality`` plays every trajectory with every policy, teacher-forced and free-running, with the model as it is (no
compiler: nothing but the choice of context differs) and adds a row for each to a file, so that it can be stopped and
gone on with; files of several runs can be joined. ``report`` makes the tables and the plot of them.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import typer

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from doom_world import rollout  # noqa: E402
from doom_world.data import load_trajectory, trajectory_folder  # noqa: E402
from doom_world.metrics import psnr, ssim  # noqa: E402
from doom_world.model import ChunkSampler, run_block  # noqa: E402
from doom_world.rollout import FOV, play  # noqa: E402
from doom_world.weights import load_world  # noqa: E402

from li_compile import Config, Session  # noqa: E402
from li_compile.kernels.view_overlap import view_overlap  # noqa: E402
from li_compile.policy import dynamics_unit, latent_change, plan_context  # noqa: E402

TRAJECTORIES = ("revisit", "revisit_unseen", "loop", "explore", "still", "sudden")
WARM = 8  # first frame that counts: before it there is too little context for a choice

#: Name -> options under ``context.``; None: nothing is pruned.
POLICIES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "authors": {"policy": "authors"},
    "authors-nomemory": {"policy": "authors", "threshold": 1.0},
    "authors-8": {"policy": "authors", "memory_frames": 16, "temporal_frames": 8},
    "authors-12": {"policy": "authors", "memory_frames": 20, "temporal_frames": 12},
    "authors-dynamics": {"policy": "authors", "memory_frames": 20, "temporal_frames": 12, "window": "dynamics"},
    "authors-dynamics-0.5": {"policy": "authors", "memory_frames": 20, "temporal_frames": 12, "window": "dynamics", "kappa": 0.5},
    "chunks-16": {"policy": "chunks", "memory_frames": 16},
    "slots": {"policy": "slots", "temporal_frames": 4, "slot_references": (1, 2, 3, 4), "slot_sink": 0},
    "coverage": {"policy": "coverage"},
    "coverage-4": {"policy": "coverage", "memory_frames": 4, "anchor_frames": 0},
    "coverage-8": {"policy": "coverage", "min_gain": 0.0},
    "coverage-12": {"policy": "coverage", "memory_frames": 12},
    "coverage-noanchor": {"policy": "coverage", "anchor_frames": 0},
    "coverage-frustum": {"policy": "coverage", "rule": "frustum"},
    "coverage-dynamics": {"policy": "coverage", "temporal_frames": 4, "window": "dynamics"},
}

app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0])


def config_of(name: str) -> Config:
    options = POLICIES[name]
    context = {"enabled": False} if options is None else options
    return Config.from_options({"preset": "context", "context": {"fov": FOV} | context})


class Chosen:
    """The sampler with a policy in front of it: what ``torch.compile`` makes of it, without compiling.

    known: results by what was selected, for runs in which nothing else differs (teacher-forced ones of one trajectory).
    """

    def __init__(self, sampler: ChunkSampler, config: Config, known: dict[tuple, torch.Tensor] | None = None) -> None:
        self.sampler, self.config, self.session, self.known = sampler, config, Session(config), known

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        if self.known is None:
            return self.sampler(*self.select(*args))
        chosen = self.select(*args)
        key = tuple(float(x.double().sum()) for x in (chosen[0], *chosen[7:]))  # the noise is another in every chunk
        if key not in self.known:
            self.known[key] = self.sampler(*chosen)
        return self.known[key]

    def select(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(args) <= 7:
            return args
        latents, action, w2c = args[7:]
        change = latent_change(latents, 2, dynamics_unit(self.config.context)) if self.config.context.window == "dynamics" else None
        plan = self.session.planner.decide(w2c[0], args[3][0], self.config, change)
        self.session.record(plan)
        index = torch.tensor(plan.indices, device=latents.device)
        return *args[:7], latents[:, :, index], action[:, index], w2c[:, index]


class World:
    """The trained model and its trajectories, loaded once."""

    def __init__(self, device: str = "cpu") -> None:
        torch.backends.cudnn.allow_tf32 = False
        self.device = device
        self.model, self.codec = load_world(device=device)
        self.model.run_block = run_block  # without a compiler around it, a nested compile region is a detour
        self.sampler = ChunkSampler(self.model)
        self.films: dict[str, Any] = {}
        self.known: dict[str, dict[tuple, torch.Tensor]] = {}

    def film(self, name: str):
        if name not in self.films:
            film = load_trajectory(trajectory_folder() / f"{name}.npz")
            truth = torch.from_numpy(film.frames).permute(0, 3, 1, 2).float()[:64] / 255
            self.films[name] = film, truth, self.codec.encode(truth.to(self.device))
        return self.films[name]

    def run(self, policy: str, trajectory: str, forced: bool, seed: int, every: bool) -> tuple[torch.Tensor, Session]:
        """(frames [64, 3, H, W], session). every: choose from all latents so far, not from upstream's 20 of them."""
        chosen = Chosen(self.sampler, config_of(policy), self.known.setdefault(trajectory, {}) if forced else None)
        kept = rollout.RETRIEVAL
        if every and POLICIES[policy] is not None:
            rollout.RETRIEVAL = Config(preset="off")
        try:
            *_, done = self.play(chosen, trajectory, forced, seed)
        finally:
            rollout.RETRIEVAL = kept
        return self.codec.decode(done).clamp(0, 1).cpu(), chosen.session

    def play(self, chosen: Chosen, trajectory: str, forced: bool, seed: int) -> Iterator[torch.Tensor]:
        film, _, latents = self.film(trajectory)
        given = [x.to(self.device) for x in (film.w2c[:64], film.intrinsics, film.action[:64])]
        return play(self.model, chosen, latents, *given, forced, seed)


def revisits(w2c: torch.Tensor) -> torch.Tensor:
    """Frames that look where the camera was long before: bool [64]. Old: 12 frames and more, longer than any window."""
    overlap = view_overlap(w2c.double(), w2c.double(), fov=FOV)
    old = torch.tril(torch.ones_like(overlap), -12).bool()
    return (overlap.masked_fill(~old, 0).amax(1) >= 0.9) & (torch.arange(len(w2c)) >= WARM)


@app.command()
def quality(policies: str = ",".join(POLICIES), trajectories: str = ",".join(TRAJECTORIES), seeds: str = "0", forced: bool = True,
            free: bool = True, every: bool = False, device: str = "cpu",
            out: pathlib.Path = pathlib.Path("out/context_policies.jsonl")) -> None:
    """Play and score; each row is appended to OUT. --every: choose from all latents, not from upstream's 20."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in rows_of(out)}
    world, dense = World(device), {}
    for trajectory in trajectories.split(","):
        film, truth, _ = world.film(trajectory)
        again = revisits(film.w2c[:64])
        modes = [("teacher-forced", 0)] * forced + [("free-running", int(s)) for s in seeds.split(",")] * free
        for mode, seed in modes:
            for policy in policies.split(","):
                key = f"{policy}|{trajectory}|{mode}|{seed}|{'all' if every else 'given'}"
                if key in done:
                    continue
                if (trajectory, mode, seed) not in dense:
                    dense[trajectory, mode, seed] = world.run("dense", trajectory, mode == "teacher-forced", seed, False)
                frames, session = dense[trajectory, mode, seed] if policy == "dense" else \
                    world.run(policy, trajectory, mode == "teacher-forced", seed, every)
                scores = {"psnr": psnr(frames, truth).per_frame, "ssim": ssim(frames, truth).per_frame,
                          "psnr_dense": psnr(frames, dense[trajectory, mode, seed][0]).per_frame}
                stats = session.stats()
                row = {"key": key, "policy": policy, "trajectory": trajectory, "mode": mode, "seed": seed, "from": "all" if every else "given",
                       "context": stats["context_kept"], "lengths": [c["context_kept"] for c in stats["per_chunk"]],
                       **{name: round(float(x[WARM:].mean()), 4) for name, x in scores.items()},
                       "psnr_revisit": round(float(scores["psnr"][again].mean()), 4) if again.any() else None, "revisit_frames": int(again.sum())}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{key}: {row['context']} latents, {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}, "
                      f"against dense {row['psnr_dense']:.1f} dB", flush=True)


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@app.command()
def report(out: pathlib.Path = pathlib.Path("out/context_policies.jsonl"), plot: pathlib.Path = pathlib.Path("docs/context.svg"),
           source: str = "given") -> None:
    """Tables over all rows of OUT, and a plot. source: rows of policies that chose from "given" or from "all" latents."""
    rows = [r for r in rows_of(out) if r["from"] == source or r["policy"] == "dense"]
    seen: dict[str, dict[str, tuple[float, ...]]] = {}
    for mode in ("teacher-forced", "free-running"):
        here = [r for r in rows if r["mode"] == mode]
        names = [p for p in POLICIES if any(r["policy"] == p for r in here)]
        # Only what every policy was run on, or means would be of different things.
        cases = set.intersection(*({(r["trajectory"], r["seed"]) for r in here if r["policy"] == p} for p in names)) if here else set()
        if not cases:
            continue
        print(f"\n{mode}, {len(cases)} rollouts, frames {WARM} to 63\n")
        for name in names:
            own = [r for r in here if r["policy"] == name and (r["trajectory"], r["seed"]) in cases]
            mean = lambda key: statistics.fmean(r[key] for r in own)
            revisit = [(r["psnr_revisit"], r["revisit_frames"]) for r in own if r["psnr_revisit"] is not None]
            weighted = sum(p * n for p, n in revisit) / sum(n for _, n in revisit)
            seen.setdefault(mode, {})[name] = (mean("context"), mean("psnr"), weighted, mean("ssim"), mean("psnr_dense"))
        points = seen[mode]
        fronts = {"all": front(points, 1), "revisits": front(points, 2)}
        print("| policy | context latents | against authors | PSNR | SSIM | PSNR on revisits | against dense | on the front of |")
        print("|---" * 8 + "|")
        for name, (tokens, quality, revisit, similarity, dense) in points.items():
            share = f"{tokens / points['authors'][0] - 1:+.0%}" if "authors" in points and name != "authors" else ""
            against = f"{dense:.1f} dB" if name != "dense" else ""
            on = ", ".join(measure for measure, names_on in fronts.items() if name in names_on)
            bold = "**" * (name == "coverage")
            print(f"| {bold}{name}{bold} | {tokens:.1f} | {share} | {quality:.2f} dB | {similarity:.4f} | {revisit:.2f} dB | {against} | {on} |")
        print(f"\n{mode}, by trajectory: context latents, PSNR\n")
        kinds = [t for t in TRAJECTORIES if any(case[0] == t for case in cases)]
        print("| policy | " + " | ".join(kinds) + " |\n|---" + "|---" * len(kinds) + "|")
        for name in names:
            cells = []
            for kind in kinds:
                own = [r for r in here if r["policy"] == name and r["trajectory"] == kind and (r["trajectory"], r["seed"]) in cases]
                cells.append(f"{statistics.fmean(r['context'] for r in own):.0f}, {statistics.fmean(r['psnr'] for r in own):.2f}")
            print(f"| {name} | " + " | ".join(cells) + " |")
    if seen:
        draw(seen, plot)


def front(points: dict[str, tuple[float, ...]], measure: int) -> set[str]:
    """Policies than which no other has as few context latents and as much quality, and more of one of the two."""
    better = lambda a, b: a[0] <= b[0] and a[measure] >= b[measure] and (a[0], a[measure]) != (b[0], b[measure])
    return {name for name, own in points.items() if not any(better(other, own) for other in points.values())}


def draw(seen: dict[str, dict[str, tuple[float, ...]]], path: pathlib.Path) -> None:
    """Quality over context latents of a rollout, a panel a mode and measure; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(seen), 8), layout="constrained")
    axes = figure.subplots(2, len(seen), squeeze=False)
    for column, (mode, points) in enumerate(seen.items()):
        for row, (index, label) in enumerate(((1, "PSNR against truth, dB"), (2, "the same on revisits, dB"))):
            axis = axes[row][column]
            for name, values in points.items():
                family = name.partition("-")[0]
                color = {"dense": "black", "authors": "tab:red", "coverage": "tab:blue", "chunks": "tab:orange", "slots": "tab:green"}[family]
                axis.scatter(values[0], values[index], color=color, marker="*" if name == "coverage" else "o", s=90 if name == family else 25)
                axis.annotate(name, (values[0], values[index]), fontsize=7, xytext=(4, 3), textcoords="offset points")
            axis.set_xlabel("context latents a rollout of 64")
            axis.set_ylabel(label)
            axis.set_title(mode)
            axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(f"\nwritten to {path}")


@app.command()
def planning(repeats: int = 200, threads: int = 1) -> None:
    """Time of one plan on the CPU, by policy and length of the history: median and 95th percentile, milliseconds."""
    torch.set_num_threads(threads)
    poses = torch.cat([load_trajectory(trajectory_folder() / f"{n}.npz").w2c[:64].double() for n in ("revisit", "loop")])
    print(f"torch {torch.__version__}, {threads} thread(s), {repeats} plans each\n")
    print("| policy | " + " | ".join(f"{n} latents" for n in (20, 60, 64, 124)) + " | 60 over 20 |\n|---|---|---|---|---|---|")
    for name in ("coverage", "chunks-16", "authors"):
        config, cells, medians = config_of(name), [], {}
        for length in (20, 60, 64, 124):  # the sixth chunk of four and the sixteenth are planned after 20 and 60
            run = lambda: plan_context(poses[:length], poses[length : length + 4], config)
            for _ in range(20):
                run()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e3)
            medians[length] = statistics.median(times)
            cells.append(f"{medians[length]:.2f} ({sorted(times)[int(0.95 * repeats)]:.2f})")
        print(f"| {name} | " + " | ".join(cells) + f" | {medians[60] / medians[20]:.2f}x |")
    session = Session(config_of("coverage"))
    session.extend(poses)
    start = time.perf_counter()
    plans = session.plan_ahead()
    took = (time.perf_counter() - start) * 1e3
    print(f"\na whole trajectory of {len(poses)} latents planned ahead by coverage: {took:.1f} ms for {len(plans)} chunks")


@app.command()
def calibrate(trajectories: str = "loop,explore,still", seed: int = 0, device: str = "cpu") -> None:
    """The latents' change D_t (eq. 1) of free-running dense rollouts and of the truth; its median is a kappa with which half
    of the window is kept half of the time. Run on other trajectories than those that the result is judged by."""
    world = World(device)
    print("| latents | unit | 5 % | 25 % | median | 75 % | 95 % |\n|---|---|---|---|---|---|---|")
    for source in ("truth", "free-running"):
        for unit, name in ((1, "frame"), (4, "chunk")):
            changes = []
            for trajectory in trajectories.split(","):
                *_, latents = world.film(trajectory)
                if source == "free-running":
                    key = (trajectory, seed)
                    if key not in world.films:
                        chosen = Chosen(world.sampler, config_of("dense"))
                        *_, world.films[key] = world.play(chosen, trajectory, False, seed)
                    latents = world.films[key]
                changes += [latent_change(latents[:end], 0, unit) for end in range(WARM, 64, 4)]
            points = torch.tensor(changes).quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
            print(f"| {source} | {name} | " + " | ".join(f"{p:.3f}" for p in points) + " |")


if __name__ == "__main__":
    app()

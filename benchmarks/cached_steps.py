"""Cached denoising steps on Doom World: quality over computed calls, and what sharing the model's calls saves in compiling.

    python benchmarks/cached_steps.py quality            # teacher-forced: every policy on every held-out trajectory
    python benchmarks/cached_steps.py rollouts           # free-running, through the compiler
    python benchmarks/cached_steps.py compiling          # CPU-seconds for one call of the model, and for four
    python benchmarks/cached_steps.py draw               # the plot of what ``quality`` measured

Quality is what the compiler is for: the distance from the same model with every step computed, over the chunks after the
two warm-up ones. A mean over all of them counts chunks in which nothing was skipped as no error; what is said of reused
chunks is over these alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import typer

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from doom_world.data import load_trajectory, trajectory_folder  # noqa: E402
from doom_world.metrics import psnr, ssim  # noqa: E402
from doom_world.model import ChunkSampler, WorldConfig, WorldModel, sigmas  # noqa: E402
from doom_world.rollout import FOV, RETRIEVAL, first_prompt, play  # noqa: E402
from doom_world.weights import load_world  # noqa: E402

import li_compile  # noqa: E402
from li_compile.memory import ChunkMemory, drift_of  # noqa: E402
from li_compile.passes.predictors import NOW, PREDICTORS, Skipping  # noqa: E402
from li_compile.policy import plan_context  # noqa: E402

app = typer.Typer(add_completion=False)
TRAJECTORIES = "revisit,revisit_unseen,loop,explore,still,sudden"
OUT, PICTURE = pathlib.Path("out/cached_steps.json"), pathlib.Path("docs/cached_steps.svg")
WARM = 2  # chunks
# The authors' gate, with the candidates that their pruning leaves in the window.
WINDOW = {"context.enabled": False, "context.policy": "authors", "context.memory_frames": 12, "context.temporal_frames": 4, "context.fov": FOV}
WAYS = [("hold", None), ("hold", (1,)), ("hold", (2,)), ("linear", (2,)), ("previous", None), ("previous", (2,))]
GATES = [("always", None), ("always", 0.2), ("always", 0.12), ("views", None), ("views", 0.2)]


@dataclasses.dataclass(frozen=True)
class Policy:
    predictor: str
    skip: tuple[int, ...] | None
    gate: str
    guard: float | None

    @property
    def name(self) -> str:
        skipped = "1, 2" if self.skip is None else str(self.skip[0])
        return f"{self.predictor}, skips {skipped}, {self.gating}"

    @property
    def gating(self) -> str:
        return self.gate + (f", guard {self.guard:g}" if self.guard is not None else "")

    def config(self) -> li_compile.Config:
        return li_compile.Config.from_options({"preset": "cache", "cache.predictor": self.predictor, "cache.skip": self.skip,
                                               "cache.gate": self.gate, "cache.guard": self.guard, **WINDOW})


POLICIES = [Policy(*way, *gate) for gate in GATES for way in WAYS]
DEFAULT = Policy(*(getattr(li_compile.CacheConfig(), k) for k in ("predictor", "skip", "gate", "guard")))


class Teacher:
    """One trajectory, chunk by chunk, with the rendered past as context: the model's own calls, and frames."""

    def __init__(self, model: WorldModel, codec, name: str) -> None:
        film = load_trajectory(trajectory_folder() / f"{name}.npz")
        self.model, self.codec, self.film, self.config = model, codec, film, model.config
        self.pixels = torch.from_numpy(film.frames).permute(0, 3, 1, 2).float() / 255
        self.truth = codec.encode(self.pixels).contiguous()
        self.levels, self.cameras = sigmas(model.config), film.w2c.float()
        self.text = model.prefix(self.truth[:1])
        self.random = torch.Generator("cpu").manual_seed(0)

    def begin(self, start: int) -> None:
        """Encode the context of the chunk at frame ``start`` and draw its noise."""
        c, film, now = self.config, self.film, slice(start, start + self.config.chunk)
        size = (1, c.channels, c.chunk, c.height, c.width)
        self.noise, self.start = torch.randn(size, generator=self.random), start
        self.prompt = first_prompt(self.truth[:1], c) if start == 0 else self.truth.new_zeros(1, c.channels + 1, *size[2:])
        self.action, self.now, self.context, self.given = film.action[None, now], self.cameras[None, now], None, None
        self.k = film.intrinsics.float()[None]
        if start:
            chosen = torch.tensor(plan_context(self.cameras[:start], self.cameras[now], RETRIEVAL).indices)
            past, action, self.given = self.truth[chosen].transpose(0, 1)[None], film.action[chosen][None], self.cameras[chosen]
            blank = torch.zeros_like(past[:, :1]).expand(-1, self.prompt.shape[1], -1, -1, -1)
            label = torch.full_like(action, c.context_time, dtype=torch.float32)
            _, self.context = self.model(torch.cat([past, blank], 1), label, action, self.given[None], self.k, *self.text)

    def velocity(self, x: torch.Tensor, step: int) -> torch.Tensor:
        time = torch.full_like(self.action, 1000 * self.levels[step], dtype=torch.float32)
        count = 0 if self.given is None else len(self.given)
        return self.model(torch.cat([x, self.prompt], 1), time, self.action, self.now, self.k, *self.text, self.context, count)[0]

    def denoise(self, skipping: Skipping, known: dict[int, torch.Tensor], earlier: dict[int, torch.Tensor]):
        """(latents, outputs of the computed steps) with some steps skipped; known: outputs that need no call."""
        x, computed = self.noise, {}
        for step, (sigma, following) in enumerate(zip(self.levels, self.levels[1:])):
            if step in skipping.skip:
                v = predicted(skipping, self.levels, step, computed, earlier)
            else:
                v = computed[step] = known[step] if step in known else self.velocity(x, step)
            x = x + v * (following - sigma)
        return x, computed

    def frames(self, latents: torch.Tensor) -> torch.Tensor:
        first = 1 if self.start == 0 else 0  # frame 0 is given
        return self.codec.decode(latents[0].transpose(0, 1))[first:]

    @property
    def rendered(self) -> torch.Tensor:
        return self.pixels[self.start + (self.start == 0):self.start + self.config.chunk]


def predicted(skipping: Skipping, times, step: int, now: dict, earlier: dict) -> torch.Tensor:
    weights = skipping.weights(step, times).items()
    return sum(float(c) * (now if chunk == NOW else earlier)[k] for (chunk, k), c in weights)


def sharpness(frames: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return float((frames[..., 1:] - frames[..., :-1]).abs().mean() + (frames[..., 1:, :] - frames[..., :-1, :]).abs().mean())


@app.command()
@torch.no_grad()
def quality(trajectories: str = TRAJECTORIES, chunks: int = 16, out: pathlib.Path = OUT) -> None:
    """Every policy on every chunk, with the rendered past as context; all see the same dense calls. Rows of other
    trajectories that ``out`` holds are kept."""
    model, codec = load_world(regional=False)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    for name in trajectories.split(","):
        rows = [r for r in rows if r["trajectory"] != name]
        teacher = Teacher(model, codec, name)
        state = {p: (ChunkMemory(p.config().cache, PREDICTORS[p.predictor].across), {}) for p in POLICIES}
        for chunk in range(chunks):
            began = time.perf_counter()
            rows += one_chunk(teacher, name, chunk, state)
            print(f"{name} {chunk}: {time.perf_counter() - began:.1f} s", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}) + "\n")
    show(rows)


def one_chunk(teacher: Teacher, name: str, chunk: int, state: dict) -> list[dict]:
    teacher.begin(chunk * teacher.config.chunk)
    steps = len(teacher.levels) - 1
    dense, outputs = teacher.denoise(Skipping(steps, (), PREDICTORS["hold"]), {}, {})
    dense_frames, truth = teacher.frames(dense), teacher.rendered
    reference = psnr(dense_frames, truth).mean, ssim(dense_frames, truth).mean, sharpness(dense_frames)
    known, rows = {}, []
    for policy, (memory, earlier) in state.items():
        config = policy.config()
        plan = plan_context(teacher.given, teacher.now[0], config) if teacher.given is not None else None
        wanted = policy.gate == "always" or plan is not None and plan.reuse
        reuse, _ = memory.begin(wanted, [teacher.action])
        skipping = Skipping(steps, config.cache.skipped(steps), PREDICTORS[policy.predictor])
        row = {"trajectory": name, "chunk": chunk, "policy": policy.name, "reuse": reuse, "calls": steps, "error": 0.0}
        computed = outputs
        if reuse:
            key = policy.predictor, policy.skip, id(earlier.get(0))
            if key not in known:
                known[key] = teacher.denoise(skipping, {0: outputs[0]}, earlier)
            latents, computed = known[key]
            frames = teacher.frames(latents)
            row |= {"calls": len(skipping.computed), "error": float((latents - dense).norm() / dense.norm()),
                    "psnr_dense": psnr(frames, dense_frames).mean, "psnr_truth": psnr(frames, truth).mean - reference[0],
                    "ssim_truth": ssim(frames, truth).mean - reference[1], "sharpness": sharpness(frames) / reference[2]}
        drift = None
        if reuse or not skipping.predictor.across:
            last = steps - 1
            drift = drift_of(computed[last], predicted(skipping, teacher.levels, last, computed, earlier))
            row["drift"] = float(drift)
        memory.end(drift, [] if reuse else list(outputs.values()), [teacher.action])
        if not reuse:
            earlier.clear()
            earlier.update(outputs)
        rows.append(row)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """A policy a row: means over trajectories of means over chunks; ``front``: no other is as good at as few calls."""
    table = []
    for policy in POLICIES:
        mine = [r for r in rows if r["policy"] == policy.name and r["chunk"] >= WARM]
        if not mine:
            continue
        per = [[r for r in mine if r["trajectory"] == t] for t in dict.fromkeys(r["trajectory"] for r in mine)]
        mean = lambda key: statistics.mean(statistics.mean(r.get(key, 0.0) for r in rs) for rs in per)
        reused = [r for r in mine if r["reuse"]]
        of_reused = lambda key: statistics.mean(r[key] for r in reused) if reused else None
        table.append({"policy": policy.name, "calls": mean("calls"), "error": mean("error"), "truth": mean("psnr_truth"),
                      "reused": len(reused), "chunks": len(mine), "default": policy == DEFAULT,
                      **{k: of_reused(k) for k in ("psnr_dense", "psnr_truth", "ssim_truth", "sharpness")}})
    for row in table:
        row["front"] = not any(o["calls"] <= row["calls"] and o["error"] <= row["error"] and
                               (o["calls"], o["error"]) != (row["calls"], row["error"]) for o in table)
    return sorted(table, key=lambda r: (r["calls"], r["error"]))


def show(rows: list[dict]) -> None:
    print("| policy | calls a chunk | error | on the front | reused chunks | of these: PSNR to dense | PSNR to truth | SSIM to truth "
          "| sharpness |\n|---|---|---|---|---|---|---|---|---|")
    for r in summary(rows):
        form = lambda key, how: format(r[key], how) if r[key] is not None else ""
        print(f"| {'**' * r['default']}{r['policy']}{'**' * r['default']} | {r['calls']:.2f} | {r['error']:.4f} | {'yes' * r['front']} | "
              f"{r['reused']} of {r['chunks']} | {form('psnr_dense', '.1f')} dB | {form('psnr_truth', '+.2f')} dB | "
              f"{form('ssim_truth', '+.4f')} | {form('sharpness', '.3f')} |")


@app.command()
def correlations(measured: pathlib.Path = OUT) -> None:
    """How well the error of a reused chunk is told by its own drift, by that of the chunk before, and by the view overlap."""
    always, pairs = Policy("hold", None, "always", None), {"drift": [], "drift before": [], "view overlap": []}
    rows = {(r["trajectory"], r["chunk"]): r for r in json.loads(measured.read_text())["rows"] if r["policy"] == always.name}
    for name in dict.fromkeys(t for t, _ in rows):
        cameras = load_trajectory(trajectory_folder() / f"{name}.npz").w2c.float()
        for chunk in range(WARM, max(c for t, c in rows if t == name) + 1):
            past, now = cameras[: 4 * chunk], cameras[4 * chunk:4 * chunk + 4]
            given = past[list(plan_context(past, now, RETRIEVAL).indices)]
            error = rows[name, chunk]["error"]
            pairs["drift"].append((rows[name, chunk]["drift"], error))
            pairs["drift before"].append((rows[name, chunk - 1]["drift"], error))
            pairs["view overlap"].append((plan_context(given, now, always.config()).score, error))
    for key, both in pairs.items():
        print(f"{key}: {statistics.correlation(*zip(*both)):+.2f} over {len(both)} chunks")


@app.command()
def draw(measured: pathlib.Path = OUT, picture: pathlib.Path = PICTURE) -> None:
    """Quality over computed calls, a mark a policy; needs matplotlib (``pip install 'li_compile[plot]'``)."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["svg.hashsalt"] = "none", "li_compile"
    rows = summary(json.loads(measured.read_text())["rows"])
    show(json.loads(measured.read_text())["rows"])
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasSVG(figure)
    marks = {"hold": "o", "linear": "^", "previous": "s"}
    colours = {"always": "tab:red", "always, guard 0.2": "tab:orange", "always, guard 0.12": "tab:olive",
               "views": "tab:blue", "views, guard 0.2": "tab:green"}
    names = {p.name: p for p in POLICIES}
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("error", "truth"), ("distance of the latents from dense (relative L2)",
                                                            "PSNR against the rendered frames, change from dense (dB)")):
        for row in rows:
            policy = names[row["policy"]]
            axes.plot(row["calls"], row[key], marks[policy.predictor], color=colours[policy.gating],
                      markersize=11 if row["default"] else 6, markerfacecolor="none" if policy.skip else None)
            if row["default"]:
                axes.annotate("default", (row["calls"], row[key]), textcoords="offset points", xytext=(-50, -5))
        axes.set(xlabel="computed calls of the model a chunk, of 4", ylabel=label)
    front = [r for r in rows if r["front"]] + [{"calls": 4, "error": 0}]
    panels[0].plot([r["calls"] for r in front], [r["error"] for r in front], color="0.8", zorder=0)
    panels[1].axhline(0, color="0.8", zorder=0)
    for gate, colour in colours.items():
        panels[0].plot([], [], "o", color=colour, label=gate)
    for predictor, mark in marks.items():
        panels[0].plot([], [], mark, color="0.4", label=predictor)
    panels[0].plot([], [], "o", color="0.4", markerfacecolor="none", label="one step skipped, not two")
    panels[0].legend(fontsize="small")
    figure.suptitle("Doom World, teacher-forced, means over six held-out trajectories, chunks 2 to 15")
    figure.savefig(picture, metadata={"Date": None})
    print(picture)


@app.command()
def rollouts(trajectories: str = TRAJECTORIES, chunks: int = 16, out: pathlib.Path = pathlib.Path("out/cached_rollouts.json")) -> None:
    """Free-running through the compiler (graphs run as they are, no Inductor): dense, the default, and reuse always."""
    model, codec = load_world()
    ways = {"dense": {"preset": "exact"}, "default": {"preset": "cache", **WINDOW},
            "always": {"preset": "cache", "cache.gate": "always", "cache.guard": None, **WINDOW}}
    samplers = {n: torch.compile(ChunkSampler(model), backend="light_interaction", options={"lowering": "eager", **o})
                for n, o in ways.items()}
    torch._dynamo.config.recompile_limit = 64
    rows = []
    for name in trajectories.split(","):
        film = load_trajectory(trajectory_folder() / f"{name}.npz")
        count = chunks * model.config.chunk
        pixels = torch.from_numpy(film.frames).permute(0, 3, 1, 2).float()[:count] / 255
        truth, frames = codec.encode(pixels), {}
        for way, options in ways.items():
            began = time.perf_counter()
            with li_compile.Session(li_compile.Config.from_options(options)) as session:
                *_, latents = play(model, samplers[way], truth, film.w2c[:count], film.intrinsics, film.action[:count])
            frames[way] = codec.decode(latents)
            stats, first = session.stats(), WARM * model.config.chunk
            changed = [i for i in range(first, count) if not torch.equal(frames[way][i], frames["dense"][i])]
            row = {"trajectory": name, "way": way, "calls": stats["calls"], "possible": stats["calls_possible"],
                   "reused_chunks": stats["reused_chunks"], "psnr_truth": psnr(frames[way][first:], pixels[first:]).mean,
                   "ssim_truth": ssim(frames[way][first:], pixels[first:]).mean,
                   "psnr_dense_changed": psnr(frames[way][changed], frames["dense"][changed]).mean if changed else None,
                   "changed_frames": len(changed), "seconds": time.perf_counter() - began}
            rows.append(row)
            print(json.dumps(row), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")


@app.command()
def compiling(depth: int = 12, steps: int = 4) -> None:
    """CPU-seconds to compile a sampling loop of one call and of more, each in a process and with caches of its own."""
    rows = []
    for regional in (False, True):
        for preset, shared, calls, blocks in (("exact", True, 1, True), ("exact", True, steps, True), ("cache", True, steps, True),
                                              ("exact", False, steps, True), ("exact", True, 1, False), ("exact", False, steps, False)):
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    [sys.executable, __file__, "one-compilation", str(depth), str(calls), preset, str(int(shared)), str(int(regional)), str(int(blocks))],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    for regional in (False, True):
        one, *others = [r for r in rows if r["regional"] == regional]
        for other in others:
            print(f"{'block regions' if regional else 'flat'}: {other['calls']} calls ({other['preset']}, "
                  f"{'shared' if other['shared'] else 'not shared'}{'' if other['blocks'] else ', flat blocks not folded'}) against one: {other['cpu_seconds'] / one['cpu_seconds']:.2f}x")


@app.command(hidden=True)
def one_compilation(depth: int, calls: int, preset: str, shared: int, regional: int, blocks: int) -> None:
    torch.manual_seed(0)
    model = WorldModel(WorldConfig(depth=depth), regional=bool(regional)).eval()
    c, sampler = model.config, ChunkSampler(model, steps=calls)
    frame = (c.chunk, c.height, c.width)
    inputs = [torch.randn(1, c.channels, *frame), torch.zeros(1, c.channels + 1, *frame), torch.zeros(1, c.chunk, dtype=torch.long),
              torch.eye(4).repeat(1, c.chunk, 1, 1), torch.eye(3)[None]]
    options = {"preset": preset, "exact.shared_steps": bool(shared), "exact.repeated_blocks": bool(blocks), "cache.gate": "always"}
    compiled = torch.compile(sampler, backend="light_interaction", options=options)
    spent = lambda: sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    with torch.no_grad():
        inputs += model.prefix(torch.randn(1, c.channels, *frame[1:]))
        before, began = spent(), time.perf_counter()
        compiled(*inputs)
        row = {"depth": depth, "calls": calls, "preset": preset, "shared": bool(shared), "regional": bool(regional), "blocks": bool(blocks),
               "cpu_seconds": round(spent() - before, 1), "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(row))


if __name__ == "__main__":
    app()

"""Exported artifacts beside the model that they were made of: latency and error against eager, Inductor and our backend, in one process.

    python benchmarks/export.py world                                          # Doom World's whole chunk, with its trained weights
    python benchmarks/export.py worldplay --tree UPSTREAM_TREE --size full     # two blocks of HY-WorldPlay at their real width
    python benchmarks/export.py world --ways "*tensorrt*" --folder out/made --stage build

A way is a preset and what runs it, such as "all, tensorrt, gates=device"; ``--ways`` takes these names, with wildcards. What cannot be had here is a
row that says why. Artifacts that stand in the folder already are not built again, so that several processes may each build some (``--stage build``),
and one measure all (``--stage measure``); rows of earlier runs on the same machine stay in the table. Latency is the median of whole calls, planning among them; "program" is the artifact's program alone.
Errors are relative L2: from eager in fp32, and from the same rewritten graph in fp32, where the difference is rounding and what rounding chooses.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import gc
import json
import pathlib
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch.utils import _pytree as pytree

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from doom_world.timing import moment, seconds  # noqa: E402

import li_compile  # noqa: E402
from li_compile.exporting import family_inputs  # noqa: E402

PEERS = ("eager", "Inductor")
RECORDED = ", CUDA graphs"  # after Inductor or our backend: with what it compiles recorded and replayed
#: Preset, empty for the case's own -> what is exported: target, and what is not the default about it.
ARTIFACTS = {
    "exact": [("exported_program", {}), ("aot_inductor", {}), ("tensorrt", {})],
    "": [("exported_program", {}), ("exported_program", {"sparse": "native"}), ("aot_inductor", {}), ("aot_inductor", {"sparse": "compiled"}),
            ("aot_inductor", {"sparse": "native"}), ("aot_inductor", {"gates": "device"}), ("tensorrt", {}), ("tensorrt", {"sparse": "segment"}),
            ("tensorrt", {"gates": "device"})],
}


@dataclasses.dataclass
class Case:
    """model: in fp32; preset: what is measured beside "exact"; calls: name -> (args, kwargs), for a model of this dtype; inductor: a model, and
    whether with CUDA graphs -> through plain Inductor."""

    model: torch.nn.Module
    calls: Callable[[torch.nn.Module, torch.dtype], dict[str, tuple[list, dict]]]
    options: dict[str, Any]
    inductor: Callable[[torch.nn.Module, bool], Callable[..., Any]]
    preset: str = "all"


def world(device: torch.device, size: str, **_: Any) -> Case:
    """Doom World after 20 frames of context, in a new view and where it was before, so that steps are reused."""
    sys.path.insert(0, str(ROOT / "tests"))
    from doom_world.model import ChunkSampler, WorldConfig, WorldModel
    from doom_world.rollout import FOV
    from doom_world.weights import load_world
    from tracing import TINY, dynamic, world_inputs

    torch.manual_seed(0)
    tiny = WorldConfig(channels=4, height=4, width=4, dim=32, heads=2, depth=1, rope_dims=(4, 6, 6), cond_dim=16, text_dim=16, registers=4)
    model = load_world()[0] if size == "full" else WorldModel(tiny).eval().requires_grad_(False)
    inputs = {name: world_inputs(model, 20, revisit=revisit) for name, revisit in (("new view", False), ("seen before", True))}
    cameras = (3, 4, 9)  # in fp32 whatever the model is in

    def calls(_: torch.nn.Module, dtype: torch.dtype):
        put = lambda i, x: x.to(device, dtype) if x.is_floating_point() and i not in cameras else x.to(device)
        return {name: (dynamic([put(i, x) for i, x in enumerate(given)]), {}) for name, given in inputs.items()}

    options = {"context.fov": FOV} if size == "full" else {k: x for k, x in TINY.items() if k != "lowering"} | {
        "sparse.skip_layers": 0, "context.memory_frames": 8, "context.temporal_frames": 4}
    return Case(ChunkSampler(model.to(device)), calls, options, lambda m, graphs: torch.compile(
        m, backend="inductor", dynamic=False, mode="reduce-overhead" if graphs else None))


def worldplay(device: torch.device, size: str, tree: str, blocks: int, context: int) -> Case:
    """HY-WorldPlay's transformer with few blocks and random weights: the encoding of a context, and a denoising step that reads it."""
    model, made, options = _worldplay(device, size, tree, blocks, context)

    def calls(module: torch.nn.Module, dtype: torch.dtype):
        text = made.text(module, dtype)
        found = {"context": made.arguments("context", dtype) | {"kv_cache": text}}
        found["step"] = made.arguments("step", dtype) | {"kv_cache": module(**found["context"])}
        return {name: ([], kwargs) for name, kwargs in found.items()}

    return Case(model, calls, options, lambda m, graphs: li_compile.compile(m, li_compile.Config(preset="off", cuda_graphs=graphs)), "sparse")


def worldplay_steps(device: torch.device, size: str, tree: str, blocks: int, context: int) -> Case:
    """The same blocks, called four times by a loop: steps that all read one context, and are all to be reused but the first and last."""
    model, made, options = _worldplay(device, size, tree, blocks, context)

    def calls(module: torch.nn.Module, dtype: torch.dtype):
        text = made.text(module.model, dtype)
        held = module.model(**made.arguments("context", dtype) | {"kv_cache": text})
        given = made.arguments("step", dtype)
        hidden = given["hidden_states"]
        latents, prompt = hidden[:, : module.model.out_channels], hidden[:, module.model.out_channels:]
        poses = [given[n] for n in ("viewmats", "Ks", "action")]
        return {"four steps": ([latents, prompt, *poses, [held[i] for i in range(len(held))]], {})}

    class Steps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.fixed = {k: x for k, x in made.arguments("step", torch.float32).items() if not isinstance(x, torch.Tensor)}

        def forward(self, latents, prompt, viewmats, Ks, action, kv_cache):
            times = (1.0, 0.94, 0.83, 0.625, 0.0)
            for now, following in zip(times, times[1:]):
                time = torch.full((latents.shape[2],), 1000 * now, device=latents.device)
                velocity = self.model(hidden_states=torch.cat([latents, prompt], 1), timestep=time, viewmats=viewmats, Ks=Ks, action=action,
                                      kv_cache=kv_cache, **self.fixed)[0]
                latents = latents + velocity * (following - now)
            return latents

    return Case(Steps().eval(), calls, options | {"context.enabled": False, "cache.gate": "always", "cache.guard": None},
                lambda m, graphs: li_compile.compile(m, li_compile.Config(preset="off", cuda_graphs=graphs)))


def _worldplay(device: torch.device, size: str, tree: str, blocks: int, context: int):
    """(model, the inputs of its calls, options)"""
    import argparse
    import os

    os.environ["LI_COMPILE_HY_WORLDPLAY"] = tree
    from worldplay import AUTHORS, TINY_TILES, Setting
    from worldplay_calls import Calls

    setting = Setting(argparse.Namespace(size=size, blocks=blocks, chunks=context // 4 + 1, trajectory="left_right", lowering="inductor", options={}))
    model = setting.model.float()
    for module in model.modules():  # what autocast does around upstream's model, as a part of it: torch.export takes no part in autocast
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            module.register_forward_pre_hook(lambda m, given: tuple(x.to(m.weight.dtype) for x in given))
    made = Calls(setting, context)
    made.autocast = lambda half: torch.autocast(device.type, enabled=False)
    return model, made, AUTHORS | (TINY_TILES if size == "tiny" else {})


CASES = {"world": world, "worldplay": worldplay, "worldplay_steps": worldplay_steps}


class Bench:
    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, folder: pathlib.Path, iterations: int, options: dict[str, Any]) -> None:
        self.case, self.dtype, self.device, self.folder, self.iterations = case, dtype, device, folder, iterations
        self.options = case.options | options
        self.model = copy.deepcopy(case.model).to(dtype)
        self.given = case.calls(self.model, dtype)
        self.wanted: dict[str, dict[str, Any]] = {}  # preset, or "eager" -> call -> result in fp32

    def config(self, preset: str, **more: Any) -> li_compile.Config:
        return li_compile.Config.from_options({"preset": preset} | self.options | more)

    def want(self, graph: str) -> dict[str, Any]:
        """Results in fp32, of eager or of a preset's rewritten graph."""
        if graph not in self.wanted:
            torch._dynamo.reset()
            model = self.case.model if graph == "eager" else li_compile.compile(self.case.model, self.config(graph, lowering="eager"))
            self.wanted[graph] = {n: keep(model(*a, **k)) for n, (a, k) in self.case.calls(self.case.model, torch.float32).items()}
            if graph != "eager":
                model.detach()
        return self.wanted[graph]

    def build(self, preset: str, target: str, more: dict[str, Any], path: pathlib.Path) -> None:
        """Export, unless it stands there. What it took, or why it failed, is noted beside it."""
        note = path.with_suffix(".json")
        if note.exists():
            return
        (args, kwargs), *also = self.given.values()
        start = time.perf_counter()
        try:
            also = [] if len(args) else also  # Doom World's calls are two plans for one way to call it
            report = li_compile.export(self.model, args, kwargs, target=target, path=path, config=self.config(preset), also=also, **more)
            print(report)
            done = {"seconds": time.perf_counter() - start, "MiB": report.size / 2**20, "advice": str(report.advice)}
        except Exception as error:
            traceback.print_exc()
            done = {"failed": f"{type(error).__name__}: {error}"[:600]}
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(done))

    def measure(self, run: Callable[..., Any], graph: str, given: dict[str, tuple[list, dict]], inside: list | None = None) -> dict[str, Any]:
        """{call: ms, ms of the program, errors}"""
        found = {}
        for name, (args, kwargs) in given.items():
            start = time.perf_counter()
            out = keep(run(*args, **kwargs))
            first = time.perf_counter() - start
            for _ in range(3):
                run(*args, **kwargs)
            if inside is not None:
                inside.clear()
            taken = self.timed(lambda: run(*args, **kwargs))
            found[name] = {"ms": 1e3 * statistics.median(seconds(*t) for t in taken), "first s": first, "error": distance(out, self.want("eager")[name]),
                           "rounding": distance(out, self.want(graph)[name])}
            if inside:
                found[name]["program ms"] = 1e3 * statistics.median(seconds(*t) for t in inside)
        return found

    def timed(self, call: Callable[[], Any]) -> list[tuple]:
        """(start, end) of every call, none before the last one's work is done."""
        taken = []
        for _ in range(self.iterations):
            wait(self.device)
            start = moment(self.device)
            call()
            taken.append((start, moment(self.device)))
        wait(self.device)
        return taken

    def peer(self, name: str) -> dict[str, Any]:
        torch._dynamo.reset()
        run = self.model if name == "eager" else self.case.inductor(self.model, name.endswith(RECORDED))
        try:
            return self.measure(run, "eager", self.given)
        finally:
            if hasattr(run, "detach"):  # ours, which prepares the model
                run.detach()

    def backend(self, preset: str, graphs: bool) -> dict[str, Any]:
        torch._dynamo.reset()
        run = li_compile.compile(self.model, self.config(preset, cuda_graphs=graphs))
        try:
            return self.measure(run, preset, self.given)
        finally:
            run.detach()

    def artifact(self, preset: str, path: pathlib.Path) -> dict[str, Any]:
        file = path.with_suffix(".json")
        if not file.exists():
            return {"failed": "not built"}
        note = json.loads(file.read_text())
        if "failed" in note:
            return note
        runner, inside = li_compile.load(path), []
        within = runner.run

        def run(entry, named):
            first = moment(self.device)
            out = within(entry, named)
            inside.append((first, moment(self.device)))
            return out

        runner.run = run
        given = {n: family_inputs(self.model, a, k, self.config(preset)) for n, (a, k) in self.given.items()}
        return note | {"calls": self.measure(runner, preset, given, inside), "made": made_of(runner.manifest)}


def made_of(manifest: Any) -> str:
    """What became of our operators, and what an engine left to PyTorch, over all variants."""
    variants = [v for c in manifest.calls for v in c.variants]
    ways = dict.fromkeys(f"{o['operator'].removeprefix('li::')}: {o['lowering']}" for v in variants for o in v.operators)
    parts = [p for v in variants for p in v.parts.get("segments", ())]
    engines = [f"{sum('engine' in p for p in parts)} engines and {sum('program' in p for p in parts)} PyTorch segments in {len(variants)} variants"] if parts else []
    return "; ".join([*ways, *engines])


def keep(out: Any) -> list[torch.Tensor]:
    return [x.float().cpu() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest over results; of those that are the same size in both."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True) if b.numel())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: dict[str, dict[str, Any]]) -> str:
    """As Markdown, one line a way and call."""
    lines = ["| way | call | ms | program ms | of eager | of Inductor | error | rounding | built s | made of |", "|---|---|---:|---:|---:|---:|---:|---:|---:|---|"]
    peers = {n: rows.get(n, {}).get("calls", {}) for n in PEERS}
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | | | | | | | | | {' '.join(row['failed'].split()).replace('|', '/')} |")
        for call, got in row.get("calls", {}).items():
            of = [f"{peer[call]['ms'] / got['ms']:.2f}x" if call in peer else "" for peer in peers.values()]
            program, built = f"{got['program ms']:.2f}" if "program ms" in got else "", f"{row['seconds']:.0f}" if "seconds" in row else ""
            lines.append(f"| {name} | {call} | {got['ms']:.2f} | {program} | {of[0]} | {of[1]} | {got['error']:.1e} | {got['rounding']:.1e} | {built} | {row.get('made', '')} |")
    return "\n".join(lines)


def main(case: str, tree: str = "", device: str = "cuda", dtype: str = "float16", size: str = "full", blocks: int = 2, context: int = 12, ways: str = "*",
         folder: pathlib.Path | None = None, stage: str = "both", iterations: int = 30, options: str = "{}", out: pathlib.Path = pathlib.Path("out")) -> None:
    """case: world or worldplay. ways: separated by semicolons. size: full or tiny. stage: build, measure, or both."""
    if case not in CASES:
        sys.exit(f"{case!r} is unknown; choose one of {', '.join(CASES)}")
    torch.set_grad_enabled(False)
    where = torch.device(device)
    folder = pathlib.Path(tempfile.mkdtemp()) if folder is None else folder
    bench = Bench(CASES[case](where, size=size, tree=tree, blocks=blocks, context=context), getattr(torch, dtype), where, folder, iterations, json.loads(options))
    machine = {"machine": torch.cuda.get_device_name() if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__,
               "case": case, "size": size, "dtype": dtype, "options": bench.options}
    file = out / f"export_{case}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    rows = earlier["rows"] if {k: earlier.get(k) for k in machine} == json.loads(json.dumps(machine)) else {}
    asked = lambda name: any(fnmatch.fnmatch(name, w.strip()) for w in ways.split(";"))
    measures = stage != "build"

    def note(name: str, measured: Callable[[], dict[str, Any]]) -> None:
        try:
            rows[name] = measured()
        except Exception as error:
            traceback.print_exc()
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(machine | {"rows": rows}, indent=1))
        print(name, json.dumps(rows[name]), flush=True)
        gc.collect()

    recorded = ("", RECORDED) if where.type == "cuda" else ("",)
    for name in filter(asked, ("eager", *(f"Inductor{r}" for r in recorded)) if measures else ()):
        note(name, lambda: {"calls": bench.peer(name)})
    for preset, artifacts in ARTIFACTS.items():
        preset = preset or bench.case.preset
        for graphs in recorded if measures else ():
            if asked(name := f"{preset}, backend{graphs}"):
                note(name, lambda: {"calls": bench.backend(preset, bool(graphs))})
        for target, more in artifacts:
            name = ", ".join([preset, target, *(f"{k}={v}" for k, v in more.items())])
            if asked(name):
                path = folder / f"{case}_{name.replace(', ', '_').replace('=', '_')}"
                if stage != "measure":
                    bench.build(preset, target, more, path)
                if measures:
                    note(name, lambda: bench.artifact(preset, path))
    if measures:
        print(f"\n{machine['machine']}, torch {torch.__version__}, {case}, {size}, {dtype}\n{table(rows)}")


if __name__ == "__main__":
    typer.run(main)

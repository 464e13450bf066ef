"""Doom World, dense and accelerated, side by side: ``li-compile demo``.

Both run the same weights, noise and trajectory, chunk by chunk in turn, so that both see the same load of the machine.
The peer is plain Inductor: ``torch.compile(ChunkSampler(model), backend="inductor")``.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from li_compile import Config, LightInteractionError
from li_compile.backend import last_report
from li_compile.policy import plan_context

from . import media, sources, summary
from .codec import Codec
from .data import Trajectory
from .model import ChunkSampler, WorldModel
from .rollout import FOV, play
from .timing import Timed, context_of, peak_memory
from .weights import load_world

FPS = 35 / 4  # the game's tics a second, four of which make a frame


class DemoError(LightInteractionError):
    """A device or a folder that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says; see ``li-compile demo --help``. lowering: "eager" runs no Inductor, for tests."""

    preset: str = "all"
    device: str = "cpu"
    trajectory: str = "revisit"
    out: pathlib.Path = pathlib.Path("out/demo")
    seed: int = 0
    chunks: int | None = None
    video: bool = True
    lowering: str = "inductor"


def run(settings: Settings, console: Console | None = None,
        world: tuple[WorldModel, Codec] | None = None) -> dict[str, Any]:
    """Play, print and write the demo; returns what is in report.json. world: instead of the trained one.

    Raises LightInteractionError for what the user can put right, before anything is computed.
    """
    console = console or Console()
    began = time.monotonic()
    options = {"preset": settings.preset, "context.fov": FOV, "lowering": settings.lowering}
    config = Config.from_options(options)
    device = _device(settings.device)
    trajectory = sources.load(settings.trajectory, settings.chunks)
    _writable(settings.out)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, codec = world or load_world(device=str(device), dtype=dtype)
    torch.compiler.reset()  # graphs of the caller's own would count against Dynamo's limit of recompilations

    peer = "inductor" if settings.lowering == "inductor" else "eager"
    functions = {"dense": torch.compile(ChunkSampler(model, mark=True), backend=peer),
                 "accelerated": torch.compile(ChunkSampler(model, mark=True), backend="light_interaction", options=options)}
    modes = ["free-running", "teacher-forced"] if sources.has_truth(trajectory) else ["free-running"]
    chunks = len(trajectory.action) // model.config.chunk
    console.print(f"Doom World, trajectory [b]{escape(trajectory.name)}[/b] ({chunks} chunks of {model.config.chunk} frames), preset "
                  f"[b]{settings.preset}[/b] on {device}: dense (plain {peer}) and accelerated in turn, {' and '.join(modes)}.")
    console.print("Graphs are compiled when a context length first comes up. On two CPU cores each takes up to a minute, and "
                  "all takes up to 8; compiling is kept out of the times below.")

    frames = torch.from_numpy(np.ascontiguousarray(trajectory.frames)).permute(0, 3, 1, 2).float().div(255).to(device)
    truth = codec.encode(frames)
    runs: dict[str, dict[str, Timed]] = {}
    videos: dict[str, dict[str, Tensor]] = {}  # frames [T, 3, H, W] in 0..1 on the CPU
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=2 * chunks * len(modes) + 2)
        for mode in modes:
            timed = runs[mode] = {"dense": Timed(functions["dense"]), "accelerated": Timed(functions["accelerated"], config)}
            told = {name: _told(t, f"{mode}, {name}", mode == modes[0], progress, task) for name, t in timed.items()}
            latents = _in_turn(model, told, trajectory, truth, mode == "teacher-forced", settings.seed, dtype)
            played = ", ".join(f"{name} {sum(c.total for c in t.times):.0f} s" for name, t in timed.items())
            progress.console.print(f"  played {mode}: {played}")
            videos[mode] = {name: codec.decode(x).cpu() for name, x in latents.items()}
        memory = {}
        for name, function in functions.items():
            progress.update(task, description=f"{name}: measuring memory")
            with torch.no_grad():
                memory[name] = peak_memory(function, runs[modes[-1]][name].longest)
            progress.advance(task)

    about = {"preset": settings.preset, "peer": peer, "device": _name(device), "dtype": str(dtype).removeprefix("torch."),
             "torch": torch.__version__, "threads": torch.get_num_threads(), "seed": settings.seed,
             "trajectory": trajectory.name, "level": trajectory.level, "chunks": chunks, "options": options}
    reference = frames.cpu() if sources.has_truth(trajectory) else None
    report = summary.summarise(about, config, runs, videos, reference, codec.decode(truth).cpu(), memory, last_report())
    report["files"] = _write(settings, trajectory, videos, report)
    report["seconds_in_all"] = time.monotonic() - began
    media.write_json(settings.out / "report.json", report)
    for part in summary.tables(report):
        console.print(part)
    console.print(f"Written to {escape(str(settings.out))}: {', '.join([*report['files'], 'report.json'])}. "
                  f"{report['seconds_in_all']:.0f} s in all.")
    return report


def _in_turn(model: WorldModel, samplers: dict[str, Callable[..., Tensor]], trajectory: Trajectory, truth: Tensor,
             teacher_forced: bool, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Play a trajectory with each sampler, a chunk of one and then a chunk of the other; name -> latents [T, C, H, W]."""
    w2c, intrinsics, action = (x.to(truth.device) for x in (trajectory.w2c, trajectory.intrinsics, trajectory.action))
    players = [play(model, sampler, truth, w2c, intrinsics, action, teacher_forced, seed, dtype)
               for sampler in samplers.values()]
    latents: tuple[Tensor, ...] = ()
    for latents in zip(*players, strict=True):
        pass
    return dict(zip(samplers, latents))


def _told(timed: Timed, what: str, compiles: bool, progress: Progress, task: Any) -> Callable[..., Tensor]:
    """The sampler, telling the progress bar before each chunk what is about to happen, and what compiling has cost."""
    variants: set[Any] = set()

    def sampler(*args: Tensor) -> Tensor:
        chunk, context, key = len(timed.times), context_of(args), _key(args, timed.config)
        doing = f", compiling for {context} context frames" if compiles and key not in variants else ""
        variants.add(key)
        progress.update(task, description=f"{what}, chunk {chunk}{doing}")
        out = timed(*args)
        if (spent := timed.times[-1].compiling) > 0:
            progress.console.print(f"  {what}, chunk {chunk} ({context} context frames): compiled in {spent:.0f} s")
        progress.advance(task)
        return out

    return sampler


def _key(args: tuple[Tensor, ...], config: Config | None) -> Any:
    """What decides about a graph of its own: no context, the first length (constant), any other; and the plan."""
    context = min(context_of(args), 8)
    if config is None or context < 8 or not (config.context.enabled or config.cache.enabled):
        return context
    plan = plan_context(args[9][0], args[3][0], config)  # the cameras of the context and of the chunk
    return len(plan.indices) if config.context.enabled else context, plan.reuse


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DemoError(f"--device {name!r} is none; choose cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device {name!r} cannot run this; choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda, but torch finds no GPU here; leave --device out to run on the CPU, or see what "
                        "`li-compile doctor` says about the GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DemoError(f"--device {name}, but there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _writable(folder: pathlib.Path) -> None:
    """Make the output folder and try a file in it, so that minutes of work are not lost to a typing error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DemoError(f"--out {folder} cannot be written to ({error.strerror}); choose a folder that can be made and "
                        "written to") from error


def _write(settings: Settings, trajectory: Trajectory, videos: dict[str, dict[str, Tensor]],
           report: dict[str, Any]) -> list[str]:
    """The contact sheet and the video; names of the files."""
    pictures = lambda x: (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seconds = report["time"]["free-running"]
    rows = {"rendered truth": trajectory.frames} if sources.has_truth(trajectory) else {}
    shown = dict(rows)
    for name, frames in videos["free-running"].items():
        shown[f"{name}, {seconds[name]['total']:.1f} s"] = pictures(frames)
    for mode, both in videos.items():
        rows |= {f"{name}, {mode}": pictures(frames) for name, frames in both.items()}
    media.contact_sheet(settings.out / "contact_sheet.png", rows)
    if not settings.video:
        return ["contact_sheet.png"]
    media.write_video(settings.out / "side_by_side.mp4", media.side_by_side(shown), FPS)
    return ["contact_sheet.png", "side_by_side.mp4"]

"""Times of a compiled chunk function: prefill and denoising apart, running and compiling apart; and its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from li_compile import Config, Session
from li_compile.backend import last_report

from ._compat import graphs_compiled

CONTEXT = 7  # position of the context latents [B, C, N, H, W] among a ChunkSampler's arguments

_marks: list[Any] = []


# Any layout will do: without the tag, Inductor would copy the keys and values into the strides that they were traced with.
@torch.library.custom_op("doom_world::mark", mutates_args=(), tags=(torch.Tag.flexible_layout,),
                         schema="(Tensor[] after, Tensor x) -> Tensor")
def mark(after: list[Tensor], x: Tensor) -> Tensor:
    """A copy of x, made once all of ``after`` exists. Notes the moment; what reads the copy comes later."""
    _marks.append(moment(x.device))
    return x.clone()


@mark.register_fake
def _(after: list[Tensor], x: Tensor) -> Tensor:
    return torch.empty_like(x)


def moment(device: torch.device) -> Any:
    """A point in time: seconds on the CPU, an event in the stream's order on a GPU (waiting for it would cost time)."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


@dataclasses.dataclass
class ChunkTime:
    """One chunk. context: latents that it was given; prefill, denoising, compiling: seconds; plan: what the compiler
    decided for it (a row of ``Session.stats()``), None if it had nothing to decide; graph: its index in the compiler's
    report, None for another backend."""

    context: int
    prefill: float
    denoising: float
    compiling: float
    plan: dict[str, Any] | None
    graph: int | None

    @property
    def total(self) -> float:
        return self.prefill + self.denoising


class Timed:
    """A compiled ``ChunkSampler(mark=True)`` that notes the time of each call in ``times``.

    A call that compiled something is run again, and the second run counts; the difference is time of compiling.
    config: of our backend, for the plans; None for another backend.
    """

    def __init__(self, function: Callable[..., Tensor], config: Config | None = None) -> None:
        self.function, self.config = function, config
        self.times: list[ChunkTime] = []
        self.longest: tuple[Tensor, ...] = ()  # arguments of the call with the most context
        self._graphs: dict[int, int] = {}  # context length -> index of its graph
        self._planner = Session(config).planner  # what plans remember of the chunks before

    def __call__(self, *args: Tensor) -> Tensor:
        before = self._compiled()
        out, total, prefill, plan = self._once(args)
        compiling = 0.0
        if self._compiled() != before:
            first = total
            out, total, prefill, plan = self._once(args)
            compiling = max(0.0, first - total)
        context, report = context_of(args), last_report() if self.config is not None else None
        graph = self._graphs.setdefault(context, len(report.graphs) - 1) if report else None
        self.times.append(ChunkTime(context, prefill, total - prefill, compiling, plan, graph))
        if not self.longest or context >= context_of(self.longest):
            self.longest = args
        return out

    def _once(self, args: tuple[Tensor, ...]) -> tuple[Tensor, float, float, dict[str, Any] | None]:
        """(output, seconds in all, seconds of the prefill, plan) of one call."""
        device = args[0].device
        _marks.clear()
        # A session a call, not one a video: a call that compiles is run twice, and only one of them is to be counted.
        with Session(self.config) as session:
            session.planner = self._planner
            start = moment(device)
            out = self.function(*args)
            end = moment(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        plans = session.stats()["per_chunk"]
        prefill = seconds(start, _marks[-1]) if _marks else 0.0
        return out, seconds(start, end), prefill, plans[-1] if plans else None

    def _compiled(self) -> tuple[int, int]:
        report = last_report() if self.config is not None else None
        return graphs_compiled(), sum(len(graph.variants) for graph in report.graphs) if report else 0


def context_of(args: tuple[Tensor, ...]) -> int:
    return args[CONTEXT].shape[2] if len(args) > CONTEXT else 0


def peak_memory(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> int:
    """The most bytes that one call has allocated at a time, above its inputs and the weights."""
    device = args[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function(*args)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU's allocator keeps no peak; the profiler sees each allocation.
    with _quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = function(*args)
    with tempfile.TemporaryDirectory() as folder:
        trace = pathlib.Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    del out
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what C++ writes to stderr from the user: the profiler logs its start, its stop and a missing GPU there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

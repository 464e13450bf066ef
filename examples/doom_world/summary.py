"""The demo's numbers: gathered as plain data for report.json, and shown as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from li_compile import Config
from li_compile.report import GraphReport, Report

from .metrics import psnr, ssim
from .timing import ChunkTime, Timed

SIDES = ("dense", "accelerated")
#: Quality is also judged from this frame on: chunks 0 and 1 have too little context for anything approximate.
WARM = 8
METRICS = {"psnr": psnr, "ssim": ssim}
PAIRS = ("dense against truth", "accelerated against truth", "accelerated against dense")


def summarise(about: dict[str, Any], config: Config, runs: dict[str, dict[str, Timed]],
              videos: dict[str, dict[str, Tensor]], truth: Tensor | None, ceiling: Tensor, memory: dict[str, int],
              compiler: Report) -> dict[str, Any]:
    """All numbers as plain data.

    runs, videos: mode -> side -> times of the chunks, frames [T, 3, H, W] in 0..1; truth: rendered frames, None for
    typed keys; ceiling: the rendered frames (or frame) through the codec; memory: side -> bytes.
    """
    return {
        "about": about,
        "time": {mode: _times(sides) for mode, sides in runs.items()},
        "peak_memory_bytes": memory,
        "quality": {mode: _quality(sides, truth) for mode, sides in videos.items()},
        "codec_against_truth": {k: f(ceiling[1:], truth[1:]).mean for k, f in METRICS.items()} if truth is not None else None,
        "skipped": _skipped(runs["free-running"]["accelerated"].times, about["chunks"], config, compiler),
        "passes": compiler.counts(),
        "compiler": {**compiler.to_dict(), "options": {k: str(v) for k, v in compiler.options.items()}},
    }


def _times(sides: dict[str, Timed]) -> dict[str, Any]:
    """Seconds summed over the chunks, their ratio, and each chunk's own."""
    parts = ("prefill", "denoising", "total", "compiling")
    out: dict[str, Any] = {s: {p: sum(getattr(t, p) for t in sides[s].times) for p in parts} for s in SIDES}
    ratio = lambda p: out["dense"][p] / out["accelerated"][p] if out["accelerated"][p] > 0 else None
    out["ratio"] = {p: ratio(p) for p in parts[:3]}
    out["per_chunk"] = [
        {"context": d.context, "plan": a.plan,
         **{s: {p: getattr(t, p) for p in parts} for s, t in (("dense", d), ("accelerated", a))}}
        for d, a in zip(sides["dense"].times, sides["accelerated"].times, strict=True)]
    return out


def _quality(sides: dict[str, Tensor], truth: Tensor | None) -> dict[str, Any]:
    """range of frames -> metric -> pair -> mean over those frames; frame 0 is given, and never counted."""
    pairs = {PAIRS[2]: (sides["accelerated"], sides["dense"])}
    if truth is not None:
        pairs = {PAIRS[0]: (sides["dense"], truth), PAIRS[1]: (sides["accelerated"], truth)} | pairs
    each = {k: {pair: f(*both).per_frame for pair, both in pairs.items()} for k, f in METRICS.items()}
    frames = len(sides["dense"])
    return {f"frames {first} to {frames - 1}":
            {k: {pair: float(x[first:].mean()) for pair, x in found.items()} for k, found in each.items()}
            for first in (1, WARM) if first < frames}


def _skipped(times: list[ChunkTime], chunks: int, config: Config, compiler: Report) -> dict[str, Any]:
    """Work that the accelerated rollout left out, of what dense does: {kind: {skipped, possible, share}}."""
    plans = [t.plan for t in times if t.plan is not None]
    steps = next((p["steps"] for p in plans if p["steps"]), None)
    found = {"context latents": (sum(p["context_possible"] - p["context_kept"] for p in plans), sum(t.context for t in times))}
    if steps:
        found["denoising calls"] = (sum(p["steps"] - p["calls"] for p in plans), steps * chunks)
    dense = _dense_flops(times, compiler)
    if dense:
        ran = [_flops(t, dense[t.context], config, compiler.graphs[t.graph]) for t in times]
        found["FLOP of products"] = (sum(dense[t.context] for t in times) - sum(ran), sum(dense[t.context] for t in times))
    return {k: {"skipped": a, "possible": b, "share": a / b if b else 0.0} for k, (a, b) in found.items()}


def _dense_flops(times: list[ChunkTime], compiler: Report) -> dict[int, float]:
    """Context length -> operations of the graph as traced; {} where nothing was counted (preset off).

    A dynamic graph is counted at the length that it was traced with. The count is a polynomial of degree two in the
    length (attention of the context to itself), so that three lengths give all others.
    """
    known: dict[int, int] = {}
    traced: set[int] = set()
    for t in times:  # in order: a graph's first chunk is the one that it was traced with
        if t.graph not in traced:
            traced.add(t.graph)
            known[t.context] = compiler.graphs[t.graph].flops
    if not any(known.values()):
        return {}
    points = sorted(known)
    fit = np.polynomial.Polynomial.fit(points, [known[n] for n in points], len(points) - 1)
    return {n: float(known.get(n, fit(n))) for n in {t.context for t in times}}


def _flops(t: ChunkTime, dense: float, config: Config, graph: GraphReport) -> float:
    """Operations of what a chunk ran. A variant of dynamic size is scaled from the length that it was traced with."""
    kept = t.plan["context_kept"] if t.plan and config.context.enabled else None
    reuse = bool(t.plan and t.plan["calls"] != t.plan["steps"])
    variant = next((v for v in graph.variants if (v.kept, v.reuse) == (kept, reuse)), None)
    if variant is None:
        return dense
    return variant.flops if kept is not None else dense * variant.flops / graph.flops


def tables(report: dict[str, Any]) -> Iterator[Any]:
    """What is printed: rich tables and lines."""
    about = report["about"]
    threads = f", {about['threads']} threads" if about["device"] == "CPU" else ""
    yield ""
    yield _time_table(report, f"Seconds of {about['chunks']} chunks, {about['dtype']}, {about['device']}{threads}")
    yield _quality_table(report)
    table = Table("skipped work", "skipped", "of", "share", title="Work that the accelerated run left out", title_justify="left")
    for name, x in report["skipped"].items():
        unit, form = (1e9, "{:.0f} G") if name.startswith("FLOP") else (1, "{:.0f}")
        table.add_row(name, form.format(x["skipped"] / unit), form.format(x["possible"] / unit), f"{x['share']:.0%}")
    yield table
    yield _pass_table(report)


def _time_table(report: dict[str, Any], title: str) -> Table:
    table = Table("", *SIDES, "dense / accelerated", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, times in report["time"].items():
        for part in ("prefill", "denoising", "total"):
            ratio = times["ratio"][part]
            bold = "[b]" if part == "total" else ""
            table.add_row(f"{bold}{mode}, {part}", *(f"{bold}{times[s][part]:.2f}" for s in SIDES),
                          f"{bold}{ratio:.2f}x" if ratio else "")
        table.add_section()
    compiling = [sum(times[s]["compiling"] for times in report["time"].values()) for s in SIDES]
    table.add_row("compiling (not in the above)", *(f"{c:.0f}" for c in compiling), "")
    memory = [report["peak_memory_bytes"][s] for s in SIDES]
    table.add_row("peak memory of a chunk, MB *", *(f"{m / 1e6:.0f}" for m in memory), f"{memory[0] / max(1, memory[1]):.2f}x")
    table.caption = "* allocated by torch at a time in the last chunk with the longest context, above weights and inputs"
    return table


def _quality_table(report: dict[str, Any]) -> Table:
    pairs = PAIRS if report["codec_against_truth"] else PAIRS[2:]
    table = Table("", *(p.replace("accelerated", "accel.").replace("against", "vs") for p in pairs),
                  *(["accel. - dense"] if len(pairs) > 1 else []), title="Quality", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, ranges in report["quality"].items():
        table.add_row(f"[b]{mode}")
        for frames, metrics in ranges.items():
            for metric, values in metrics.items():
                form, unit = ("{:.2f}", " (dB)") if metric == "psnr" else ("{:.3f}", "")
                cells = [form.format(values[p]) for p in pairs]
                if len(pairs) > 1:
                    cells.append(form.replace(":", ":+").format(values[PAIRS[1]] - values[PAIRS[0]]))
                table.add_row(f"{metric.upper()}, {frames}{unit}", *cells)
        table.add_section()
    codec = report["codec_against_truth"]
    if codec:
        table.caption = f"the codec alone, the most that can be had: {codec['psnr']:.2f} dB, SSIM {codec['ssim']:.3f}"
    return table


def _pass_table(report: dict[str, Any]) -> Table:
    counts = ", ".join(f"{name} {count}" for name, count in report["passes"].items()) or "none"
    table = Table("graph", "variant", "GFLOP", "sites rewritten", title=f"What each pass did (most sites a graph, summed): {counts}",
                  title_justify="left")
    for graph in report["compiler"]["graphs"]:
        found = "; ".join(graph["found"]) or ("no pattern found" if graph["variants"] else "left to Inductor")
        flops = f"{graph['flops'] / 1e9:.1f}" if graph["flops"] else ""
        table.add_row(str(graph["index"]), f"as traced: {escape(found)}", flops, "")
        for v in graph["variants"]:
            context = "all context" if v["kept"] is None else f"{v['kept']} context frames"
            done = ", ".join(f"{r['name']} {r['count']}" for r in v["records"] if r["count"])
            table.add_row("", f"  {context}, {'cached steps' if v['reuse'] else 'every step'}", f"{v['flops'] / 1e9:.1f}", done or "-")
        table.add_section()
    return table

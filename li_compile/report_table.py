"""A report as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from li_compile.passes.record import Record
from li_compile.report import GraphReport, Report, VariantReport, Work


def tables(report: Report) -> Iterator[Table | str]:
    """What rich prints for a report."""
    for graph in report.graphs:
        yield _patterns(graph)
        if graph.sites:
            yield _sites(graph)
        if left := graph.left_alone():
            table = Table("left alone", "times", "where", "why", title_justify="left")
            for miss, count in left:
                table.add_row(f"[yellow]{escape(miss.pattern)}", str(count), escape(f"{miss.node} {miss.where}".strip()), escape(miss.reason))
            yield table
    if report.prepared:
        yield f"prepared before tracing: {escape(', '.join(dict.fromkeys(report.prepared)))}"
    for one in report.breaks:
        yield f"[red]graph break:[/red] {escape(str(one))}"
    if report.advice is not None:
        yield escape(str(report.advice))
    if report.machine is not None:
        m = report.machine
        peak = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {dtype}" for dtype, flops in m.peak.items())
        yield escape(f"Milliseconds are the roofline of {m.name}: {peak}, {m.bandwidth / 1e9:.3g} GB/s ({m.source}); of products only, "
                     "nothing runs that fast.")


def number(value: float, unit: float) -> str:
    return f"{value / unit:,.{2 if abs(value) < 100 * unit else 0}f}"


def _patterns(graph: GraphReport) -> Table:
    whole = _total(graph)
    table = Table(title=f"Graph {graph.index}: {graph.nodes} nodes, {whole}", title_justify="left")
    table.add_column("pattern or pass")
    table.add_column("found / done")
    for name in ("GFLOP saved", "MB saved", "ms saved"):
        table.add_column(name, justify="right")
    for name, what in graph.found.items():
        table.add_row(escape(name), escape(str(what)))
    for record in graph.prepared:
        table.add_row(escape(record.name), escape(_done(record)), *_saved(None, record))
    for variant in graph.variants:
        table.add_section()
        table.add_row(f"[bold]{variant.label}", f"[bold]{_total(variant)}")
        saved = {e.name: e.saved for e in variant.effects}
        for record in variant.records:
            table.add_row(f"  {record.name}", escape(_done(record)), *_saved(saved.get(record.name), record))
    return table


def _done(record: Record) -> str:
    detail = "; ".join(dict.fromkeys(record.details)) or ("nothing to do" if not record.count else "")
    return f"{record.count} x  {_short(detail)}"


def _total(what: GraphReport | VariantReport) -> str:
    time = "" if what.ms is None else f", {number(what.ms, 1)} ms"
    return f"{number(what.flops, 1e9)} GFLOP, {number(what.bytes, 1e6)} MB{time} in products"


def _saved(work: Work | None, record: Record) -> tuple[str, str, str]:
    """work: what explain found that the pass saves; a report of compiled graphs has the record's counts alone."""
    flops, moved = (record.flops, record.bytes) if work is None else (work.flops, work.bytes)
    if not (flops or moved):
        return "", "", ""
    return number(flops, 1e9), number(moved, 1e6), "" if work is None else number(work.ms, 1)


def _sites(graph: GraphReport) -> Table:
    table = Table("site", "times", "matched by", "variant", "GFLOP", "MB", "ms", "done by", title_justify="left")
    for column in table.columns[4:7]:
        column.justify = "right"
    for site in graph.sites:
        table.add_section()
        table.add_row(escape(f"{site.node}\n{site.where}"), str(site.times), escape(site.pattern), "as traced", *_work(site.before), "dense")
        for label, (work, operators) in site.after.items():
            table.add_row("", "", "", label, *_work(work), escape(operators))
    return table


def _work(work: Work) -> tuple[str, str, str]:
    return number(work.flops, 1e9), number(work.bytes, 1e6), number(work.ms, 1)


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

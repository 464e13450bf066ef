"""Reports: what was found in each graph, what was rewritten and with what effect, and what was left alone and why."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class VariantReport:
    """One variant of a graph. kept: context frames (None: all that are given); reuse: cached steps."""

    kept: int | None
    reuse: bool
    records: list[Any]  # of li_compile.passes.record.Record
    flops: int
    bytes: int

    @property
    def label(self) -> str:
        context = "all context" if self.kept is None else f"{self.kept} context frames"
        return f"{context}, {'cached steps' if self.reuse else 'every step'}"

    def counts(self) -> dict[str, int]:
        """Pass name -> number of sites that it rewrote."""
        return {r.name: r.count for r in self.records}


@dataclasses.dataclass
class GraphReport:
    """One graph that Dynamo traced. flops and bytes: as traced, of products only (passes/cost.py)."""

    index: int
    nodes: int
    found: dict[str, Any]  # pattern -> what was found, plain data
    misses: list[Any]  # of li_compile.patterns.Miss
    flops: int = 0
    bytes: int = 0
    variants: list[VariantReport] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """What the compiler did with a function: ``str(report)`` is a table, ``to_dict()`` plain data.

    ``graphs`` holds one GraphReport for each graph that was traced, in order; ``prepared``: attributes that the family's
    preparation changes before tracing.
    """

    options: dict[str, Any]
    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    breaks: list[str] = dataclasses.field(default_factory=list)
    prepared: list[str] = dataclasses.field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Pass name -> the most sites that it rewrote in any variant, summed over graphs."""
        total: dict[str, int] = {}
        for graph in self.graphs:
            best: dict[str, int] = {}
            for variant in graph.variants:
                for name, count in variant.counts().items():
                    best[name] = max(best.get(name, 0), count)
            for name, count in best.items():
                total[name] = total.get(name, 0) + count
        return total

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON."""
        return dataclasses.asdict(self)

    def __rich_console__(self, console, options):
        from rich.markup import escape
        from rich.table import Table

        for graph in self.graphs:
            table = Table(title=f"Graph {graph.index}: {graph.nodes} nodes, {graph.flops / 1e9:.2f} GFLOP, "
                                f"{graph.bytes / 1e6:.0f} MB in products", title_justify="left")
            table.add_column("pattern or pass")
            table.add_column("found / done")
            table.add_column("GFLOP", justify="right")
            table.add_column("MB", justify="right")
            for name, what in graph.found.items():
                table.add_row(escape(name), escape(str(what)))
            for variant in graph.variants:
                table.add_section()
                table.add_row(f"[bold]{variant.label}", "", f"{variant.flops / 1e9:.2f}", f"{variant.bytes / 1e6:.0f}")
                for record in variant.records:
                    detail = "; ".join(dict.fromkeys(record.details)) or ("nothing to do" if not record.count else "")
                    table.add_row(f"  {record.name}", escape(f"{record.count} x  {_short(detail)}"))
            misses = {(m.pattern, m.reason): m for v in graph.variants for r in v.records for m in r.misses}
            misses |= {(m.pattern, m.reason): m for m in graph.misses}
            if misses:
                table.add_section()
                for m in misses.values():
                    table.add_row(f"[yellow]not {escape(m.pattern)}", escape(f"{m.node}: {m.reason}" + (f"  ({m.where})" if m.where else "")))
            yield table
        if self.prepared:
            yield f"prepared before tracing: {escape(', '.join(dict.fromkeys(self.prepared)))}"
        for line in self.breaks:
            yield f"[red]graph break:[/red] {escape(line)}"

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, record=True, file=_Null())
        console.print(self)
        return console.export_text()


class _Null:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

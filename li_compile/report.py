"""Reports: what was found in each graph, what was rewritten and with what effect, and what was left alone and why."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from li_compile.breaks import Break
    from li_compile.exporting.advice import Advice
    from li_compile.outlines import Outline
    from li_compile.roofline import Machine


@dataclasses.dataclass
class Work:
    """Operations, bytes and, at the device's roofline, milliseconds of products (passes/cost.py, roofline.py)."""

    flops: int
    bytes: int
    ms: float

    def __sub__(self, other: Work) -> Work:
        return Work(self.flops - other.flops, self.bytes - other.bytes, self.ms - other.ms)


@dataclasses.dataclass
class PassEffect:
    """What one pass saved in one variant. Negative numbers: it costs that much."""

    name: str
    saved: Work


@dataclasses.dataclass
class SiteReport:
    """Attention that was matched at one line, alike in all layers and steps. node: the first of them; pattern: by what it
    was matched; where: the user's line; times: how often it runs; before: its work as traced, all times together; after: the same in each variant, by the variant's label, with
    the operators that do it."""

    node: str
    pattern: str
    where: str
    times: int
    before: Work
    after: dict[str, tuple[Work, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class VariantReport:
    """One variant of a graph. kept: context frames (None: all that are given); reuse: cached steps; seconds: to compile it.

    Of ``explain`` alone: effects, of each pass; ms, at the roofline; outline, of the graph as rewritten.
    """

    kept: int | None
    reuse: bool
    records: list[Any]  # of li_compile.passes.record.Record
    flops: int
    bytes: int
    ms: float | None = None
    effects: list[PassEffect] = dataclasses.field(default_factory=list)
    outline: Outline | None = None
    seconds: float | None = None

    @property
    def label(self) -> str:
        context = "all context" if self.kept is None else f"{self.kept} context frames"
        return f"{context}, {'cached steps' if self.reuse else 'every step'}"

    def counts(self) -> dict[str, int]:
        """Pass name -> number of sites that it rewrote."""
        return {r.name: r.count for r in self.records}


@dataclasses.dataclass
class GraphReport:
    """One graph that Dynamo traced. flops and bytes: as traced, of products only (passes/cost.py).

    prepared: what the family's preparation left out before tracing, records as of passes; no part of flops and bytes.
    Of ``explain`` alone: sites, the attention that was matched; ms, at the roofline; outline, of the graph as traced.
    """

    index: int
    nodes: int
    found: dict[str, Any]  # pattern -> what was found, plain data
    misses: list[Any]  # of li_compile.patterns.Miss
    flops: int = 0
    bytes: int = 0
    variants: list[VariantReport] = dataclasses.field(default_factory=list)
    ms: float | None = None
    sites: list[SiteReport] = dataclasses.field(default_factory=list)
    outline: Outline | None = None
    prepared: list[Any] = dataclasses.field(default_factory=list)  # of li_compile.passes.record.Record

    def left_alone(self) -> list[tuple[Any, int]]:
        """Everything that was not matched or not rewritten, one for each pattern, reason and line, and how often."""
        count: dict[tuple, list] = {}
        for miss in [*self.misses, *dict.fromkeys(m for v in self.variants for r in v.records for m in r.misses)]:
            count.setdefault((miss.pattern, miss.reason, miss.where), [miss, 0])[1] += 1
        return [(miss, n) for miss, n in count.values()]


@dataclasses.dataclass
class Report:
    """What the compiler did with a function: ``str(report)`` is a table, ``to_dict()`` plain data, ``html()`` a page.

    ``graphs`` holds one GraphReport for each graph that was traced, in order; ``breaks`` the places at which tracing
    stopped; ``machine`` whose roofline the milliseconds are of (None where nothing was priced, as after compiling);
    ``prepared``: attributes that the family's preparation changes before tracing; ``advice``: which target of ``export`` suits the graphs on
    their device and why (of ``explain`` alone).
    """

    options: dict[str, Any]
    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    breaks: list[Break] = dataclasses.field(default_factory=list)
    machine: Machine | None = None
    prepared: list[str] = dataclasses.field(default_factory=list)
    advice: Advice | None = None

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

    def html(self, path: str | pathlib.Path | None = None) -> str:
        """The report as one HTML page that needs nothing else; also written to ``path`` where that is given."""
        from li_compile.report_page import page

        text = page(self)
        if path is not None:
            pathlib.Path(path).write_text(text, encoding="utf-8")
        return text

    def __rich_console__(self, console, options):
        from li_compile.report_table import tables

        yield from tables(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, record=True, file=_Null())
        console.print(self)
        return console.export_text()


class _Null:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...

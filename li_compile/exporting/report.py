"""What an export made, or would make: a table, and plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from li_compile.exporting.advice import Advice


@dataclasses.dataclass
class VariantRow:
    """One variant. operators: rows of ``lowering.lower_operators``; parts: what the target wrote, empty where nothing was."""

    call: int
    name: str
    kept: int | None
    reuse: bool | None
    passes: dict[str, int]
    operators: list[dict[str, Any]]
    caches: list[str] = dataclasses.field(default_factory=list)
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float | None = None


@dataclasses.dataclass
class ExportReport:
    """``str(report)`` is a table, ``to_dict()`` plain data. path: of the artifact; None where nothing was built. unavailable: why
    the target cannot be built here. weights: their bytes, stored once (engines hold their own). left_alone: pattern, reason and source line of
    what was not found or not rewritten. advice: which target suits these graphs on their device, and why."""

    target: str
    gates: str
    path: str | None
    variants: list[VariantRow]
    weights: int = 0
    size: int = 0
    unavailable: str | None = None
    left_alone: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    advice: Advice | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __rich_console__(self, console, options):
        from rich.markup import escape
        from rich.table import Table

        table = Table("call", "variant", "rewrites", "our operators", "caches", "seconds", title=f"{self.target}, gates: {self.gates}")
        for v in self.variants:
            rewrites = ", ".join(f"{n} {name}" for name, n in v.passes.items() if n)
            operators = "\n".join(f"{o['calls']} {o['operator']}: {o['lowering']} ({o['why']})" for o in v.operators)
            table.add_row(str(v.call), v.name, escape(rewrites), escape(operators or "none"), str(len(v.caches)),
                          "" if v.seconds is None else f"{v.seconds:.1f}")
        yield table
        if self.path is not None:
            yield f"{escape(self.path)}: {self.size / 2**20:,.1f} MiB, {self.weights / 2**20:,.1f} of them weights"
        if self.unavailable is not None:
            yield f"[yellow]cannot be built here:[/yellow] {escape(self.unavailable)}"
        if self.advice is not None:
            yield escape(str(self.advice))
        for note in [*self.notes, *(f"left alone, {m['pattern']}: {m['reason']} {m['where']}" for m in self.left_alone)]:
            yield escape(note)

    def __str__(self) -> str:
        import io

        from rich.console import Console

        console = Console(width=140, record=True, file=io.StringIO())
        console.print(self)
        return console.export_text()

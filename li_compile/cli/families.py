"""``li-compile families``: the model families that are known by name."""

from __future__ import annotations

import typer


def command() -> None:
    """List the model families whose models are prepared for tracing."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    known = registered()
    if not known:
        typer.echo("No model family is registered; models are matched by pattern alone.")
        return
    table = Table("family", "about")
    for name, about in known:
        table.add_row(escape(name), escape(about))
    Console().print(table)


def registered() -> list[tuple[str, str]]:
    """Name and one line about each registered family, by name."""
    # From the module that defines it: `li_compile.patterns.families` is also the name of a sub-package.
    from li_compile.patterns.registry import families

    return sorted((family.name, family.description) for family in families().values())

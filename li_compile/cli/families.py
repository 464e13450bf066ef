"""``li-compile families``: the model families and patterns that are known by name, and who brought them."""

from __future__ import annotations


def command() -> None:
    """List the model families and the registered patterns, with the package that each comes from."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from li_compile.patterns import registry

    origins, console = registry.origins(), Console()
    table = Table("family", "about", "from")
    for name, family in sorted(registry.families().items()):
        table.add_row(escape(name), escape(family.description), escape(origins.get(name, "?")))
    console.print(table)
    table = Table("pattern", "of", "from")
    for pattern in registry.patterns():
        table.add_row(escape(pattern.name), pattern.kind, escape(pattern.origin))
    console.print(table)


def registered() -> list[tuple[str, str]]:
    """Name and one line about each registered family, by name."""
    # From the module that defines it: `li_compile.patterns.families` is also the name of a sub-package.
    from li_compile.patterns.registry import families

    return sorted((family.name, family.description) for family in families().values())

"""The ``li-compile`` command: one module a sub-command, torch imported only inside the functions that need it.

To add one: write ``li_compile/cli/NAME.py`` with a function ``command`` and add the module to ``COMMANDS``.
"""

from __future__ import annotations

import typer

from li_compile.cli import demo, doctor, explain, export, families, run, warm

__all__ = ["app"]

COMMANDS = (demo, explain, warm, export, run, doctor, families)

app = typer.Typer(
    name="li-compile",
    help="A torch.compile backend for video world models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for module in COMMANDS:
    app.command(module.__name__.rpartition(".")[2])(module.command)

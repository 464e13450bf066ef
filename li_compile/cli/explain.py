"""``li-compile explain``: what would be rewritten in a function, and why something would not."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Annotated

import typer

from li_compile.cli.told import config_of, errors_told


def command(
    target: Annotated[str, typer.Argument(help="MODULE:FUNCTION; FUNCTION() returns (model or function, args) or "
                                               "(model or function, args, kwargs).")] = "doom_world.example:chunk",
    preset: Annotated[str, typer.Option(help="off, exact, context, sparse, cache or all.")] = "all",
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, such as sparse.topk_ratio=0.25; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[pathlib.Path | None, typer.Option(help="Write the report as a page, with the graph before and after.")] = None,
) -> None:
    """Trace a function, find the patterns, and show what every pass would do; runs nothing of the model."""
    from rich.console import Console

    with errors_told():
        from li_compile.explaining import explain

        config = config_of(preset, option)
        function, args, kwargs = load(target)
        report = explain(function, *args, config=config, **kwargs)
    if html is not None:
        report.html(html)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, default=str))
    else:
        Console().print(report)


def load(target: str) -> tuple[object, tuple, dict]:
    """(function, args, kwargs) that a target names; a checkout's ``examples`` folder is searched too."""
    from li_compile.errors import ConfigError

    module, colon, name = target.partition(":")
    if not colon:
        raise ConfigError(f"target {target!r} is no MODULE:FUNCTION, such as doom_world.example:chunk")
    for folder in (pathlib.Path.cwd(), pathlib.Path(__file__).resolve().parents[2] / "examples"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        made = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"target {target!r} cannot be loaded: {error}") from error
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[1], (tuple, list)):
        raise ConfigError(f"{target}() must return (function, args) or (function, args, kwargs)")
    return made[0], tuple(made[1]), dict(made[2]) if len(made) == 3 else {}

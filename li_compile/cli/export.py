"""``li-compile export``: write an accelerated model into a folder."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from li_compile.cli.explain import load
from li_compile.cli.told import config_of, errors_told


def command(
    model: Annotated[str, typer.Argument(help="MODULE:FUNCTION; FUNCTION() returns (model or function, args) or (model or function, args, kwargs), "
                                              "with the longest context.")] = "doom_world.example:chunk",
    path: Annotated[pathlib.Path | None, typer.Option(help="Folder to be made; without one, only the report is shown.")] = None,
    target: Annotated[str, typer.Option(help="exported_program, aot_inductor, onnx or tensorrt.")] = "exported_program",
    preset: Annotated[str, typer.Option(help="off, exact, context, sparse, cache or all.")] = "all",
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, such as sparse.topk_ratio=0.25; repeatable.")] = None,
    gates: Annotated[str, typer.Option(help="variants: a program for each plan; device: one, with a condition in it.")] = "variants",
    sparse: Annotated[str, typer.Option(help="auto, native, compiled, segment or plugin: what becomes of block-sparse attention.")] = "auto",
    also: Annotated[list[str] | None, typer.Option(help="MODULE:FUNCTION for another way in which the model is called, such as without context; "
                                                        "repeatable.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where part of a graph would be left to PyTorch or to a plugin.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once all is built.")] = False,
) -> None:
    """Trace a model, rewrite it as the backend does, and write an artifact that `li-compile run` and `li_compile.load` run."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with errors_told():
        from li_compile.exporting import export, export_report

        config = config_of(preset, option)
        function, args, kwargs = load(model)
        more = [load(name)[1:] for name in also or []]
        if path is None:
            report = export_report(function, args, kwargs, target=target, config=config, gates=gates, sparse=sparse, also=more)
        else:
            with Progress(SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed} of {task.total}"), TimeElapsedColumn(),
                          console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task("tracing", total=None)
                report = export(function, args, kwargs, target=target, path=path, config=config, gates=gates, sparse=sparse, strict=strict,
                                overwrite=overwrite, also=more,
                                progress=lambda what, done, total: progress.update(task, description=what, completed=done, total=total))
    Console().print(report)

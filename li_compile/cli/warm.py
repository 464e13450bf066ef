"""``li-compile warm``: compile ahead of time what a rollout will need, into PyTorch's caches."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from li_compile.cli.explain import load
from li_compile.cli.told import config_of, errors_told


def command(
    target: Annotated[str, typer.Argument(help="MODULE:FUNCTION; FUNCTION() returns (model or function, args) or (model or function, "
                                               "args, kwargs), with as much context as a late chunk has.")] = "doom_world.example:chunk",
    preset: Annotated[str, typer.Option(help="off, exact, context, sparse, cache or all.")] = "all",
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, such as sparse.topk_ratio=0.25; repeatable.")] = None,
) -> None:
    """Compile every variant that a plan can choose; the next process with the same options and shapes finds them in the caches."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    with errors_told():
        from li_compile.compiling import compile

        config = config_of(preset, option)
        function, args, kwargs = load(target)
        import torch
        from torch._dynamo.utils import counters

        counters.clear()
        started = time.perf_counter()
        with torch.no_grad(), console.status(f"compiling {escape(target)}"):
            report = compile(function, config).warm_up(*args, **kwargs)
    table = Table("graph", "variant", title=f"{target}, preset {config.preset}", title_justify="left")
    table.add_column("seconds", justify="right")
    for graph in report.graphs:
        for variant in graph.variants:
            table.add_row(str(graph.index), variant.label, f"{variant.seconds:.1f}")
    console.print(table)
    found, made = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
    console.print(f"{time.perf_counter() - started:.1f} s in all; Inductor compiled {made} graphs and took {found} from its cache")

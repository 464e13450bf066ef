"""``li-compile run``: run an artifact that ``li-compile export`` wrote."""

from __future__ import annotations

import pathlib
import statistics
import time
from typing import Annotated

import typer

from li_compile.cli.explain import load as load_inputs
from li_compile.cli.told import errors_told


def command(
    path: Annotated[pathlib.Path, typer.Argument(help="Folder of the artifact.")],
    inputs: Annotated[str, typer.Argument(help="MODULE:FUNCTION; FUNCTION() returns (model or function, args) or (model or function, args, "
                                               "kwargs).")] = "doom_world.example:chunk",
    repeat: Annotated[int, typer.Option(min=1, help="Calls to time; the median is shown.")] = 3,
    save: Annotated[pathlib.Path | None, typer.Option(help="Write the last result here, with torch.save.")] = None,
) -> None:
    """Check an artifact, run it, and show what was decided, what came out and how long a call took."""
    from rich.console import Console
    from rich.markup import escape

    with errors_told():
        import torch
        from torch.utils._pytree import tree_leaves

        from li_compile.exporting import family_inputs, load
        from li_compile.session import Session

        runner = load(path)
        model, args, kwargs = load_inputs(inputs)
        args, kwargs = family_inputs(model, args, kwargs, runner.config)
        seconds = []
        with Session(runner.config) as session:
            for _ in range(repeat + 1):
                start = time.perf_counter()
                result = runner(*args, **kwargs)
                if runner.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
    console = Console(highlight=False, soft_wrap=True)
    m = runner.manifest
    console.print(escape(f"{path}: {m.target} for {m.device['name']}, {sum(len(c.variants) for c in m.calls)} variants, gates: {m.gates}"))
    for chunk in session.stats()["per_chunk"][-1:]:
        console.print(escape(f"plan: {chunk['context_kept']} of {chunk['context_possible']} context frames, {chunk['calls']} of {chunk['steps']} steps "
                             f"computed ({chunk['reason']})"))
    for i, x in enumerate(t for t in tree_leaves(result) if isinstance(t, torch.Tensor)):
        console.print(f"result {i}: {str(x.dtype).removeprefix('torch.')} {list(x.shape)}, mean {x.float().mean():.6g}, "
                      f"standard deviation {x.float().std(correction=0):.6g}", markup=False)
    console.print(f"{statistics.median(seconds[1:]) * 1000:.1f} ms a call, median of {repeat}; the first took {seconds[0] * 1000:.1f} ms")
    if save is not None:
        torch.save(result, save)

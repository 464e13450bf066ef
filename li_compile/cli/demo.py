"""``li-compile demo``: play Doom World dense and accelerated, side by side. Works from a checkout of the repository."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Annotated

import typer

from li_compile.cli.told import errors_told

PACKAGES = {"imageio_ffmpeg": "imageio-ffmpeg", "PIL": "pillow", "torchmetrics": "torchmetrics"}  # of [examples]
TRAJECTORIES = "explore, loop, revisit, revisit_unseen, still, sudden"


def command(
    preset: Annotated[str, typer.Option(help="What to accelerate: off, exact, context, sparse, cache or all.")] = "all",
    device: Annotated[str, typer.Option(help="cpu, or cuda (bfloat16).")] = "cpu",
    trajectory: Annotated[str, typer.Option(help=f"{TRAJECTORIES}; a path to an .npz; or typed keys, see above.")] = "revisit",
    out: Annotated[pathlib.Path, typer.Option(help="Folder for the video, the contact sheet and report.json.")] = pathlib.Path("out/demo"),
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    chunks: Annotated[int | None, typer.Option(min=2, max=16, help="Play only the first chunks, of 4 frames each.")] = None,
    video: Annotated[bool, typer.Option("--video/--no-video", help="Write side_by_side.mp4.")] = True,
) -> None:
    """Play a trajectory of a learned world dense and accelerated; print what was gained and what it cost.

    The peer is plain Inductor. On two CPU cores it takes up to 8 minutes, most of it compiling; --chunks 5 takes less.

    Typed keys for --trajectory: w a s d move, < > turn (or the words left, right, up, down, or arrows), . stands.
    A run, one frame each: 'wwww<<<<'. Counts: 'left*11,right*11,w*9'. Held together: 'w+left*4'. Quote them.
    At most 63; they start where revisit does, meet no walls, have no ground truth, and end with standing still.
    """
    with errors_told():
        demo = doom_world()
        demo.run(demo.Settings(preset, device, trajectory, out, seed, chunks, video))


def doom_world():
    """The demo's module, from the checkout that this package is installed from; an error where there is none."""
    from li_compile.errors import LightInteractionError

    examples = pathlib.Path(__file__).resolve().parents[2] / "examples"
    if not (examples / "doom_world" / "demo.py").is_file():
        raise LightInteractionError(f"the demo needs a checkout of the repository, and {examples} is not there; clone it and "
                                    "run `pip install -e '.[examples]'` in it")
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise LightInteractionError(f"the demo needs {', '.join(missing)}; run `pip install -e '.[examples]'` in the checkout")
    if str(examples) not in sys.path:
        sys.path.insert(0, str(examples))
    from doom_world import demo

    return demo

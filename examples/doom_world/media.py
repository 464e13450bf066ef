"""Videos, contact sheets and reports, written so that a half-written file is never found under the final name."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from li_compile.errors import LightInteractionError

_MARGIN = 4  # pixels between pictures and around labels
_INK, _PAPER = (235, 235, 235), (24, 24, 24)


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: float) -> Path:
    """Write ``frames`` as H.264 (yuv420p, so that browsers play it), replacing what was at ``path``.

    Args:
        path: file to write, its suffix a container that ffmpeg knows (".mp4"); its folder is made if need be.
        frames: ``[T, H, W, 3]`` uint8, T at least 1. Odd heights and widths lose their last row or column.
        fps: frames a second, positive.

    Raises:
        LightInteractionError: frames of another shape or dtype, a folder that cannot be written, or a failed encoder.
    """
    import imageio_ffmpeg

    frames = _checked("frames", frames)
    if not fps > 0:
        raise LightInteractionError(f"fps is {fps}; it must be positive")
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    height, width = frames.shape[1:3]
    if not (height and width):
        raise LightInteractionError("a single row or column makes no video; H.264 needs at least 2 x 2 pixels")
    with _replacing(Path(path)) as temporary:
        # macro_block_size 2 keeps the size as it is: the default would stretch it to multiples of 16.
        settings = {"codec": "libx264", "pix_fmt_out": "yuv420p", "macro_block_size": 2, "quality": 8}
        writer = imageio_ffmpeg.write_frames(str(temporary), (width, height), fps=fps, **settings)
        try:
            writer.send(None)
            for frame in frames:
                writer.send(np.ascontiguousarray(frame))
        finally:
            writer.close()
        if not temporary.is_file() or temporary.stat().st_size == 0:
            raise LightInteractionError(f"ffmpeg wrote nothing for {path}; is its suffix one of a video, like .mp4?")
    return Path(path)


def side_by_side(
    videos: Mapping[str, np.ndarray], labels: Mapping[str, str] | None = None, upscale: int = 3
) -> np.ndarray:
    """Videos next to each other, each under its label, enlarged without smoothing.

    Args:
        videos: name -> ``[T, H, W, 3]`` uint8, all of one shape.
        labels: name -> text above the video; the name where there is none.
        upscale: whole factor of enlargement.

    Returns:
        ``[T, H', W', 3]`` uint8 with even H' and W', as ``write_video`` wants them.
    """
    if not videos:
        raise LightInteractionError("no videos were given; give at least one, as a dict of name and frames")
    if not isinstance(upscale, int) or upscale < 1:
        raise LightInteractionError(f"upscale is {upscale!r}; it must be a whole number, at least 1")
    clips = {name: _checked(f"video {name!r}", clip) for name, clip in videos.items()}
    shapes = {name: clip.shape for name, clip in clips.items()}
    if len(set(shapes.values())) > 1:
        raise LightInteractionError(f"videos differ in shape, {shapes}; cut or resize them to one [T, H, W, 3]")
    columns = []
    for name, clip in clips.items():
        large = clip.repeat(upscale, axis=1).repeat(upscale, axis=2)
        strip = _label((labels or {}).get(name, name), large.shape[2])
        column = np.concatenate((np.broadcast_to(strip, (len(clip), *strip.shape)), large), axis=1)
        columns.append(np.pad(column, ((0, 0), (0, 0), (0, _MARGIN), (0, 0))))
    joined = np.concatenate(columns, axis=2)[:, :, :-_MARGIN]
    return np.pad(joined, ((0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)))


def contact_sheet(path: str | os.PathLike[str], rows: Mapping[str, np.ndarray], every: int = 4) -> Path:
    """Write one picture: a row of every ``every``-th frame for each video, its label above.

    Args:
        path: picture to write (".png", ".jpg"). rows: label -> ``[T, H, W, 3]`` uint8, of any lengths and sizes.

    Raises:
        LightInteractionError: no rows, a wrong shape or dtype, ``every`` below 1, a folder that cannot be written.
    """
    if not rows or every < 1:
        raise LightInteractionError(f"{len(rows)} rows, every {every}; give a row or more, and 1 or more for every")
    strips = []
    for label, frames in rows.items():
        shown = _checked(f"row {label!r}", frames)[::every]
        line = np.concatenate([np.pad(frame, ((0, _MARGIN), (0, _MARGIN), (0, 0))) for frame in shown], axis=1)
        strips += [_label(label, line.shape[1]), line]
    width = max(strip.shape[1] for strip in strips)
    sheet = np.concatenate([np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0))) for strip in strips])
    with _replacing(Path(path)) as temporary:
        try:
            Image.fromarray(sheet).save(temporary)
        except ValueError as error:
            raise LightInteractionError(f"cannot write {path}: {error}; use a suffix such as .png") from None
    return Path(path)


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write plain data as JSON, replacing what was at ``path``."""
    text = json.dumps(data, indent=1, allow_nan=False)
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _checked(name: str, frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0:
        raise LightInteractionError(
            f"{name}: found {frames.dtype} {list(frames.shape)}; give uint8 [T, H, W, 3] with at least one frame"
        )
    return frames


def _label(text: str, width: int) -> np.ndarray:
    """A strip ``[height, width, 3]`` with ``text``, cut to the width."""
    font = ImageFont.load_default(size=12)
    strip = Image.new("RGB", (width, 12 + 2 * _MARGIN), _PAPER)
    ImageDraw.Draw(strip).text((_MARGIN, _MARGIN - 1), text, fill=_INK, font=font)
    return np.asarray(strip)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder (a rename across disks is not atomic), moved to ``path`` on success only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise LightInteractionError(
            f"cannot write {path}: {error.strerror} ({path.parent}); choose a folder that can be made and written to"
        ) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except OSError as error:
        raise LightInteractionError(f"cannot write {path}: {error}; check the folder and the space left") from error
    finally:
        temporary.unlink(missing_ok=True)

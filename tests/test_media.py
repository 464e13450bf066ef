"""Example media: files appear whole or not at all, and quality numbers are what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from li_compile.errors import LightInteractionError

pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("PIL.Image")
imageio = pytest.importorskip("imageio.v3")
pytest.importorskip("torchmetrics")

from examples.doom_world.media import contact_sheet, side_by_side, write_video  # noqa: E402
from examples.doom_world.metrics import PSNR_CAP, psnr, ssim  # noqa: E402


def clip(count=6, height=48, width=64, shade=0):
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    frames[..., 1] = (np.arange(count) * 30)[:, None, None]
    frames[..., 2] = shade
    return frames


def test_video_reads_back(tmp_path):
    frames = clip()
    path = write_video(tmp_path / "made" / "a.mp4", frames, fps=8)
    back = imageio.imread(path, plugin="FFMPEG")
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 6
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_odd_sizes_lose_a_row(tmp_path):
    path = write_video(tmp_path / "odd.mp4", clip(2, 33, 35), fps=8)
    assert imageio.imread(path, plugin="FFMPEG").shape == (2, 32, 34, 3)


def test_a_failure_midway_keeps_the_old_file(tmp_path, monkeypatch):
    import imageio_ffmpeg

    path = write_video(tmp_path / "a.mp4", clip(), fps=8)
    before = path.read_bytes()
    real = imageio_ffmpeg.write_frames

    def breaks(*args, **kwargs):
        inner = real(*args, **kwargs)
        inner.send(None)
        yield
        inner.send((yield))
        inner.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imageio_ffmpeg, "write_frames", breaks)
    with pytest.raises(LightInteractionError, match="No space left"):
        write_video(path, clip(shade=200), fps=8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_unknown_container_leaves_nothing(tmp_path):
    with pytest.raises(LightInteractionError, match="suffix|cannot write"):
        write_video(tmp_path / "a.nonsense", clip(), fps=8)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")  # a path below a file: not writable for root either
    below = tmp_path / "file" / "folder"
    with pytest.raises(LightInteractionError, match="cannot write .*folder"):
        write_video(below / "a.mp4", clip(), fps=8)
    with pytest.raises(LightInteractionError, match="cannot write .*folder"):
        contact_sheet(below / "a.png", {"a": clip()})


@pytest.mark.parametrize(
    "frames",
    [clip().astype(np.float32), clip()[0], clip()[..., :1], clip()[:0], clip().transpose(0, 3, 1, 2)],
    ids=["float", "one frame", "grey", "empty", "channels first"],
)
def test_wrong_frames(tmp_path, frames):
    for attempt in (
        lambda: write_video(tmp_path / "a.mp4", frames, fps=8),
        lambda: side_by_side({"a": frames}),
        lambda: contact_sheet(tmp_path / "a.png", {"a": frames}),
    ):
        with pytest.raises(LightInteractionError, match="uint8"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_wrong_rate(tmp_path):
    with pytest.raises(LightInteractionError, match="fps"):
        write_video(tmp_path / "a.mp4", clip(), fps=0)


def test_side_by_side():
    joined = side_by_side({"dense": clip(), "ours": clip(shade=90)}, {"ours": "ours, 2.0x"}, upscale=3)
    assert joined.dtype == np.uint8 and joined.shape[0] == 6
    height, width = joined.shape[1:3]
    assert height % 2 == 0 and width % 2 == 0 and width >= 2 * 64 * 3 and height > 48 * 3
    top = height - 48 * 3
    assert np.array_equal(joined[:, top : top + 144 : 3, :192:3], clip())  # enlarged without smoothing
    strip = joined[0, : top - 4]
    assert strip.max() > 150  # a label is there, differs between columns and is the same in every frame
    assert not np.array_equal(strip[:, :192], strip[:, -192:])
    assert np.array_equal(joined[0, : top - 4], joined[5, : top - 4])


def test_side_by_side_refuses():
    with pytest.raises(LightInteractionError, match="differ in shape"):
        side_by_side({"a": clip(), "b": clip(5)})
    with pytest.raises(LightInteractionError, match="no videos"):
        side_by_side({})
    with pytest.raises(LightInteractionError, match="upscale"):
        side_by_side({"a": clip()}, upscale=0)


def test_contact_sheet(tmp_path):
    path = contact_sheet(tmp_path / "sheet.png", {"short": clip(5), "long and wide": clip(9, 30, 40)}, every=4)
    sheet = imageio.imread(path)
    assert sheet.shape[1] == max(2 * 68, 3 * 44) and sheet.shape[0] > 48 + 30
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    for rows, every in (({}, 4), ({"a": clip()}, 0)):
        with pytest.raises(LightInteractionError):
            contact_sheet(path, rows, every=every)
    with pytest.raises(LightInteractionError, match="suffix"):
        contact_sheet(tmp_path / "sheet.nonsense", {"a": clip()})
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_psnr():
    target = torch.full((3, 3, 16, 16), 0.5)
    pred = target.clone()
    pred[1] += 0.1
    pred[2] += 1e-7  # far below what float32 and 8 bits can tell apart: capped as well
    scores = psnr(pred, target)
    assert scores.per_frame.tolist() == pytest.approx([PSNR_CAP, -20 * math.log10(0.1), PSNR_CAP], abs=1e-3)
    assert scores.mean == pytest.approx((2 * PSNR_CAP + 20) / 3, abs=1e-3)


def test_ssim():
    g = torch.Generator().manual_seed(0)
    target = torch.rand(4, 3, 24, 32, generator=g)
    pred = target.clone()
    pred[1] = torch.rand(3, 24, 32, generator=g)
    scores = ssim(pred, target)
    assert scores.per_frame[[0, 2, 3]].tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert scores.per_frame[1] < 0.2 and scores.mean == pytest.approx(scores.per_frame.mean().item())
    assert ssim(pred[:1], target[:1]).per_frame.shape == (1,)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_refuse(metric):
    good = torch.rand(2, 3, 16, 16)
    for pred, target, words in (
        (good * 255, good, "divide by 255"),
        (good, good - 1, "target: values"),
        (good * float("nan"), good, "pred: values"),
        (good, good[:1], "equal shapes"),
        (good[:, :1], good[:, :1], "T, 3, H, W"),
        ((good * 255).byte(), (good * 255).byte(), "floating"),
    ):
        with pytest.raises(LightInteractionError, match=words):
            metric(pred, target)
    with pytest.raises(LightInteractionError, match="11 x 11"):
        ssim(good[..., :8], good[..., :8])

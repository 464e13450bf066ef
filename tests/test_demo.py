"""The demo: typed keys and their poses, what it refuses, its in-graph marker, and one small run of everything."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

for package in ("imageio_ffmpeg", "PIL.Image", "torchmetrics"):
    pytest.importorskip(package)

import li_compile.cli.demo as command  # noqa: E402
from li_compile import Config  # noqa: E402
from li_compile.cli import app  # noqa: E402
from li_compile.errors import LightInteractionError, PoseError  # noqa: E402
from li_compile.patterns.graph import placeholders, value  # noqa: E402
from li_compile.pipeline import canonical, match  # noqa: E402

demo = command.doom_world()
# By the name that the command imports it under: under a second name its operator would be registered twice.
from doom_world import codec, keys, model, sources, timing, weights  # noqa: E402
from doom_world.data import trajectory_folder  # noqa: E402

TINY = model.WorldConfig(dim=32, heads=2, depth=2, mlp_ratio=1, cond_dim=16, text_dim=16, registers=4, rope_dims=(4, 6, 6))


@pytest.fixture
def world():
    """An untrained model and codec, small enough to trace in seconds."""
    torch.manual_seed(0)
    parts = model.WorldModel(TINY), codec.Codec(width=8)
    return tuple(part.eval().requires_grad_(False) for part in parts)


@pytest.mark.parametrize(("text", "actions"), [
    ("wwss", [9, 9, 18, 18]),
    ("ad<>.", [27, 36, 1, 2, 0]),
    ("left*2,right", [1, 1, 2]),
    ("up down*2  STAY", [9, 18, 18, 0]),
    ("←→↑↓", [1, 2, 9, 18]),
    ("w+left*2, w+a, s+d+>", [10, 10, 45, 9 * 8 + 2]),
    ("<*3,ww", [1, 1, 1, 9, 9]),
    ("w+s", [0]),  # opposite keys cancel out
])
def test_keys_are_read(text, actions):
    assert keys.parse(text) == actions


@pytest.mark.parametrize(("text", "says"), [
    ("", "no keys"), ("wxw", "'x'"), ("w*0", "whole number"), ("w*two", "whole number"), ("w*9999", "whole number"),
    ("ww*3", "follows one key"), ("*3", "no key"), ("w+q", "'q'"), ("w+", "no key"), ("left+<", "twice"),
])
def test_keys_are_refused(text, says):
    with pytest.raises(keys.KeysError, match=says):
        keys.parse(text)


def test_typed_keys_lead_where_the_renderer_went():
    real = sources.load("revisit")
    typed = sources.load("left*11,right*22,left*11,w*9,.,s*9")
    assert sources.has_truth(real) and not sources.has_truth(typed) and len(typed.frames) == 1
    assert torch.equal(real.action, typed.action) and torch.equal(real.intrinsics, typed.intrinsics)
    rotations = real.w2c[:, :3, :3].double() @ typed.w2c[:, :3, :3].double().mT
    trace = rotations.diagonal(dim1=1, dim2=2).sum(1)
    assert float(torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1))).max()) < 0.3
    centres = [-(w[:, :3, :3].mT @ w[:, :3, 3:])[..., 0] for w in (real.w2c, typed.w2c)]
    assert float((centres[0] - centres[1]).norm(dim=1).max()) < 0.01  # a step is 0.1875


def test_typed_keys_fill_whole_chunks():
    assert [len(sources.load(text).action) for text in ("w", "w*7", "w*8", "w*63")] == [8, 8, 12, 64]
    assert sources.load("w*8", chunks=2).w2c.shape == (8, 4, 4)
    with pytest.raises(keys.KeysError, match="64 keys were typed; at most 63"):
        sources.load("w*64")


def damaged(tmp_path, **changes):
    """A file like revisit.npz with arrays exchanged."""
    with np.load(trajectory_folder() / "revisit.npz") as file:
        arrays = {name: file[name] for name in file}
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    np.savez(tmp_path / "damaged.npz", **arrays)
    return str(tmp_path / "damaged.npz")


@pytest.mark.parametrize(("changes", "error", "says"), [
    ({"w2c": lambda x: x[:60]}, PoseError, "64 frames, 60 poses and 64 actions"),
    ({"w2c": lambda x: 2 * x}, PoseError, "no rigid motion"),
    ({"w2c": lambda x: x[:63], "action": lambda x: x[:63], "offset": lambda x: x[:64]}, sources.TrajectoryError, "multiple of 4"),
    ({"action": lambda x: x + 80}, sources.TrajectoryError, "0 ... 80"),
    ({"webp": lambda x: x[:9]}, sources.TrajectoryError, "cannot be read"),
    ({"offset": lambda x: x[:5], "w2c": lambda x: x[:4], "action": lambda x: x[:4]}, sources.TrajectoryError, "2 are needed"),
])
def test_damaged_trajectories(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        sources.load(damaged(tmp_path, **changes))


def test_a_file_that_is_no_trajectory(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 cut short")
    np.savez(tmp_path / "y.npz", w2c=np.zeros(3))
    for name in ("x.npz", "y.npz"):
        with pytest.raises(sources.TrajectoryError, match="cannot be read"):
            sources.load(str(tmp_path / name))


def test_weights_missing_or_cut_short(tmp_path):
    with pytest.raises(LightInteractionError, match="are missing"):
        weights.load_world(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.FILE.read_bytes()[:5000])
    with pytest.raises(LightInteractionError, match="cannot be used"):
        weights.load_world(tmp_path / "cut.safetensors")


def refused(*arguments):
    """stderr of a command that must end with 2, without a traceback, before anything is computed."""
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    return result.stderr


def test_the_command_refuses(tmp_path):
    assert "'fast'" in refused("--preset", "fast", "--out", tmp_path)
    said = refused("--trajectory", "revisitt", "--out", tmp_path)
    assert "did you mean 'revisit'?" in said and "explore, loop, revisit" in said
    assert "no file" in refused("--trajectory", tmp_path / "none.npz", "--out", tmp_path)
    assert "choose cpu or cuda" in refused("--device", "tpu", "--out", tmp_path)
    assert "16" in refused("--chunks", "17", "--out", tmp_path)
    assert "2 chunks, 5 are needed" in refused("--trajectory", "wasd", "--chunks", "5", "--out", tmp_path)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):  # the tests may run as root, who may write anywhere
        assert "cannot be written to" in refused("--out", out)
    if not torch.cuda.is_available():
        assert "no GPU" in refused("--device", "cuda", "--out", tmp_path)


def test_the_command_without_extra_or_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "PACKAGES", {"no_such_module": "no-such-package"})
    assert "no-such-package" in refused() and "'.[examples]'" in refused()
    monkeypatch.setattr(command, "__file__", str(tmp_path / "a" / "b" / "demo.py"))
    assert "needs a checkout" in refused()


def chunk(frames):
    """Arguments of a ChunkSampler of TINY with context of so many frames."""
    torch.manual_seed(1)
    poses = torch.eye(4).expand(1, frames + 4, 4, 4).contiguous()
    text = [torch.randn(2, 1, 2, TINY.text_tokens, 16) for _ in range(2)]  # two storages: regions take no aliases
    args = [torch.randn(1, 16, 4, 12, 16), torch.zeros(1, 17, 4, 12, 16), torch.zeros(1, 4, dtype=torch.int64), poses[:, :4].clone(),
            torch.eye(3)[None], *text]
    if frames:
        args += [torch.randn(1, 16, frames, 12, 16), torch.zeros(1, frames, dtype=torch.int64), poses[:, 4:].clone()]
    return args


@torch.no_grad()
def test_the_marker_hides_no_pattern(world):
    facts = {}

    def backend(name):
        def read(graph, inputs):
            facts[name] = match(canonical(graph, [value(p) for p in placeholders(graph.graph)]), Config())
            return graph

        return read

    plain, marked = (model.ChunkSampler(world[0], steps=2, mark=mark) for mark in (False, True))
    args = chunk(8)
    for position, dim in ((7, 2), (8, 1), (9, 1)):
        torch._dynamo.mark_dynamic(args[position], dim)
    timing._marks.clear()
    outputs = [torch.compile(f, backend=backend(f.mark))(*args) for f in (plain, marked)]
    assert torch.equal(*outputs) and len(timing._marks) == 1
    assert any("doom_world.mark" in str(n.target) for n in facts[True].module.graph.nodes)
    read = lambda f: ([(s.kind, len(s.calls), s.grid, s.branches) for s in f.sites], f.loop.steps, f.loop.form,
                      list(f.context.inputs.values()), f.context.sites)
    assert read(facts[True]) == read(facts[False]) and facts[True].loop.steps == 2

    marked(*chunk(0))
    assert len(timing._marks) == 1  # nothing to mark without context


@torch.no_grad()
def test_a_model_in_bfloat16(world):
    """As on a GPU: without autocast, every layer gets its weights' dtype, and the state stays in it."""
    args = chunk(8)
    full = model.ChunkSampler(world[0], steps=2)(*args)
    half = world[0].bfloat16()
    given = [x.bfloat16() if i in (0, 1, 5, 6, 7) else x for i, x in enumerate(args)]  # cameras and labels stay as they are
    rounded = model.ChunkSampler(half, steps=2)(*given)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - full).norm() / full.norm() < 2e-2


def test_marker_and_memory():
    torch.library.opcheck(torch.ops.doom_world.mark.default, ([torch.randn(3)], torch.randn(2, 2)))
    x = torch.randn(512, 512)
    assert timing.peak_memory(lambda a: ((a @ a).relu() + 1).sum(), (x,)) == pytest.approx(2 * 2**20, rel=0.01)


def test_a_small_run(tmp_path, world):
    """Five chunks, so that the context is pruned, sparse and reused; untrained, so the quality means nothing."""
    console = Console(width=120, record=True, file=io.StringIO())
    settings = demo.Settings(out=tmp_path / "new" / "out", chunks=5, lowering="eager")
    report = demo.run(settings, console, world)

    assert {p.name for p in settings.out.iterdir()} == {"report.json", "contact_sheet.png", "side_by_side.mp4"}
    assert json.loads((settings.out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert all(path.stat().st_size > 1000 for path in settings.out.iterdir())
    for mode in ("free-running", "teacher-forced"):
        times = report["time"][mode]
        assert set(times) == {"dense", "accelerated", "ratio", "per_chunk"} and len(times["per_chunk"]) == 5
        for side in ("dense", "accelerated"):
            each = [c[side] for c in times["per_chunk"]]
            assert each[0]["prefill"] == 0 and all(0 < c["prefill"] < c["total"] for c in each[1:])
            assert times[side]["total"] == pytest.approx(sum(c["total"] for c in each))
            # Teacher-forced, what was compiled for the free-running pass is used again.
            assert (times[side]["compiling"] > 0) == (mode == "free-running")
        for frames in ("frames 1 to 19", "frames 8 to 19"):
            assert set(report["quality"][mode][frames]) == {"psnr", "ssim"}
            assert len(report["quality"][mode][frames]["psnr"]) == 3
    assert report["skipped"]["denoising calls"] == {"skipped": 2, "possible": 20, "share": 2 / 20}
    assert report["skipped"]["context latents"]["possible"] == 0 + 4 + 8 + 12 + 16
    assert 0 < report["skipped"]["FLOP of products"]["share"] < 1
    assert report["peak_memory_bytes"]["dense"] > 0
    assert report["passes"]["cached_steps"] == 2
    text = console.export_text()
    for words in ("free-running, prefill", "teacher-forced, total", "peak memory", "PSNR, frames 8 to 19", "denoising calls",
                  "What each pass did", "cached steps", "free-running, dense, chunk 0 (0 context frames): compiled in", "played teacher-forced"):
        assert words in text, words


def test_trajectories_are_in_the_help():
    """The command names them without importing torch, so from a list of its own."""
    assert command.TRAJECTORIES == ", ".join(sources.names())

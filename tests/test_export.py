"""Artifacts: what is written, what a loaded one computes beside the compiled model, and every way in which it may not be usable."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import torch
from test_policy import left_right
from torch import nn
from tracing import TINY, dynamic, relative, world_inputs

import li_compile
from li_compile import Config, Session
from li_compile.errors import ArtifactError, ExportError
from li_compile.exporting import manifest as manifests

SPARSE = TINY | {"preset": "sparse", "sparse.skip_layers": 0, "sparse.grid": (2, 4), "sparse.prefill_ratio": 0.5}
OPTIONS = TINY | {"preset": "all", "sparse.skip_layers": 0, "context.memory_frames": 8, "context.temporal_frames": 4}


@pytest.fixture(scope="session")
def chunk(tiny_world):
    from examples.doom_world.model import ChunkSampler

    return ChunkSampler(tiny_world(depth=1), steps=3)


@pytest.fixture(scope="session")
def world(chunk, tmp_path_factory):
    """(report, folder) of Doom World's whole chunk, with context and without."""
    folder = tmp_path_factory.mktemp("export") / "world"
    report = li_compile.export(chunk, dynamic(world_inputs(chunk.model, 20)), path=folder, config=Config.from_options(OPTIONS),
                               also=[(world_inputs(chunk.model, 0), {})])
    return report, folder


def edited(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


class Remembers(nn.Module):
    """A step with a cache of its own, written in place, and one that its caller holds."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(3, 4))

    def forward(self, x, log, gain: float = 1.0):
        y = self.mix(x) * gain + self.seen.mean(0)
        self.seen[:2] = self.seen[1:].clone()
        self.seen[2] = x[0]
        log.add_(y.sum())
        return {"out": y, "last": self.seen[2] * 1}


class Tokens(nn.Module):
    """A step on frames of 2 x 4 tokens: attention that is made sparse, two heads of half the width, and a cache that is written."""

    def __init__(self, frames=8, width=16):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.register_buffer("sum", torch.zeros(1, 8 * frames, width))

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens + self.sum).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        self.sum.add_(out)
        return out


# What is written.


def test_one_program_a_plan_and_one_file_of_weights(world, chunk):
    report, folder = world
    names = [(v.call, v.name) for v in report.variants]
    assert names == [(0, "keep4_full"), (0, "keep8_full"), (0, "keep8_reuse"), (1, "all_full")]
    by_name = {v.name: v for v in report.variants}
    assert by_name["keep8_reuse"].passes["cached_steps"] == 1 and by_name["keep8_full"].passes["sparse_attention"] == 3
    assert {o["operator"]: (o["calls"], o["lowering"]) for o in by_name["keep8_full"].operators} == {
        "li::pack_context": (1, "operator"), "li::sparse_decode": (3, "operator")}
    assert {o["operator"]: o["calls"] for o in by_name["keep8_reuse"].operators}["li::sparse_decode"] == 2
    files = {p.name: p.stat().st_size for p in folder.iterdir()}
    assert set(files) == {"manifest.json", "weights.safetensors", *(f"call{c}_{n}.pt2" for c, n in names)}
    held = sum(p.numel() * 4 for n, p in chunk.named_parameters() if "prefix" not in n)  # text is given
    assert held <= files["weights.safetensors"] <= held + 20_000
    assert "li_compile" in " ".join(report.notes) and "keep8_reuse" in str(report)


def test_no_weights_in_the_programs(tmp_path):
    model = nn.Linear(1000, 1000)
    li_compile.export(model, [torch.ones(1, 1000)], path=tmp_path / "linear")
    sizes = {p.suffix: p.stat().st_size for p in (tmp_path / "linear").iterdir()}
    assert sizes[".pt2"] < 100_000 < sizes[".safetensors"]


def test_the_manifest(world):
    data = json.loads((world[1] / "manifest.json").read_text())
    assert data["versions"]["torch"] == torch.__version__ and data["device"]["type"] == "cpu" and data["gates"] == "variants"
    variant = data["calls"][0]["variants"][-1]
    shapes = {t["name"]: (t["shape"], t["dtype"]) for t in variant["inputs"]}
    assert shapes["context_latents"] == ([1, 4, 8, 4, 4], "float32") and shapes["context_action"] == ([1, 8], "int64")
    assert [t["name"] for t in variant["outputs"]] == ["result0", "drift"] and variant["outputs"][0]["shape"] == [1, 4, 4, 4, 4]


# What it computes.


@pytest.mark.filterwarnings("ignore:light_interaction found nothing")
def test_a_rollout_of_16_chunks(world, chunk):
    """From a loaded artifact as from the compiled model: plans, reuse, records and latents, with revisits and warm-up."""
    from examples.doom_world.rollout import play

    runner, model = li_compile.load(world[1]), chunk.model
    compiled = torch.compile(chunk, backend="light_interaction", options=OPTIONS)
    size = (1, model.config.channels, model.config.height, model.config.width)
    random = torch.Generator().manual_seed(0)
    given = (torch.randn(size, generator=random), left_right(), torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.6, 0.5], [0.0, 0.0, 1.0]]),
             torch.randint(0, model.config.actions, (64,), generator=random))
    done, stats = [], []
    for sampler in (compiled, runner):
        with Session(runner.config) as session:
            *_, latents = play(model, sampler, *given)
            done.append(latents.clone())
            stats.append(session.stats())
    plans = [[(c["context_kept"], c["reuse"], c["calls"], c["score"]) for c in s["per_chunk"]] for s in stats]
    assert plans[0] == plans[1] and stats[1]["chunks"] == 16
    assert 0 < stats[1]["reused_chunks"] < 16 and {kept for kept, *_ in plans[1]} == {0, 4, 8}
    assert relative(done[1], done[0]) <= 1e-4


@pytest.mark.parametrize("revisit", [False, True])
def test_caches_and_context_are_as_good_outside_of_a_session(world, chunk, revisit):
    """Without a Session, each call is planned from its own cameras."""
    given = world_inputs(chunk.model, 20, revisit=revisit)
    runner = li_compile.load(world[1])
    with Session(runner.config) as session:
        inside = runner(*given)
    assert session.stats()["reused_chunks"] == revisit
    assert torch.equal(runner(*given), inside)


def test_caches_are_inputs_and_results(tmp_path):
    model, log = Remembers(), torch.zeros(3)
    before = model.seen.clone()
    report = li_compile.export(model, [torch.ones(2, 4), log], path=tmp_path / "a")
    assert torch.equal(model.seen, before) and torch.equal(log, torch.zeros(3))  # exporting runs nothing
    assert report.variants[0].caches == ["seen", "log"]
    runner, x = li_compile.load(tmp_path / "a"), torch.randn(5, 2, 4)
    first, caches = runner.step(x[0], log)
    assert set(caches) == {"seen", "log"} and torch.equal(log, torch.zeros(3))
    again, _ = runner.step(x[0], log)  # nothing was kept
    assert torch.equal(first["out"], again["out"])
    mine, theirs, held = torch.zeros(3), torch.zeros(3), None
    for i in range(5):  # explicit, held by the runner, and the model itself
        explicit, held = runner.step(x[i], torch.zeros(3), caches=held)
        with torch.no_grad():
            want = model(x[i], theirs)
        got = runner(x[i], mine)
        for name in ("out", "last"):
            assert relative(got[name], want[name]) <= 1e-6 and relative(explicit[name], want[name]) <= 1e-6
    assert relative(mine, theirs) <= 1e-6 and relative(held["log"], theirs) <= 1e-6 and relative(held["seen"], model.seen) <= 1e-6


def test_written_out_it_needs_none_of_our_operators(tmp_path):
    model, config = Tokens(), Config.from_options(SPARSE)
    report = li_compile.export(model, [torch.ones(1, 16, 8, 2, 4)], path=tmp_path / "a", sparse="native", strict=True, config=config)
    assert [o["lowering"] for o in report.variants[0].operators] == ["native"] and not report.notes
    runner, x = li_compile.load(tmp_path / "a"), torch.randn(1, 16, 8, 2, 4)
    assert not [n for n in runner.program(runner.manifest.calls[0].variants[0]).graph.nodes if "li." in str(n.target)]
    with torch.no_grad():
        want = li_compile.compile(model, config)(x)
    assert relative(runner(x), want) <= 1e-4


def test_query_blocks_choose_together_where_gathering_would_cost_too_much(tmp_path):
    """32 blocks, half of them kept by each: gathered one by one they would be 16 times the keys and values; two together
    still more than 8 times, with the neighbours of both."""
    model, x = Tokens(64), torch.randn(1, 16, 64, 2, 4)
    report = li_compile.export(model, [x], path=tmp_path / "a", sparse="native", config=Config.from_options(SPARSE))
    (row,) = report.variants[0].operators
    assert "5.0 times the keys' and values' own bytes; 4 query blocks choose together" in row["why"] and "would gather 16.0 times" in row["why"]
    got, dense = li_compile.load(tmp_path / "a")(x), model(x)
    assert 1e-4 < relative(got, dense) < 0.5  # fewer choices, still attention


def test_a_gate_with_our_operators_written_out(chunk, tmp_path):
    """Their tables are constants, which a saved condition cannot hold itself; sizes of the context are numbers, which it cannot be given."""
    options = OPTIONS | {"sparse.min_context": 4, "context.memory_frames": 4, "context.anchor_frames": 0}
    inputs = [dynamic(world_inputs(chunk.model, 12, revisit=revisit)) for revisit in (False, True)]
    report = li_compile.export(chunk, inputs[0], path=tmp_path / "a", config=Config.from_options(options | {"cache.guard": None}), gates="device",
                               sparse="native", strict=True)
    (variant,) = report.variants
    assert variant.name == "keep4_gated" and variant.passes["gated_steps"] == 1 and {o["lowering"] for o in variant.operators} == {"native"}
    runner, compiled = li_compile.load(tmp_path / "a"), torch.compile(chunk, backend="light_interaction", options=options)
    results = []
    for given in inputs:
        with Session(runner.config) as session:
            results.append(runner(*given))
        assert session.stats()["reused_chunks"] == (given is inputs[1])
        with torch.no_grad(), Session(runner.config):
            assert relative(results[-1], compiled(*given)) <= 1e-4


@torch.compiler.nested_compile_region
def region(x):
    """Writes a number into a fresh tensor, and holds a constant."""
    made = torch.zeros_like(x)
    made[..., 0] = 2.0
    return x * 0.5 + made + torch.tensor([1.0, 2.0, 3.0, 4.0])


class Regions(nn.Module):
    def forward(self, x):
        return region(region(x))


def test_constants_of_nested_regions(tmp_path):
    model, x = Regions(), torch.randn(2, 4)
    li_compile.export(model, [x], path=tmp_path / "a")
    assert relative(li_compile.load(tmp_path / "a")(x), model(x)) <= 1e-6


# What cannot be exported, and leaves nothing behind.


def branching(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("options", "says"), [
    ({"target": "tflite"}, "target 'tflite' is unknown; choose one of exported_program, aot_inductor, onnx, tensorrt"),
    ({"gates": "host"}, "gates='host' is unknown"),
    ({"sparse": "fast"}, "sparse='fast' is unknown"),
    ({"sparse": "plugin"}, "sparse='plugin' is not for target 'exported_program'"),
    ({"config": li_compile.Config(preset="exact", exact={"islands": "tf32"})}, "exact.islands='tf32' is a switch around the graphs of a process"),
    ({"model": branching}, "torch.export cannot trace branching"),
    ({"gates": "device"}, "gates='device', and there is nothing to gate: no model is called more than once"),
])
def test_what_cannot_be_exported(tmp_path, options, says):
    options = {"model": nn.Linear(2, 2), "args": [torch.ones(1, 2)], "path": tmp_path / "new" / "a"} | options
    with pytest.raises(ExportError, match=says):
        li_compile.export(**options)
    assert not list(tmp_path.iterdir())


def test_a_path_that_exists(tmp_path, monkeypatch):
    model, folder = nn.Linear(2, 2), tmp_path / "a"
    li_compile.export(model, [torch.ones(1, 2)], path=folder)
    held = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ExportError, match="exists; choose another path, or pass overwrite=True"):
        li_compile.export(model, [torch.ones(3, 2)], path=folder)
    from li_compile.exporting.targets import exported_program

    monkeypatch.setattr(exported_program, "write", lambda *_: 1 / 0)  # in the middle of it
    with pytest.raises(ZeroDivisionError):
        li_compile.export(model, [torch.ones(3, 2)], path=folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == held and [p.name for p in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    rename = pathlib.Path.rename
    monkeypatch.setattr(pathlib.Path, "rename", lambda self, to: 1 / 0 if self.name.startswith(".a.") and not self.suffix == ".old" else rename(self, to))
    with pytest.raises(ZeroDivisionError):  # at the very end of it
        li_compile.export(model, [torch.ones(3, 2)], path=folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == held and [p.name for p in tmp_path.iterdir()] == ["a"]
    monkeypatch.undo()
    li_compile.export(model, [torch.ones(3, 2)], path=folder, overwrite=True)
    assert li_compile.load(folder)(torch.ones(3, 2)).shape == (3, 2) and [p.name for p in tmp_path.iterdir()] == ["a"]


# What cannot be loaded, or run.


def damage(folder: pathlib.Path, how: str) -> None:
    manifest, program = folder / "manifest.json", folder / "call0_keep8_full.pt2"
    if how == "no manifest":
        manifest.unlink()
    elif how == "manifest cut off":
        manifest.write_text(manifest.read_text()[:-100])
    elif how == "manifest edited":
        manifest.write_text(manifest.read_text().replace('"sparse.topk_ratio": 0.175', '"sparse.topk_ratio": 0.5'))
    elif how == "program missing":
        program.unlink()
    elif how == "program cut off":
        program.write_bytes(program.read_bytes()[:-10])
    elif how == "weights edited":
        weights = folder / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    else:
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(("how", "says"), [
    ("no manifest", "is no exported artifact: there is no manifest.json"), ("manifest cut off", "it was edited or cut off; export the model again"),
    ("manifest edited", "manifest.json was edited"), ("program missing", "lacks the file call0_keep8_full.pt2"),
    ("program cut off", "were exported: it was cut off or edited"), ("weights edited", "its sha256 differs"), ("format", "reads format 1"),
])
def test_a_damaged_folder(world, tmp_path, how, says):
    folder = edited(world[1], tmp_path)
    damage(folder, how)
    with pytest.raises(ArtifactError, match=says):
        li_compile.load(folder)


def test_no_folder(tmp_path):
    with pytest.raises(ArtifactError, match="there is no folder"):
        li_compile.load(tmp_path / "none")


def test_another_machine(world, monkeypatch):
    with pytest.raises(ArtifactError, match="was exported for cpu, and cuda was asked for"):
        li_compile.load(world[1], device="cuda")
    read = manifests.Manifest.read

    def noted(**changes):
        def changed(folder):
            manifest = read(folder)
            for name, new in changes.items():
                setattr(manifest, name, getattr(manifest, name) | new)
            return manifest
        monkeypatch.setattr(manifests.Manifest, "read", staticmethod(changed))

    noted(versions={"torch": "2.0.1+cpu"})
    with pytest.raises(ArtifactError, match=r"exported with torch 2.0.1\+cpu, and .* is installed: export it again here, or pip install 'torch==2.0.1'"):
        li_compile.load(world[1])
    noted(device={"type": "cuda", "name": "H100", "capability": [9, 0]})
    if not torch.cuda.is_available():
        with pytest.raises(ArtifactError, match="exported for a GPU .H100., and PyTorch finds none here"):
            li_compile.load(world[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "L4")
    with pytest.raises(ArtifactError, match=r"built for H100 \(compute capability 9.0\), and here is L4 \(8.9\): export it again on this GPU"):
        li_compile.load(world[1])


@pytest.mark.parametrize(("change", "says"), [
    (lambda xs: [xs[0][..., :2], *xs[1:]], r"input noise is float32 \[1, 4, 4, 4, 2\], and this artifact takes float32 \[1, 4, 4, 4, 4\]: export again"),
    (lambda xs: [xs[0].double(), *xs[1:]], "input noise is float64"),
    (lambda xs: xs[:-1], "called with 9 inputs in another structure than exported; this artifact takes .noise, prompt, .*; or "),
    (lambda xs: [*xs[:-1], None], "called with 10 inputs in another structure|input context_w2c is NoneType"),
    (lambda xs: [xs[0], 3.0, *xs[2:]], "input prompt is float, and a tensor of shape .1, 5, 4, 4, 4. was exported"),
])
def test_wrong_inputs(world, chunk, change, says):
    with pytest.raises(ArtifactError, match=says):
        li_compile.load(world[1])(*change(world_inputs(chunk.model, 20)))


def test_a_context_that_no_variant_is_for(world, chunk):
    options = OPTIONS | {"context.memory_frames": 16, "context.temporal_frames": 12}
    with Session(Config.from_options(options)), pytest.raises(ArtifactError, match="has variants for 4, 8 context frames, and the plan keeps 16"):
        runner = li_compile.load(world[1])
        runner._calls[0].config = Config.from_options(options)
        runner(*world_inputs(chunk.model, 16))


def test_a_constant_that_changed(tmp_path):
    li_compile.export(Remembers(), [torch.ones(2, 4), torch.zeros(3)], {"gain": 2.0}, path=tmp_path / "a")
    runner = li_compile.load(tmp_path / "a")
    with pytest.raises(ArtifactError, match="input gain is 3.0, and 2.0 was exported, as a constant: export again with this value"):
        runner(torch.ones(2, 4), torch.zeros(3), gain=3.0)


def test_a_report_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = li_compile.export_report(Tokens(), [torch.ones(1, 16, 8, 2, 4)], target="tensorrt", config=Config.from_options(SPARSE))
    (variant,) = report.variants
    assert [(o["operator"], o["lowering"]) for o in variant.operators] == [("li::sparse_attention", "native")]
    assert report.path is None and not variant.parts and not list(tmp_path.iterdir()) and report.to_dict()["target"] == "tensorrt"


# AOTInductor: one small model that has all of it, since every compilation takes seconds.


def test_aot_inductor(tmp_path):
    model, config = Tokens(), Config.from_options(SPARSE)
    x = torch.randn(2, 1, 16, 8, 2, 4)
    report = li_compile.export(model, [x[0]], path=tmp_path / "a", target="aot_inductor", config=config)
    (variant,) = report.variants
    assert [(o["operator"], o["calls"], o["lowering"]) for o in variant.operators] == [("li::sparse_attention", 1, "operator")]
    assert variant.caches == ["sum"] and set(p.suffix for p in (tmp_path / "a").iterdir()) == {".json", ".pt2", ".safetensors"}
    runner = li_compile.load(tmp_path / "a")
    compiled = li_compile.compile(model, config)
    for one in x:
        with torch.no_grad():
            want = compiled(one)
        assert relative(runner(one), want) <= 1e-4
    assert relative(runner._held["sum"], model.sum) <= 1e-4 and model.sum.abs().sum() > 0

"""The examples for HY-WorldPlay, run on a tree that has its shape: a generate.py that makes a pipeline and calls it."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
GENERATE = """
import sys

import pytest
import torch
from models import worldplay_rollout as reduced
from test_policy import left_right

monkeypatch = pytest.MonkeyPatch()
transformer, HunyuanVideo_1_5_Pipeline = reduced.install(monkeypatch)
HunyuanVideo_1_5_Pipeline.create_pipeline = classmethod(lambda cls, steps: reduced.pipeline(monkeypatch, int(steps)))


def main():
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        pipe = HunyuanVideo_1_5_Pipeline.create_pipeline(sys.argv[1])
        pipe.ar_rollout(**reduced.inputs(int(sys.argv[1]), left_right()))
        stats = pipe.rollout.session.stats()
        print(type(pipe).__name__, stats["chunks"], stats["context_kept"], pipe.rollout.config.preset)
"""


WAN_PIPELINE = """
import pytest
from models import worldplay_wan_rollout as reduced

transformer, pipeline = reduced.install(pytest.MonkeyPatch())
pipeline.make = classmethod(lambda cls: cls(transformer().eval().requires_grad_(False)))
"""
WAN_GENERATE = """
import sys

import torch
from models import worldplay_wan_rollout as reduced
from test_policy import left_right
from wan.inference.pipeline_wan_w_mem_relative_rope import WanPipeline

if __name__ == "__main__":
    pipe = WanPipeline.make()
    trained = pipe.transformer
    for video in range(2):
        common, each = reduced.inputs(left_right()[:4 * int(sys.argv[1])])
        with torch.compiler.set_stance("force_eager"):
            for i in range(int(sys.argv[1])):
                pipe(**common, chunk_i=i, **{name: x[:, 4 * i:4 * i + 4] for name, x in each.items()})
        stats = pipe.transformer.rollout.session.stats()
        print(pipe.transformer.model is trained, stats["chunks"], stats["context_kept"], pipe.transformer.rollout.config.preset)
"""


def run_example(name: str, tree, home) -> list[str]:
    run = subprocess.run([sys.executable, str(ROOT / "examples" / "hy_worldplay" / name), str(tree), "3"], capture_output=True, text=True,
                         env={"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "PATH": "/usr/bin:/bin", "LI_COMPILE_PRESET": "exact", "HOME": str(home),
                              "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.split()


def test_the_example_compiles_the_pipeline_that_upstreams_script_makes(tmp_path):
    package = tmp_path / "tree" / "hyvideo"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "generate.py").write_text(GENERATE)
    assert run_example("generate.py", package.parent, tmp_path) == ["CompiledPipeline", "3", "12", "exact"]


def test_the_example_for_the_wan_kind_compiles_what_upstreams_script_calls(tmp_path):
    package = tmp_path / "tree" / "wan"
    (package / "inference").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "generate.py").write_text(WAN_GENERATE)
    (package / "inference" / "pipeline_wan_w_mem_relative_rope.py").write_text(WAN_PIPELINE)
    assert run_example("generate_wan.py", package.parent, tmp_path) == 2 * ["True", "3", "12", "exact"]

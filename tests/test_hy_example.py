"""The example for HY-WorldPlay, run on a tree that has its shape: a generate.py that makes a pipeline and calls it."""

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


def test_the_example_compiles_the_pipeline_that_upstreams_script_makes(tmp_path):
    package = tmp_path / "tree" / "hyvideo"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "generate.py").write_text(GENERATE)
    run = subprocess.run([sys.executable, str(ROOT / "examples" / "hy_worldplay" / "generate.py"), str(package.parent), "3"], capture_output=True,
                         text=True, env={"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "PATH": "/usr/bin:/bin", "LI_COMPILE_PRESET": "exact",
                                         "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["CompiledPipeline", "3", "12", "exact"]

"""Measured launch configurations: the table is well formed, is what the kernels use, and a trial leaves no trace."""

import json
import re
from pathlib import Path

import pytest
import torch

from li_compile.kernels import block_sparse_hopper, block_sparse_triton, tuning

NAME = re.compile(r"(triton|hopper) sm_(\d+) head_dim (\d+) block (\d+)")


def rows():
    return json.loads((Path(tuning.__file__).parent / tuning.TABLE).read_text())["configurations"]


def launch(name):
    kernel, capability, dim, block = NAME.fullmatch(name).groups()
    if kernel == "hopper":
        return block_sparse_hopper.launch_config(int(dim), int(block), clean=True)
    return block_sparse_triton.launch_config(torch.bfloat16, int(dim), int(block), int(capability))


@pytest.mark.parametrize("name", rows())
def test_entry_is_used(name):
    row, used = rows()[name], launch(name)._asdict()
    assert {key: used[key] for key in row["launch"]} == row["launch"]
    assert row["tflops"] > 0 and row["device"] and row["triton"]


def test_fp32_goes_by_the_rule():
    assert block_sparse_triton.launch_config(torch.float32, 128, 128, 90).rows <= 32


def test_trial():
    name = next(n for n in rows() if n.startswith("hopper"))
    kernel, capability, dim, block = NAME.fullmatch(name).groups()
    key, before = (kernel, int(capability), int(dim), int(block)), launch(name)
    with tuning.trial(*key, {"keys": 64, "stages": 2, "queries": 1}):
        assert launch(name)[:3] == (64, 2, 1)
        with tuning.trial(*key, None):
            assert launch(name)[0] == 64, "the rule"
    assert launch(name) == before and tuning.tuned(*key) == rows()[name]["launch"]


def test_unknown_architectures_go_by_the_rule():
    assert tuning.tuned("triton", 120, 128, 128) is None
    assert block_sparse_triton.launch_config(torch.float16, 128, 128, 120).keys == 64

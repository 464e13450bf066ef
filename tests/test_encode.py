"""Norm, rotary and camera encodings become one operator, where they are spelt as they are read; nothing else does."""

from __future__ import annotations

import functools

import pytest
import torch
from models.worldplay import RMSNorm, project, rotate, step
from test_exact import Rewritten
from torch import nn
from tracing import TINY, Compiled, Traced

from li_compile.passes.encode import encode

ANYWHERE = functools.wraps(encode)(functools.partial(encode, anywhere=True))
HEADS, DIM, FRAMES, AREA = 2, 8, 3, 5


class Branches(nn.Module):
    """Queries in two branches, as attention is given them; ``change`` makes it another thing."""

    def __init__(self, dtype=torch.float32, change: str = "") -> None:
        super().__init__()
        self.norm, self.change = RMSNorm(DIM).to(dtype), change
        self.cos, self.sin = torch.rand(FRAMES * AREA, DIM), torch.rand(FRAMES * AREA, DIM)

    def forward(self, x, matrices):
        matrices = matrices.to(x.dtype)
        y = x if self.change == "no norm" else self.norm(x)
        z = y * 2 if self.change == "another source" else y
        first = y if self.change == "no rotation" else rotate(y, self.cos[None, :, None], self.sin[None, :, None])
        if self.change == "twice rotated":
            first = rotate(first, self.cos[None, :, None], self.sin[None, :, None])
        if self.change == "by token":
            matrices = matrices.repeat_interleave(AREA, 1)
        if self.change == "channels first":
            z = z.unflatten(-1, (4, -1)).mT.flatten(-2)
        second = project(matrices, z.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
        parts = [second, first] if self.change == "the other way round" else [first, second]
        return torch.cat(parts, 1 if self.change == "along tokens" else 0).transpose(1, 2).float()


def rewritten(change: str = "", dtype=torch.float32) -> Rewritten:
    torch.manual_seed(0)
    x, matrices = torch.randn(1, FRAMES * AREA, HEADS, DIM).to(dtype), torch.randn(1, FRAMES, 4, 4)
    return Rewritten(Branches(dtype, change), x, matrices, passes=(ANYWHERE,))


@pytest.mark.parametrize("change", ["", "no norm", "no rotation", "by token"])
def test_it_fires_once(change):
    done = rewritten(change)
    assert done.count == 1 and done.error() <= 1e-6
    (node,) = [n for n in done.module.graph.nodes if n.target is torch.ops.li.encode.default]
    assert (node.args[1] is None) == (change == "no norm") and (node.args[3] is None) == (change == "no rotation")
    assert node.args[5].meta["example_value"].shape[1] == FRAMES, "matrices of frames, however often they are repeated"


def test_half_precision_is_rounded_no_more_than_before():
    done = rewritten(dtype=torch.bfloat16)
    assert done.count == 1 and done.error() <= 4e-3


@pytest.mark.parametrize("change", ["another source", "twice rotated", "channels first", "the other way round", "along tokens"])
def test_look_alikes_stay(change):
    assert rewritten(change).count == 0


@pytest.mark.parametrize(("form", "count"), [("flat", 9), ("regions", 3)])
def test_a_model_encodes_q_k_and_v_of_every_block(form, count):
    run, x = step(3, form == "regions")
    done = Rewritten(run, x, passes=(ANYWHERE,))
    assert done.count == count and done.error() <= 1e-6


def test_without_a_kernel_the_chain_is_left_to_inductor_and_the_report_says_so():
    compiled = Compiled(Traced(*step(1)), TINY | {"preset": "exact"})
    (variant,) = compiled.graph.variants
    assert variant.counts()["encode"] == 0
    assert "left to Inductor" in str(compiled.report)

"""Operators whose Triton kernels become a part of a graph: traced with tensors of a GPU that is not there, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from li_compile.kernels.inlined import why_not_inlined

PROGRAM = """
import collections, json, sys, types
import torch, triton
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from li_compile.kernels.inlined import INLINED, why_not_inlined

layout, sparse, kernel = (sys.modules["li_compile.kernels." + n] for n in ("layout", "sparse_attention", "block_sparse_triton"))
made = layout.cached

def cached(make, device, *args):  # tables are made on the CPU, and stand in the graph as if they were on the GPU
    if torch.device(device).type == "cpu":
        return made(make, device, *args)
    with _disable_current_modes():
        real = made(make, "cpu", *args)
    return tree_map_only(torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=device), real)

layout.cached = sparse.cached = cached
torch.cuda.get_device_capability = lambda device=None: (9, 0)
kernel._multiprocessors = lambda device: 132
triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_benchmarker=lambda: None))

class Attention(torch.nn.Module):
    def forward(self, q, *k):
        return INLINED["li::sparse_attention"](q, list(k), list(k), [0, 1, 2], 12, 16, [4, 4, 4], 64, 0.175, 0.4, 4, 0.125)

with FakeTensorMode():
    q, *k = (torch.empty(1, 4, n, 64, device="cuda", dtype=torch.float16) for n in (768, 64, 1536, 768))
    assert why_not_inlined("li::sparse_attention", {"q": q, "block_size": 64, "sub_blocks": 4}) is None
    graph = torch.export.export(Attention(), (q, *k), strict=False).run_decompositions({}).graph
launches = [n for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]
name = lambda n: kernel_side_table.get_kernel(n.kwargs["kernel_idx"]).fn.__name__
print(json.dumps({"launches": [[name(n), n.kwargs["grid"][0], n.kwargs["tensors_to_clone"]] for n in launches],
                  "kernels": len({n.kwargs["kernel_idx"] for n in launches}),
                  "ours": [str(n.target) for n in graph.nodes if str(n.target).startswith("li")],
                  "result": list(next(n for n in graph.nodes if n.op == "output").args[0][0].meta["val"].shape)}))
"""


@pytest.fixture(scope="module")
def traced():
    if not torch.backends.cuda.is_built() or torch.cuda.is_available():
        pytest.skip("needs a PyTorch that was built for CUDA, and no GPU")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LI_COMPILE_PROVIDER")}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=clean, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_an_operator_is_its_launches(traced):
    """Text, history and the current queries, keys and values are packed (in decode, current keys need no order), blocks chosen and read."""
    names = [name for name, *_ in traced["launches"]]
    assert names == ["pack_kernel"] * 5 + ["score_kernel", "rank_kernel"] + ["block_sparse_kernel"] * 2
    assert traced["ours"] == [] and traced["result"] == [1, 4, 768, 64]


def test_what_a_launch_writes_is_known(traced):
    """Else a compiler would copy every tensor that a launch is handed."""
    by_name = {name: written for name, _, written in traced["launches"]}
    assert by_name == {"pack_kernel": ["OUT", "MEANS"], "score_kernel": ["SCORES"], "rank_kernel": ["INDICES", "COUNTS", "TAILS"], "block_sparse_kernel": ["OUT", "LSE"]}


def test_equal_launches_are_one_kernel(traced):
    assert traced["kernels"] == 5  # packing, scoring, choosing, and two passes of attention of other stages


@pytest.mark.parametrize(("name", "arguments", "says"), [
    ("li::view_overlap", {}, "not among those that can be compiled in"),
    ("li::sparse_attention", {"q": torch.ones(1, 1, 64, 64), "block_size": 64, "sub_blocks": 4}, "it needs an NVIDIA GPU, found cpu|interprets"),
])
def test_what_cannot_be(name, arguments, says):
    assert re.search(says, why_not_inlined(name, arguments))

"""The Triton kernel compiled for sm_80 and sm_90a without a GPU: registers, spills, tensor-core instructions."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from li_compile.kernels._compat import aot_compile, has_triton, interpreting
from li_compile.kernels.block_sparse_triton import launch_config

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing"),
]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def tool(name: str) -> str:
    nvidia = pytest.importorskip("triton.backends.nvidia")
    path = Path(nvidia.__file__).parent / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}")
    return str(path)


def compiled(dtype, head_dim, block_size, capability):
    from li_compile.kernels._block_sparse_kernel import block_sparse_kernel as kernel

    tool("ptxas")
    launch = launch_config(dtype, head_dim, block_size, capability)
    signature = {name: f"*{NAMES[dtype]}" for name in ("Q", "K", "V", "OUT")}
    signature |= {"LSE": "*fp32", "INDICES": "*i32", "COUNTS": "*i32", "VALID": "*i32", "scale": "fp32"}
    signature |= {name: "i32" for name in kernel.arg_names if name.startswith("stride_")}
    signature |= {name: "i32" for name in ("heads", "query_blocks", "pitch")}
    constants = {"DIM": head_dim, "ROWS": launch.rows, "KEYS": launch.keys, "BLOCK": block_size, "EXACT": dtype == torch.float32}
    return aot_compile(kernel, signature, constants, capability, launch.num_warps, launch.num_stages)


def resources(binary, tmp_path) -> dict[str, int]:
    """Registers and stack bytes of a thread (a spill needs stack) as the assembler left them."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(binary)
    report = subprocess.run([tool("cuobjdump"), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dtype,head_dim,block_size",
    [(torch.bfloat16, 128, 128), (torch.float16, 128, 64), (torch.bfloat16, 64, 64), (torch.float16, 32, 64), (torch.float32, 64, 64)],
    ids=lambda x: str(x).replace("torch.", ""),
)
def test_compiles_without_spills(dtype, head_dim, block_size, capability, tmp_path):
    kernel = compiled(dtype, head_dim, block_size, capability)
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert 0 < used["REG"] <= 255
    ptx = kernel.asm["ptx"]
    limit = 163 if capability == 80 else 227
    assert kernel.metadata.shared <= limit * 1024, "more shared memory than a program can have"
    assert "cp.async.cg" in ptx, "loads should be asynchronous and 16 bytes wide"
    if dtype == torch.float32:
        assert "mma" not in ptx, "fp32 must not go through TF32"
    elif capability == 80:
        assert "mma.sync" in ptx and ".target sm_80" in ptx
    else:
        assert "wgmma.mma_async" in ptx and ".target sm_90a" in ptx

"""The kernels compiled for sm_80 and sm_90a without a GPU: registers, spills, tensor-core instructions, shared memory."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from li_compile.kernels import block_sparse_hopper, block_sparse_triton
from li_compile.kernels._compat import aot_compile, gluon, has_triton, interpreting
from li_compile.kernels.selection import launch_config

from sass import undefined_descriptors  # beside this file

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing"),
]
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can have


def tool(name: str) -> str:
    nvidia = pytest.importorskip("triton.backends.nvidia")
    path = Path(nvidia.__file__).parent / "bin" / name
    if not path.exists():
        pytest.skip(f"this Triton brings no {name}")
    return str(path)


def resources(binary, tmp_path) -> dict[str, int]:
    """Registers and stack bytes of a thread (a spill needs stack) as the assembler left them."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(binary)
    report = subprocess.run([tool("cuobjdump"), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def typed(kernel, constants, *pointers, **others):
    """A signature: pointers as (kind, names), given others, and int32 for what is left."""
    named = {n: f"*{kind}" for kind, names in pointers for n in names.split()} | others
    return {n: named.get(n, "i32") for n in kernel.arg_names if n not in constants}


def portable(dtype, head_dim, block_size, capability, **flags):
    from li_compile.kernels._block_sparse_kernel import block_sparse_kernel as kernel

    tool("ptxas")
    launch = block_sparse_triton.launch_config(dtype, head_dim, block_size, capability)
    constants = {"DIM": head_dim, "ROWS": launch.rows, "KEYS": launch.keys, "BLOCK": block_size, "EXACT": dtype == torch.float32,
                 "TWO": True, "TAILED": True, "SUMMARY": False, "MAPPED": True, "FIXED": True, "REDO": False, "FLAGS_A_BLOCK": 2} | flags  # fmt: skip
    signature = typed(kernel, constants, (NAMES[dtype], "Q K V K1 V1 SUMMARY_K SUMMARY_V OUT"), ("fp32", "BIAS LSE"),
                      ("i32", "ROWS_TO INDICES COUNTS TAILS VALID FLAGS"), scale="fp32")  # fmt: skip
    stages = 2 if flags.get("REDO") else launch.num_stages
    return aot_compile(kernel, signature, constants, capability, num_warps=launch.num_warps, num_stages=stages)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dtype,head_dim,block_size",
    [(torch.bfloat16, 128, 128), (torch.float16, 128, 64), (torch.bfloat16, 64, 64), (torch.float16, 32, 64), (torch.float32, 64, 64)],
    ids=lambda x: str(x).replace("torch.", ""),
)
def test_portable_attention(dtype, head_dim, block_size, capability, tmp_path):
    kernel = portable(dtype, head_dim, block_size, capability)
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert 0 < used["REG"] <= 255
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED[capability]
    assert "cp.async.cg" in ptx, "loads should be asynchronous and 16 bytes wide"
    if dtype == torch.float32:
        assert "mma" not in ptx, "fp32 must not go through TF32"
    elif capability == 80:
        assert "mma.sync" in ptx and ".target sm_80" in ptx
    else:
        assert "wgmma.mma_async" in ptx and ".target sm_90a" in ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("flags", [{"FIXED": False, "REDO": True}, {"SUMMARY": True}], ids=["redo", "summary"])
def test_portable_attention_variants(flags, capability, tmp_path):
    kernel = portable(torch.bfloat16, 128, 128, capability, **flags)
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] <= 16 and used["LOCAL"] == 0, f"spills: {used}"  # Triton 3.6 spills two values with summaries
    assert kernel.metadata.shared <= SHARED[capability]


def hopper(dtype, head_dim, block_size, clean=True, **flags):
    from li_compile.kernels._hopper_kernel import hopper_kernel as kernel

    if gluon() is None:
        pytest.skip("this Triton has no Gluon")
    tool("ptxas")
    launch = block_sparse_hopper.launch_config(head_dim, block_size, clean)
    constants = {"BLOCK": block_size, "KEYS": launch.keys, "DIM": head_dim, "STAGES": launch.stages, "QUERIES": launch.queries,
                 "TWO": True, "SUMMARY": False, "MAPPED": True, "CLEAN": clean, "CONSUMER_REGISTERS": launch.consumer_registers,
                 "PRODUCER_REGISTERS": launch.producer_registers} | flags  # fmt: skip
    box = lambda rows: (NAMES[dtype], (1, 1, rows, head_dim))
    given = {"k_source": True, "v_source": True} | dict.fromkeys(("k_second", "v_second"), constants["TWO"]) \
        | dict.fromkeys(("k_summary", "v_summary"), constants["SUMMARY"])  # fmt: skip
    sources = {n: box(launch.keys) for n, there in given.items() if there}
    constants |= {n: None for n, there in given.items() if not there}
    signature = typed(kernel, constants, (NAMES[dtype], "OUT"), ("fp32", "LSE BIAS"), ("i32", "ROWS_TO INDICES COUNTS TAILS VALID FLAGS"),
                      scale="fp32", q_source=box(64), **sources)  # fmt: skip
    return aot_compile(kernel, signature, constants, 90, num_warps=4, maxnreg=launch.registers)


def disassembled(binary, tmp_path) -> str:
    file = tmp_path / "listed.cubin"
    file.write_bytes(binary)
    return subprocess.run([tool("nvdisasm"), "-c", str(file)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda x: str(x)[6:])
def test_hopper_attention(dtype, head_dim, block_size, tmp_path):
    kernel = hopper(dtype, head_dim, block_size)
    used = resources(kernel.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    programs = 1 if block_size == 128 else 2  # a multiprocessor is to hold
    assert (kernel.metadata.shared + 1024) * programs <= 228 * 1024
    ptx = kernel.asm["ptx"]
    for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor.4d", "setmaxnreg", "mbarrier"):
        assert instruction in ptx, instruction
    listing = disassembled(kernel.asm["cubin"], tmp_path)
    assert "HGMMA" in listing and undefined_descriptors(listing) == []


@pytest.mark.parametrize("flags", [{"SUMMARY": True}, {"clean": False}, {"TWO": False, "MAPPED": False}], ids=str)
def test_hopper_attention_variants(flags, tmp_path):
    """Spills at most a few values, outside of the loop over whole blocks."""
    kernel = hopper(torch.bfloat16, 128, 128, **flags)
    assert resources(kernel.asm["cubin"], tmp_path)["STACK"] <= 32
    assert undefined_descriptors(disassembled(kernel.asm["cubin"], tmp_path)) == []


def test_undefined_descriptors_are_found():
    """What such code looks like: the branch past the first product leads to a second that needs what the first one set."""
    code = """
        /*0010*/ UMOV UR5, 0x1 ;
        /*0020*/ ULDC.64 UR6, c[0x0][0x210] ;
        /*0030*/ {jump} ;
        /*0040*/ UMOV UR4, 0x2 ;
        /*0050*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
    .L_x_1:
        /*0060*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/ HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4].tnspB, R24 ;
        /*0080*/ EXIT ;
    """
    assert undefined_descriptors(code.format(jump="@P0 BRA `(.L_x_1)")) == ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"]
    assert undefined_descriptors(code.format(jump="NOP")) == []


ENCODED = {"HEADS": 4, "NORMED": True, "ROTATED": True, "PROJECTED": True}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("flags", [{}, ENCODED, ENCODED | {"PADDED": False, "AVERAGED": False, "ORDERED": False},
                                   ENCODED | {"PADDED": False}, {"PADDED": False, "AVERAGED": False}, {"TOKENS": False, "PADDED": False, "ORDERED": False}],
                         ids=["plain", "encoded", "encode", "kept in order", "order alone", "means alone"])
def test_pack(flags, capability, tmp_path):
    from li_compile.kernels._pack_kernel import pack_kernel as kernel

    tool("ptxas")
    constants = {"DIM": 128, "ROWS": 32, "HEADS": 1, "ORDERED": True, "NORMED": False, "ROTATED": False, "PROJECTED": False,
                 "TOKENS": True, "PADDED": True, "AVERAGED": True} | flags  # fmt: skip
    signature = typed(kernel, constants, ("bf16", "X NORM OUT"), ("fp32", "COS SIN CAMERA MEANS"), ("i64", "ORDER"), eps="fp32")
    compiled = aot_compile(kernel, signature, constants, capability, num_warps=4, num_stages=3)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert re.search(r"ld\.global\.v4\.b32", compiled.asm["ptx"]), "loads should be 16 bytes wide"
    assert not constants["TOKENS"] or re.search(r"st\.global\.v[24]\.b32", compiled.asm["ptx"]), "stores of tokens should be wide"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("sub", [1, 2, 4, 8])
def test_scores(sub, capability, tmp_path):
    from li_compile.kernels._select_kernel import score_kernel as kernel

    tool("ptxas")
    launch = launch_config(sub, 256, 64, capability)
    constants = {"DIM": 128, "SUB": sub, "ROWS": launch.rows, "CHUNK": launch.chunk}
    signature = typed(kernel, constants, ("fp32", "Q_MEANS K_MEANS SCORES"), ("i32", "Q_COUNTS K_COUNTS"), scale="fp32")
    compiled = aot_compile(kernel, signature, constants, capability, num_warps=launch.warps, num_stages=2)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    assert compiled.metadata.shared <= SHARED[capability]
    assert re.search(r"mma\S*\.f32\.f16\.f16", compiled.asm["ptx"]), "scores should be made by tensor cores, of halves"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_ranks(width, capability, tmp_path):
    from li_compile.kernels._select_kernel import rank_kernel as kernel

    tool("ptxas")
    launch = launch_config(4, width, 64, capability)
    constants = {"ROWS": launch.ranked, "WIDTH": width, "AROUND": 64, "BLOCK": 128, "HAS_FORCED": True, "SUMMARY": True}
    signature = typed(kernel, constants, ("fp32", "SCORES BIAS"), ("u8", "FORCED"), ("i32", "VALID KEEP INDICES COUNTS TAILS"))
    compiled = aot_compile(kernel, signature, constants, capability, num_warps=launch.rank_warps, num_stages=2)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, f"spills: {used}"
    if width == 256:
        assert "bar.sync" not in compiled.asm["ptx"], "a warp ranks them alone"

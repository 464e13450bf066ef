"""The operators around a plugin: against the operators themselves, the kernel in Triton's interpreter, and the PTX that a plugin is made of."""

from __future__ import annotations

import re
import subprocess
import sys
import types

import pytest
import torch
from test_native import CASES, HEIGHT, SIZE, TILE, WIDTH, relative, settings  # beside this file
from test_native import problem as drawn

from li_compile.kernels import plugin, plugin_ptx
from li_compile.kernels._compat import has_triton, interpreting, without_hidden
from li_compile.kernels.block_sparse_plugin import NAME, block_sparse_plugin
from li_compile.kernels.plan import make_plan

SPARSE = [case for case in CASES if case != "dense"]
NAMES = [a.name for a in torch.ops.li.block_sparse_plugin.default._schema.arguments]


def given(case: str):
    """(arguments, keywords) of ``li::sparse_attention``."""
    *sizes, ratios = CASES[case][:4]
    return (*drawn(*sizes), *settings(*ratios)), {"protected": sum(CASES[case][4:])}


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of the plugin's operator, by name."""
    made = []

    def called(*arguments):
        made.append(dict(zip(NAMES, arguments)))
        return block_sparse_plugin(*arguments)

    monkeypatch.setattr(plugin, "block_sparse_plugin", called)
    return made


@pytest.mark.parametrize("case", SPARSE)
def test_sparse_attention(case, calls):
    arguments, more = given(case)
    want = torch.ops.li.sparse_attention(*arguments, **more)
    got = plugin.sparse_attention(*arguments, **more)
    assert relative(got, want) <= 1e-6 and got.stride() == want.stride() and got.shape == want.shape
    assert len(calls) == 1 and all(x.is_contiguous() for x in calls[0].values())


@pytest.mark.parametrize("case", [c for c in SPARSE if "prefill" not in c])
def test_packed_context_and_decode(case):
    (q, k, v, roles, height, width, tile, size, topk, _, *rest), _ = given(case)
    packed = torch.ops.li.pack_context(k[:-1], v[:-1], roles[:-1], height, width, tile, size, rest[0])
    arguments = (q, k[-1], v[-1], *packed, [x.shape[2] for x in k[:-1]], roles[:-1], height, width, tile, size, topk, *rest)
    assert relative(plugin.sparse_decode(*arguments), torch.ops.li.sparse_decode(*arguments)) <= 1e-6


@pytest.mark.parametrize("case", SPARSE)
def test_the_lists_are_those_of_the_operator(case, calls, monkeypatch):
    """Whole blocks ascending, then partly filled ones, and nothing beyond the count."""
    from li_compile.kernels import sparse_attention  # the operator has the module's name

    module, chosen = sys.modules[sparse_attention._init_fn.__module__], []
    choose = module.choose
    monkeypatch.setattr(module, "choose", lambda choice: chosen.append(choose(choice)) or chosen[-1])
    arguments, more = given(case)
    sparse_attention(*arguments, **more)
    plugin.sparse_attention(*arguments, **more)
    (call,), ((indices, counts, tails, _),) = calls, chosen
    for name, want in (("block_indices", indices), ("block_counts", counts), ("tails", tails)):
        assert call[name].dtype == torch.int32 and torch.equal(call[name], want), name
    assert (call["tails"] > 0).any() == (call["kv_valid"] < SIZE).any()


def poisoned(call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whatever must not be looked at is NaN, or a block that there is not."""
    call, size = {name: x.clone() for name, x in call.items()}, SIZE
    pitch = call["block_indices"].shape[-1]
    call["block_indices"][torch.arange(pitch) >= call["block_counts"][..., None]] = 2**30
    sources = ("k", "v"), ("current_k", "current_v")
    first = 0
    for names in sources if plugin_ptx.two_sources({n: tuple(x.shape) for n, x in call.items()}) else sources[1:]:
        for name in names:
            rows = torch.arange(call[name].shape[2])
            call[name][:, :, rows % size >= call["kv_valid"][first + rows // size]] = torch.nan
        first += -(-call[names[0]].shape[2] // size)
    return call


@pytest.mark.parametrize("case", SPARSE)
def test_padding_is_not_looked_at(case, calls):
    arguments, more = given(case)
    want = plugin.sparse_attention(*arguments, **more).transpose(1, 2)
    bad = poisoned(calls[0])
    assert any(bad[name].isnan().any() for name in ("k", "current_k"))
    assert torch.equal(block_sparse_plugin(*bad.values()), want)


@pytest.mark.skipif(not interpreting(), reason="test_interpreter.py runs it in a process whose Triton interprets")
@pytest.mark.parametrize(("case", "dtype"), [*((case, torch.float16) for case in SPARSE), ("decode, partial blocks, no text", torch.float32)])
def test_the_kernel_on_triton_cpu(case, dtype, calls):
    """With the constants, the grid and the order of arguments that a plugin is built with, on poisoned padding, and scores far apart."""
    from li_compile.kernels._plugin_kernel import block_sparse_plugin_kernel as kernel

    (q, k, v, *rest), more = given(case)
    wide = lambda x: x.repeat(1, 1, 1, 2).to(dtype)  # 32 channels
    plugin.sparse_attention(wide(q) * 4, [wide(x) * 4 for x in k], [wide(x) for x in v], *rest, **more)
    call = poisoned(calls[0])
    want = block_sparse_plugin(*call.values())
    constants, launch, grid = plugin_ptx.specialised(dtype, {n: tuple(x.shape) for n, x in call.items()})
    out = torch.full_like(want, torch.nan)
    kernel[(grid,)](*call.values(), out, **constants, num_warps=launch.num_warps)
    assert relative(out.double(), want.double()) <= (2e-3 if dtype == torch.float16 else 1e-5)


# What a plugin is made of.

def shapes(head_dim: int, block: int, first: int = 7) -> dict[str, tuple[int, ...]]:
    """Of a call with three query blocks, the last one not full, and so many blocks in the first source."""
    current = (1, 2, 3 * block - 4, head_dim)
    return {"q": current, "k": (1, 2, first * block, head_dim) if first else current, "current_k": current, "block_indices": (1, 2, 3, 6),
            "kv_valid": (first + 3,), "rows": (3 * block,)}  # fmt: skip


@pytest.fixture
def assembled(tmp_path):
    """Assembles PTX as a driver would: (registers, bytes of stack) of a thread, and bytes of arguments."""
    if not has_triton() or interpreting():
        pytest.skip("Triton compiles nothing here")
    from test_aot import resources, tool

    def run(ptx: str):
        source, binary = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
        source.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)[1]
        subprocess.run([tool("ptxas"), "--gpu-name", target, str(source), "-o", str(binary)], capture_output=True, check=True)
        used = resources(binary.read_bytes(), tmp_path)
        listing = subprocess.run([tool("cuobjdump"), "-elf", str(binary)], capture_output=True, text=True, check=True).stdout
        size = re.search(r"EIATTR_CBANK_PARAM_SIZE\s+Format:\s+\w+\s+Value:\s+(0x[0-9a-f]+)", listing)
        return used["REG"], used["STACK"] + used["LOCAL"], int(size[1], 16)

    return run


def parameters(made: plugin_ptx.Ptx) -> list[str]:
    return re.search(rf"\.visible \.entry {made.name}\(\s*(.*?)\s*\)", made.ptx, re.S)[1].split(",")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize(("head_dim", "block"), [(128, 128), (128, 64), (64, 64), (64, 48), (32, 128), (32, 16)])
def test_ptx(dtype, head_dim, block, assembled):
    made = plugin_ptx.aot_kernel(dtype, shapes(head_dim, block))
    assert [p.split()[1] for p in parameters(made)] == [".u64"] * 12 and made.extras == ()  # 11 inputs and the output, and no scratch memory
    assert ".target sm_80" in made.ptx and "cp.async.c" in made.ptx
    assert "/" not in re.sub("//.*", "", made.ptx) and ".debug" not in made.ptx, "paths of this machine"
    kinds = {torch.float16: "f16.f16", torch.bfloat16: "bf16.bf16"}
    if dtype in kinds:
        assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kinds[dtype]}" in made.ptx
    else:
        assert "mma" not in made.ptx, "fp32 must not go through TF32"
    rows = plugin_ptx.launch_config(dtype, head_dim, block).rows
    assert (made.grid, made.threads) == (1 * 2 * 3 * block // rows, 128) and made.shared <= 48 * 1024
    registers, spilled, size = assembled(made.ptx)
    assert 0 < registers <= 255 and spilled == 0 and size == 12 * 8


def test_the_order_of_arguments_is_that_of_the_operator():
    if not has_triton():
        pytest.skip("Triton is not installed")
    from li_compile.kernels._plugin_kernel import block_sparse_plugin_kernel as kernel

    assert tuple(kernel.arg_names[:12]) == plugin_ptx.ARGUMENTS and {n for n in kernel.arg_names[12:]} == {
        *plugin_ptx.specialised(torch.float16, shapes(64, 64))[0]}
    alike = {"block_indices": "INDICES", "block_counts": "COUNTS", "kv_valid": "VALID", "rows": "ROWS_TO"}
    assert [alike.get(n, n.upper()) for n in NAMES] + ["OUT"] == list(plugin_ptx.ARGUMENTS)


def test_ptx_for_hopper(assembled):
    """The same source for sm_90a: with its own product, where shared memory allows."""
    made = plugin_ptx.aot_kernel(torch.bfloat16, shapes(128, 64), 90)
    assert ".target sm_90a" in made.ptx and "wgmma.mma_async" in made.ptx and len(parameters(made)) == 12
    assert assembled(made.ptx)[1:] == (0, 12 * 8)
    with pytest.raises(ValueError, match="bytes of shared memory for sm_90, head_dim 64 and blocks of 64, and a plugin is granted 49152"):
        plugin_ptx.aot_kernel(torch.bfloat16, shapes(64, 64), 90)


def test_one_source(assembled):
    """Without a first source nothing of it is read: no branch between two addresses."""
    one, two = (plugin_ptx.aot_kernel(torch.float16, shapes(64, 64, first)) for first in (0, 7))
    assert one.grid == two.grid and "_param_3]" in two.ptx and "_param_3]" not in one.ptx
    assert assembled(one.ptx)[1:] == (0, 12 * 8)


def test_scratch_memory_is_refused():
    """A kernel that uses what Triton hands in behind its arguments cannot be launched by others."""
    body = "\n{{\n\tld.param.b64 \t%rd1, [k_param_0];\n{}\n}}"
    head = ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0,\n\t.param .u64 .ptr .global .align 1 k_param_1\n)"

    def compiled(extra: str = "", scratch: int = 0):
        metadata = types.SimpleNamespace(name="k", global_scratch_size=scratch, profile_scratch_size=0)
        return types.SimpleNamespace(metadata=metadata, asm={"ptx": head + body.format(extra)})

    assert without_hidden(compiled(), 1) == ".visible .entry k(\n\t.param .u64 .ptr .global .align 1 k_param_0\n)" + body.format("")
    for bad, count in ((compiled("\tld.param.b64 \t%rd2, [k_param_1];"), 1), (compiled(scratch=128), 1), (compiled(), 3)):
        with pytest.raises(RuntimeError, match="k was to take . arguments?, and takes 2"):
            without_hidden(bad, count)


@pytest.mark.parametrize(("change", "says"), [
    ({"rows": (100,)}, "rows must be whole blocks, one for each of 3 lists; found 100"),
    ({"k": (1, 2, -1, 64)}, "sizes are constants of the kernel, and must be known; found"),
    ({"kv_valid": (5,)}, "kv_valid must have an entry for each block, 10, or 3 where the second source is all; found 5"),
])
def test_shapes_that_do_not_fit(change, says):
    with pytest.raises(ValueError, match=says):
        plugin_ptx.specialised(torch.float16, shapes(64, 64) | change)


@pytest.mark.parametrize(("change", "says"), [
    ({}, None), ({"name": "li::pack_context"}, "it is not one of li::sparse_attention, li::sparse_decode"), ({"summary": True}, "sparse.summary"),
    ({"cos": 1}, r"encodes its operands itself \(cos\)"), ({"ratio": 1.0}, "nothing is left out of it"), ({"dim": 16}, "takes head_dim 32, 64, 128, found 16"),
    ({"dtype": torch.float64}, "computes in fp16, bf16 or fp32, found torch.float64"), ({"size": 8}, "needs a block_size that 16 divides, found 8"),
    ({"frames": 6000, "ratio": 0.5}, "sorts lists of at most 3840 blocks, and its would have"),
], ids=str)
def test_what_cannot_be_a_plugin(change, says):
    if not has_triton() or interpreting():
        pytest.skip("Triton compiles nothing here")
    change = {"name": "li::sparse_attention", "ratio": 0.3, "dim": 64, "dtype": torch.float16, "size": SIZE, "frames": 12} | change
    name, ratio, dim, dtype, size, frames = (change.pop(n) for n in ("name", "ratio", "dim", "dtype", "size", "frames"))
    plan = make_plan([frames * HEIGHT * WIDTH, 4 * HEIGHT * WIDTH], [1, 2], HEIGHT, WIDTH, tuple(TILE), size, ratio, 1.0)
    why = plugin.why_not_plugin(name, {"q": torch.empty(1, 2, 96, dim, dtype=dtype, device="meta"), **change}, plan)
    assert why is None if says is None else re.search(says, why), why


def test_what_is_wrong_with_where_it_is_compiled(monkeypatch):
    monkeypatch.setattr(plugin_ptx, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="compiled by Triton, which is not installed"):
        plugin_ptx.aot_kernel(torch.float16, shapes(64, 64))
    monkeypatch.setattr(plugin_ptx, "has_triton", lambda: True)
    monkeypatch.setattr(plugin_ptx, "interpreting", lambda: True)
    with pytest.raises(ValueError, match="Triton interprets its kernels here"):
        plugin_ptx.aot_kernel(torch.float16, shapes(64, 64))


def test_contract():
    """PyTorch's own checks of the operator: its fake, and that it neither writes to nor gives back what it is handed."""
    arguments = dict(zip(NAMES, (torch.randn(1, 2, 40, 32), *torch.randn(2, 1, 2, 64, 32), *torch.randn(2, 1, 2, 40, 32))))
    lists = torch.tensor([0, 2, 4]).int().expand(1, 2, 3, 3).contiguous(), *torch.full((2, 1, 2, 3), 3).int()
    tables = torch.tensor([16, 16, 16, 16, 16, 16, 8]).int(), torch.tensor([*range(40), *[-1] * 8]).int(), torch.tensor([0.2])
    arguments |= dict(zip(NAMES[5:], (*lists, *tables)))
    torch.library.opcheck(torch.ops.li.block_sparse_plugin.default, tuple(arguments.values()), test_utils=("test_schema", "test_faketensor"))
    assert NAME == "li::block_sparse_plugin"

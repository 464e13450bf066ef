"""One contract for block-sparse attention; every provider has to keep it.

Without a GPU, run with TRITON_INTERPRET=1 (test_interpreter.py does) to hold the Triton kernel to it as well.
"""

import pytest
import torch
import torch.nn.functional as F

from li_compile.kernels import block_sparse_attention, explain_provider, providers, use_provider
from li_compile.kernels._compat import has_triton, interpreting

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative L2
GPU = torch.cuda.is_available()


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU or interpreting(), reason="needs a CUDA device")]


def _cases():
    def case(name, dtype, device, marks=()):
        return pytest.param((name, dtype, device), id=f"{name}-{str(dtype)[6:]}-{device}", marks=marks)

    yield case("reference", torch.float64, "cpu")
    yield case("cpu", torch.float32, "cpu")
    yield case("cpu", torch.bfloat16, "cpu")
    if interpreting() and has_triton():
        yield case("triton", torch.float32, "cpu")
        yield case("triton", torch.float16, "cpu")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield case("triton", dtype, "cuda", needs_gpu)


@pytest.fixture(params=_cases())
def case(request):
    name, dtype, device = request.param
    with use_provider(name):
        yield name, dtype, device


def make(case, batch=1, heads=3, nq=2, nk=4, dim=32, block=16, valid=None):
    _, dtype, device = case
    q, k, v = (torch.randn(batch, heads, n * block, dim, device=device).to(dtype) for n in (nq, nk, nk))
    valid = torch.tensor(valid or [block] * nk, dtype=torch.int32, device=device)
    return q, k, v, valid, block


def lists(kept, pitch, device, poison=0):
    """kept: nested [B][H][nq] lists of blocks -> block_indices, block_counts."""
    counts = torch.tensor([[[len(r) for r in h] for h in b] for b in kept], dtype=torch.int32)
    indices = torch.tensor([[[list(r) + [poison] * (pitch - len(r)) for r in h] for h in b] for b in kept], dtype=torch.int32)
    return indices.to(device), counts.to(device)


def oracle(q, k, v, indices, counts, valid, block, scale):
    """Masked softmax in fp64 over the same kept set, built another way than any provider."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    allowed = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        for j in indices[b, h, i, : counts[b, h, i]].tolist():
            allowed[b, h, i * block : (i + 1) * block, j * block : j * block + int(valid[j])] = True
    k, v = (torch.where(allowed.any((0, 1, 2))[:, None], x, 0.0) for x in (k, v))
    scores = ((q @ k.mT) * scale).masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.where(weights > 0, weights, 0.0) @ v.nan_to_num(0.0), scores.logsumexp(-1)


def check(case, q, k, v, indices, counts, valid, block, scale=0.3):
    out, lse = block_sparse_attention(q, k, v, indices, counts, valid, block, scale)
    want, want_lse = oracle(q, k, v, indices, counts, valid, block, scale)
    assert out.dtype == q.dtype and out.shape == q.shape and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    assert out.isfinite().all(), "every row is written, and no poison leaks"
    error = (out.double().cpu() - want).norm() / want.norm().clamp(min=1e-9)
    assert error <= BOUND[q.dtype], f"relative L2 {error:.1e}"
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=1e-3, rtol=0)
    return out, lse


def test_counts_zero_one_max_and_odd_heads(case):
    q, k, v, valid, block = make(case)
    kept = [[[[], [2]], [[0, 1, 2, 3], [1, 3]], [[0], []]]]
    indices, counts = lists(kept, 4, q.device, poison=-7)  # what lies past the count must not be looked at
    out, lse = check(case, q, k, v, indices, counts, valid, block)
    for head, row in ((0, 0), (2, 1)):
        rows = slice(row * block, (row + 1) * block)
        assert (out[0, head, rows] == 0).all() and lse[0, head, rows].isneginf().all()


@pytest.mark.parametrize("valid", [[16, 16, 16, 5], [3, 16, 16, 1], [16, 0, 16, 16]], ids=str)
def test_padding_is_poisoned(case, valid):
    q, k, v, valid, block = make(case, valid=valid)
    for j, n in enumerate(valid.tolist()):
        k[:, :, j * block + n : (j + 1) * block] = float("nan")
        v[:, :, j * block + n : (j + 1) * block] = float("nan")
    kept = [[[[0, 1, 2, 3], [0, 3]], [[1, 3], [3]], [[0, 1], [1]]]]
    check(case, q, k, v, *lists(kept, 4, q.device), valid, block)


def test_unselected_blocks_are_poisoned(case):
    q, k, v, valid, block = make(case)
    for x in (k, v):
        x[:, 0, block : 2 * block] = float("nan")
        x[:, 2, :block] = float("inf")
    kept = [[[[0, 2], [3]], [[0, 1, 2, 3], [0, 1, 2, 3]], [[1, 2], [3]]]]
    check(case, q, k, v, *lists(kept, 4, q.device), valid, block)


def test_shared_run_of_blocks(case):
    """All rows keep 1 to 3, whole blocks side by side; the rest differs in number."""
    q, k, v, valid, block = make(case, nk=6, valid=[16] * 5 + [7])
    kept = [[[[1, 2, 3], [0, 1, 2, 3, 5]], [[0, 1, 2, 3], [1, 2, 3, 4]], [[1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]]]
    check(case, q, k, v, *lists(kept, 6, q.device), valid, block)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_density_one_is_dense(case, dim):
    q, k, v, valid, block = make(case, batch=2, heads=1, nq=1, nk=3, dim=dim, valid=[16, 16, 9])
    indices, counts = lists([[[[0, 1, 2]]]] * 2, 3, q.device)
    out, _ = check(case, q, k, v, indices, counts, valid, block, dim**-0.5)
    dense = F.scaled_dot_product_attention(*(x.double() for x in (q, k[:, :, :41], v[:, :, :41])))
    assert (out.double() - dense).norm() / dense.norm() <= BOUND[q.dtype]


def test_asymmetric_with_views(case):
    """More keys than queries, K and V are views with odd strides, blocks of two kernel tiles."""
    q, k, v, valid, block = make(case, heads=2, nq=1, nk=3, block=32, valid=[32, 20, 32])
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    check(case, q, k, v, *lists([[[[1, 2]], [[0, 1]]]], 3, q.device), valid, block)


def test_large_scores(case):
    q, k, v, valid, block = make(case, heads=1, nq=1, nk=2)
    out, lse = block_sparse_attention(q * 30, k * 30, v, *lists([[[[0, 1]]]], 2, q.device), valid, block, 1.0)
    assert out.isfinite().all() and lse.isfinite().all()


def test_first_key_has_no_weight(case):
    q, k, v, valid, block = make(case, heads=1, nq=1, nk=3)
    k[:, :, 0] = -q[:, :, 0] * 40  # the first query gives it e**-hundreds
    check(case, q, k, v, *lists([[[[0, 2]]]], 3, q.device), valid, block, 0.3)


def test_nothing_kept_at_all(case):
    q, k, v, valid, block = make(case)
    out, lse = block_sparse_attention(q, k, v, *lists([[[[], []]] * 3], 4, q.device), valid, block, 1.0)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or interpreting(), reason="needs a CUDA device")
@pytest.mark.parametrize("block,dim", [(64, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_at_real_tiles(dtype, block, dim):
    case = ("triton", dtype, "cuda")
    with use_provider("triton"):
        q, k, v, valid, block = make(case, nq=3, nk=7, dim=dim, block=block, valid=[block] * 6 + [block - 9])
        k[:, :, -9:], v[:, :, -9:] = float("nan"), float("nan")
        kept = [[[[0, 2, 6], [6], [1, 3, 4, 5]], [[], [0, 1, 2, 3, 4, 5, 6], [2]], [[5, 6], [0], [3, 4]]]]
        check(case, q, k, v, *lists(kept, 7, "cuda"), valid, block, dim**-0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or interpreting(), reason="needs a CUDA device")
def test_graph_replay_with_changed_lists():
    case = ("triton", torch.float16, "cuda")
    q, k, v, valid, block = make(case, heads=1, block=64, dim=64)
    indices, counts = lists([[[[0, 1], [2]]]], 4, "cuda")
    run = lambda: block_sparse_attention(q, k, v, indices, counts, valid, block, 0.125)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = run()
    for kept in ([[[[1, 3], [0, 1, 2, 3]]]], [[[[], [3]]]]):
        new = lists(kept, 4, "cuda")
        indices.copy_(new[0]), counts.copy_(new[1])
        graph.replay()
        want, _ = oracle(q, k, v, indices, counts, valid, block, 0.125)
        assert (out.double().cpu() - want).norm() / want.norm() <= 1e-3


def test_explains_its_choice():
    q = torch.randn(1, 1, 16, 32)
    args = (q, q, q, *lists([[[[0]]]], 1, "cpu"), torch.tensor([16], dtype=torch.int32), 16, 1.0)
    assert [p.name for p in providers("block_sparse_attention")] == ["cpu", "triton", "reference"]
    assert explain_provider("block_sparse_attention", *args)[0] == "cpu"
    name, reason = explain_provider("block_sparse_attention", *(x.double() if x is q else x for x in args))
    assert name == "reference" and "float64" in reason
    with use_provider("reference"):
        assert explain_provider("block_sparse_attention", *args)[0] == "reference"
    with use_provider("cpu"), pytest.raises(ValueError, match="float64"):
        explain_provider("block_sparse_attention", *(x.double() if x is q else x for x in args))


def test_environment_overrides(monkeypatch):
    q = torch.randn(1, 1, 16, 32)
    args = (q, q, q, *lists([[[[0]]]], 1, "cpu"), torch.tensor([16], dtype=torch.int32), 16, 1.0)
    monkeypatch.setenv("LI_COMPILE_PROVIDER", "reference")
    assert explain_provider("block_sparse_attention", *args)[0] == "reference"


def test_wrong_arguments_say_what_is_wrong():
    q = torch.randn(1, 1, 16, 32)
    indices, counts = lists([[[[0]]]], 1, "cpu")
    valid = torch.tensor([16], dtype=torch.int32)
    for bad, words in (
        ((q[:, :, :15], q, q, indices, counts, valid, 16, 1.0), "whole blocks"),
        ((q, q[..., :16], q, indices, counts, valid, 16, 1.0), "same B, H and D"),
        ((q, q, q, indices.long(), counts, valid, 16, 1.0), "int32"),
        ((q, q, q, indices, counts[:, :, :0], valid, 16, 1.0), "block_counts"),
        ((q, q, q, indices, counts, valid, 16, 0.0), "scale"),
    ):
        with pytest.raises(ValueError, match=words):
            block_sparse_attention(*bad)


def test_operator_is_well_formed():
    q = torch.randn(1, 2, 32, 32)
    args = (q, q, q, *lists([[[[0], [0, 1]]] * 2], 2, "cpu"), torch.tensor([16, 9], dtype=torch.int32), 16, 1.0)
    torch.library.opcheck(block_sparse_attention, args)

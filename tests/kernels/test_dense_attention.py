"""Dense attention over segments, against fp64; which kernel it gets, and why not ours."""

import pytest
import torch
import torch.nn.functional as F

from li_compile.kernels import dense_attention, explain_provider, use_provider
from li_compile.kernels._compat import interpreting
from li_compile.kernels.dense_attention import HEAD_DIM, LEAST_KEYS, why_no_dense_kernel

HOPPER = torch.cuda.is_available() and not interpreting() and torch.cuda.get_device_capability()[0] == 9
CASES = [pytest.param(("torch", torch.float32, "cpu"), id="torch-cpu"),
         *(pytest.param(("hopper", dtype, "cuda"), id=f"hopper-{str(dtype)[6:]}",
                        marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")])
           for dtype in (torch.float16, torch.bfloat16))]  # fmt: skip
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@pytest.fixture(params=CASES)
def case(request):
    yield request.param


def make(case, lengths, queries=4000, batch=2, heads=16, dim=128):
    _, dtype, device = case
    if device == "cpu":
        heads, lengths, queries = 2, [n // 16 for n in lengths], queries // 64
    new = lambda n: torch.randn(batch, n, heads, dim, device=device).to(dtype).transpose(1, 2)  # as models have it
    return new(queries), [new(n) for n in lengths], [new(n) for n in lengths]


def check(case, q, k, v, scale=0.2):
    with use_provider(case[0]):
        out = dense_attention(q, k, v, scale)
    want = F.scaled_dot_product_attention(q.double(), torch.cat(k, 2).double(), torch.cat(v, 2).double(), scale=scale)
    assert out.shape == q.shape and out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    assert (out.double() - want).norm() / want.norm() <= BOUND[q.dtype]


@pytest.mark.parametrize("lengths", [(2100,), (2048, 512), (2300, 333), (300, 2000, 100), (48, 300, 2000, 17)], ids=str)
def test_segments(case, lengths):
    check(case, *make(case, lengths, dim=64 if case[2] == "cpu" else 128))


def test_later_keys_outweigh_the_first(case):
    """What the kernel without a running maximum cannot hold is computed again."""
    q, k, v = make(case, (2000, 333))
    k[0][:, :, -5:] = 40 * q[:, :, :5]  # scores of 1000 and more
    check(case, q, k, v)


def test_memory_behind_a_segment_is_not_read(case):
    q, k, v = make(case, (2050, 333))
    for xs in (k, v):
        for i, x in enumerate(xs):
            long = torch.full((x.shape[0], x.shape[2] + 200, x.shape[1], x.shape[3]), float("nan"), dtype=x.dtype, device=x.device)
            long[:, : x.shape[2]] = x.transpose(1, 2)
            xs[i] = long[:, : x.shape[2]].transpose(1, 2)
    check(case, q, k, v)


def test_replays_in_a_graph(case):
    if case[2] == "cpu":
        pytest.skip("CUDA graphs")
    q, k, v = make(case, (2050, 333))
    with use_provider("hopper"):
        dense_attention(q, k, v, 0.2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dense_attention(q, k, v, 0.2)
        k[0].copy_(torch.randn_like(k[0]))
        graph.replay()
        assert torch.equal(out, dense_attention(q, k, v, 0.2))


def test_it_is_an_operator_and_says_what_is_wrong():
    q, k, v = make(("torch", torch.float32, "cpu"), (64, 32))
    torch.library.opcheck(torch.ops.li.dense_attention.default, (q, k, v, 0.3), test_utils=("test_schema", "test_faketensor"))
    for bad, words in (((q, k, v[:1], 0.3), "same segments"), ((q, [], [], 0.3), "at least one"), ((q, [k[0].double()], [v[0].double()], 0.3), "share batch")):
        with pytest.raises(ValueError, match=words):
            dense_attention(*bad)


def test_elsewhere_pytorchs_own_runs_and_the_reason_is_told():
    q = torch.randn(1, 2, 256, 64)
    name, reason = explain_provider("dense_attention", q, 4096)
    assert name == "torch" and "hopper" in reason


def test_what_is_small_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr("li_compile.kernels.block_sparse_hopper.supports", lambda problem: None)
    q = torch.empty(1, 24, 4096, HEAD_DIM, device="meta")
    assert why_no_dense_kernel(q, LEAST_KEYS) is None
    assert "found 2047 and" in why_no_dense_kernel(q, LEAST_KEYS - 1) and "found 2048 and 64" in why_no_dense_kernel(q[:, :15], LEAST_KEYS)
    assert "found 64" in why_no_dense_kernel(q[..., :64], LEAST_KEYS)

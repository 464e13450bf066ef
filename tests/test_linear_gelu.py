"""A linear layer and GELU become one operator where it is the tanh form; the operator against fp64, on every provider that runs here."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from models.worldplay import step
from test_exact import Rewritten
from torch import nn
from tracing import TINY, Compiled, Traced, relative

from li_compile.kernels import linear_gelu as operator
from li_compile.kernels import use_provider
from li_compile.kernels.linear_gelu import why_no_epilogue
from li_compile.passes.linear_gelu import linear_gelu

ANYWHERE = functools.wraps(linear_gelu)(functools.partial(linear_gelu, anywhere=True))
FUSED = torch.ops.li.linear_gelu.default


class Layer(nn.Module):
    """An MLP; ``change`` makes it another thing."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change, self.up, self.down = change, nn.Linear(8, 16, bias=change != "no bias"), nn.Linear(16, 8)

    def forward(self, x):
        change = self.change
        y = self.up(x)
        z = y * 2 if change == "something between" else y
        z = F.gelu(z.double() if change == "in fp64" else z, approximate="none" if change == "exact" else "tanh").to(x.dtype)
        return self.down(z + y if change == "used twice" else z)


def rewritten(change: str = "", *shape: int) -> Rewritten:
    torch.manual_seed(0)
    return Rewritten(Layer(change), torch.randn(*(shape or (2, 5)), 8), passes=(ANYWHERE,))


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_it_fires_once(shape):
    done = rewritten("", *shape)
    assert done.count == 1 and done.error() <= 1e-6
    assert [n.target for n in done.module.graph.nodes if n.target is FUSED] == [FUSED]
    assert done.before[0] == done.after[0] > 0, "the operations are counted as before"


@pytest.mark.parametrize(("change", "says"), [("exact", "tanh approximation"), ("used twice", "used elsewhere"), ("no bias", "no bias"),
                                              ("in fp64", None), ("something between", None)])
def test_look_alikes_stay(change, says):
    done = rewritten(change)
    assert done.count == 0 and not [n for n in done.module.graph.nodes if n.target is FUSED]
    assert (says in done.reasons) if says else not done.reasons


@pytest.mark.parametrize("form", ["flat", "regions"])
def test_a_model_has_one_a_block(form):
    run, x = step(3, form == "regions")
    done = Rewritten(run, x, passes=(ANYWHERE,))
    assert done.count == 3 and done.error() <= 1e-6


def test_under_autocast_operands_are_cast_as_they_were():
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 5, 8)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    done = Rewritten(run, x, passes=(ANYWHERE,))
    (node,) = [n for n in done.module.graph.nodes if n.target is FUSED]
    assert {a.meta["example_value"].dtype for a in node.args} == {torch.bfloat16}
    assert done.count == 1 and done.error() <= 4e-3


def test_on_a_cpu_it_is_left_to_inductor_and_the_report_says_so():
    compiled = Compiled(Traced(*step(1)), TINY | {"preset": "exact"})
    (variant,) = compiled.graph.variants
    assert variant.counts()["linear_gelu"] == 0 and "linear and GELU" in str(compiled.report)


def test_where_it_pays_it_is_used_in_any_preset(monkeypatch):
    monkeypatch.setattr("li_compile.passes.linear_gelu.why_no_epilogue", lambda x: None)
    monkeypatch.setattr("li_compile.passes.linear_gelu.LEAST_ROWS", 1)
    traced = Traced(*step(2))
    for options, count in (({}, 2), ({"exact.linear_gelu": False}, None)):
        compiled = Compiled(traced, TINY | {"preset": "exact"} | options)
        assert compiled.graph.variants[0].counts().get("linear_gelu") == count


def test_few_rows_are_left_alone(monkeypatch):
    monkeypatch.setattr("li_compile.passes.linear_gelu.why_no_epilogue", lambda x: None)
    few, many = (Rewritten(Layer(), torch.randn(n, 8), passes=(linear_gelu,)) for n in (511, 512))
    assert (few.count, many.count) == (0, 1) and "511 rows" in few.reasons


DTYPES = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6, torch.float64: 1e-12}


def operands(dtype, device="cpu", rows=(3, 7)):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*rows, 2, 16), torch.randn(24, 16), torch.randn(24)
    return [t.to(device, dtype) for t in (x.transpose(-2, 0), weight, bias)]  # not contiguous


def exact(x, weight, bias):
    return F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(dtype):
    given = operands(dtype)
    got = operator(*given)
    assert got.dtype == dtype and got.is_contiguous() and relative(got.double(), exact(*given)) <= DTYPES[dtype]
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("change", "says"), [
    (lambda x, w, b: (x[..., :8], w, b), "must be"), (lambda x, w, b: (x, w, b[:8]), "must be"), (lambda x, w, b: (x, w[0], b), "must be"),
    (lambda x, w, b: (x.double(), w, b), "share dtype")])
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        operator(*change(*operands(torch.float32)))


def test_why_there_is_no_epilogue():
    assert "NVIDIA" in why_no_epilogue(torch.ones(2))
    with pytest.raises(ValueError, match="NVIDIA"), use_provider("cublaslt"):
        operator(*operands(torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuBLASLt")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_the_gpu_it_is_the_epilogue_and_nearer_than_two_operators(dtype):
    assert why_no_epilogue(torch.ones(2, device="cuda", dtype=torch.float32))
    torch.manual_seed(0)
    given = [t.to("cuda", dtype) for t in (torch.randn(1000, 256), torch.randn(512, 256) / 16, torch.randn(512))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        got = operator(*given)
        torch.cuda.synchronize()
    names = [e.key for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 1, names
    two = F.gelu(F.linear(*given), approximate="tanh")
    assert relative(got.double(), exact(*given)) <= relative(two.double(), exact(*given))
    compiled = torch.compile(lambda x, w, b: operator(x, w, b) + 1)
    torch.testing.assert_close(compiled(*given), got + 1)

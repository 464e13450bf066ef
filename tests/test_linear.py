"""A scheduler's arithmetic, read as linear combinations."""

from __future__ import annotations

import pytest
import torch
from tracing import Traced

from li_compile.patterns.linear import Blocks, Linear
from li_compile.patterns.linear_read import Reader
from li_compile.pipeline import canonical


def read(fn, *inputs):
    """(what the result is read as, reader, names of the inputs' nodes) of a function."""
    traced = Traced(fn, *inputs)
    module = canonical(traced.module, traced.fakes)
    reader, output = Reader([]), next(n for n in module.graph.nodes if n.op == "output").args[0][0]
    return reader.read(output), reader


def combination(fn, *inputs) -> dict[str, float]:
    """Coefficient by input; all numbers."""
    found, _ = read(fn, *inputs)
    assert isinstance(found, Linear)
    return {node.name.strip("l_").rstrip("_"): float(c) for (node, chain), c in found.terms.items() if not chain}


X, Y = torch.randn(2, 8, 4), torch.randn(2, 8, 4)


@pytest.mark.parametrize(("fn", "want"), [
    (lambda x, y: x + 2 * y - x / 4, {"x": 0.75, "y": 2}),
    (lambda x, y: torch.add(x, y, alpha=3).neg(), {"x": -1, "y": -3}),
    (lambda x, y: torch.lerp(x, y, 0.25), {"x": 0.75, "y": 0.25}),
    (lambda x, y: (1 - 0.3) * x.float() + torch.rsub(y, x), {"x": 1.7, "y": -1}),
    (lambda x, y: (x.to(torch.bfloat16) * 0.5).type_as(x) + y.clone(), {"x": 0.5, "y": 1}),
    (lambda x, y: (x.flatten(1) * 2).view(2, 8, 4) + y.unflatten(1, (2, 4)).reshape(2, 8, 4), {"x": 2, "y": 1}),
    (lambda x, y: sum(x * s + y * (1 - s) for s in torch.tensor([0.5, 0.25, 0.125])[:2]), {"x": 0.75, "y": 1.25}),
    (lambda x, y: x * torch.full((), 2.0) + y * torch.tensor(4.0).sqrt(), {"x": 2, "y": 2}),
    (lambda x, y: x - x + y, {"y": 1}),
    (lambda x, y: x + y * 0.1 + y * 0.2 - y * 0.3, {"x": 1}),
], ids=range(10))
def test_sums_and_multiples(fn, want):
    found = {k: v for k, v in combination(fn, X, Y).items() if abs(v) > 1e-9}
    assert found == pytest.approx(want, abs=1e-9)


def test_numbers_of_the_graph_are_symbols():
    """Known at run time only: a 0-d tensor, one per sample; and what is computed from them."""
    found, reader = read(lambda x, y, s, t: x * (1 - s) + y * s * t, X, Y, torch.tensor(0.3), torch.randn(2, 1, 1))
    one, other = found.terms.values()
    assert str(one) == "1 - l_s_" and other.free_symbols == {s for s in reader.symbols if str(s) in ("l_s_", "l_t_")}


def test_blocks_are_read_one_by_one():
    """Frames that are put back: the rest is still a combination."""
    def fn(x, y, pinned):
        x = torch.cat([pinned, (x - 0.5 * y)[:, 2:]], 1)
        return torch.cat([pinned, (x - 0.25 * y)[:, 2:]], 1)

    found, _ = read(fn, X, Y, torch.randn(2, 2, 4))
    assert isinstance(found, Blocks) and found.dim == 1 and [size for size, _ in found.parts] == [2, 6]
    free = found.parts[1][1]
    assert {node.name: (chain, float(c)) for (node, chain), c in free.terms.items()} == {
        "l_x_": ((("slice", 1, 2, 8),), 1.0), "l_y_": ((("slice", 1, 2, 8),), -0.75)}


@pytest.mark.parametrize("fn", [
    lambda x, y: x * y, lambda x, y: (x + y).clamp(-1, 1), lambda x, y: x.transpose(1, 2).transpose(1, 2) @ y.mT,
    lambda x, y: torch.cat([x[:, :3], y[:, 3:]], 1)[:, 2:5], lambda x, y: x[:, [1, 0, 2]], lambda x, y: x.cumsum(1)],
    ids=["product", "clamp", "matmul", "slice across blocks", "gather", "cumsum"])
def test_what_is_no_combination_is_itself(fn):
    found, _ = read(fn, X, Y)
    ((node, chain), c), = found.terms.items()
    assert c == 1 and not chain and node.op.startswith("call")

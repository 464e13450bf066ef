"""Blocks that are one region: right whatever differs between them and whenever it changes, and on torch 2.11 traced once as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from tracing import OLD

from li_compile.patterns.trace_once import alike, traced_once

STAMPS = OLD  # where our own stamping is at work


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear, self.norm, self.doubled = nn.Linear(width, width), nn.LayerNorm(width), True
        self.settings = {"shifted": True}
        self.register_buffer("table", torch.randn(width))


@traced_once
def run(block, x, cached, more):
    y = block.norm(block.linear(x)) * (2 if block.doubled else 1) + (1 if block.settings["shifted"] else 0) + block.table
    if cached is not None:
        y = y + torch.cat([cached, x], 0).mean(0)
    return x - y if more["flip"] else x + y, y


class Model(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x, caches=None, flip=False, twice=False):
        kept = []
        for i, block in enumerate(self.blocks):
            x, y = run(block, x, x if twice and i else None if caches is None else caches[i], {"flip": flip})
            kept.append(y)
        return x, kept


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield Model().eval()
    torch._dynamo.reset()


def compiled(model, graphs: list | None = None):
    def backend(module, inputs):
        if graphs is not None:
            graphs.append(module)
        return module

    return torch.compile(model, backend=backend, fullgraph=True)


@torch.no_grad()
def check(model, fast, *args, **kwargs) -> None:
    (got, got_kept), (want, want_kept) = fast(*args, **kwargs), model(*args, **kwargs)
    for a, b in zip([got, *got_kept], [want, *want_kept]):
        torch.testing.assert_close(a, b)


def subgraphs(graph) -> int:
    return sum(isinstance(m, torch.fx.GraphModule) for m in graph.children())


def stamped(monkeypatch) -> list:
    """The blocks whose trace was another's."""
    from li_compile.patterns import trace_once

    found, stamp = [], trace_once._stamped
    monkeypatch.setattr(trace_once, "_stamped", lambda tx, trace, module, *more: (found.append(module.value), stamp(tx, trace, module, *more))[1])
    return found


def test_all_blocks_are_one_region_and_have_their_own_weights(model, monkeypatch):
    graphs, found = [], stamped(monkeypatch)
    check(model, compiled(model, graphs), torch.randn(3, 8))
    assert [subgraphs(g) for g in graphs] == [1]
    assert found == (list(model.blocks)[1:] if STAMPS else [])


def test_sizes_of_their_own(model, monkeypatch):
    """Each block's cache has a length of its own, which may change: one graph for all, with as many symbols as caches."""
    graphs, found = [], stamped(monkeypatch)
    fast = compiled(model, graphs)
    for lengths in ((5, 5, 5, 5), (7, 7, 7, 7), (9, 6, 9, 11)):
        caches = [torch.randn(n, 8) for n in lengths]
        for cache in caches:
            torch._dynamo.mark_dynamic(cache, 0)
        check(model, fast, torch.randn(3, 8), caches)
    assert len(found) == (3 if STAMPS else 0)
    if STAMPS:  # 2.14 compiles anew for lengths that are not all alike
        assert [subgraphs(g) for g in graphs] == [1]


@pytest.mark.parametrize("change", ["attribute", "dict", "buffer dtype", "training", "hook", "frozen"])
def test_a_block_that_differs_is_traced_by_itself(model, change):
    block = model.blocks[2]
    if change == "attribute":
        block.doubled = False
    elif change == "dict":
        block.settings["shifted"] = False
    elif change == "buffer dtype":
        block.table = block.table.half()
    elif change == "training":
        block.norm.train()
    elif change == "hook":
        block.linear.register_forward_hook(lambda module, args, out: out * 3)
    else:
        block.linear.weight.requires_grad_(False)
    assert not alike(model.blocks[0], block) and alike(model.blocks[0], model.blocks[1])
    check(model, compiled(model), torch.randn(3, 8))


def test_weights_that_are_tied_in_one_block_alone(model):
    one = model.blocks[0]
    one.norm.bias = one.linear.bias
    assert not alike(one, model.blocks[1]) and alike(model.blocks[1], model.blocks[2])
    if STAMPS:  # PyTorch 2.14 itself stamps out the first block's tie
        check(model, compiled(model), torch.randn(3, 8))


@pytest.mark.skipif(not STAMPS, reason="PyTorch 2.14 itself does it wrong")
def test_a_weight_of_the_first_block_that_is_someone_elses_too(model):
    """Dynamo knows it under the other's name, which is no block's."""

    class Tied(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight, self.inner = inner.blocks[0].linear.weight, inner

        def forward(self, x):
            return self.inner(x @ self.weight)

    tied = Tied(model).eval()
    check(tied, compiled(tied), torch.randn(3, 8))


@pytest.mark.parametrize("block", [0, pytest.param(3, marks=pytest.mark.skipif(not STAMPS, reason="PyTorch 2.14 itself guards the traced block alone"))])
def test_what_changes_later_is_noticed(model, block):
    fast, x = compiled(model), torch.randn(3, 8)
    check(model, fast, x)
    model.blocks[block].doubled = False
    check(model, fast, x)
    model.blocks[block].settings["shifted"] = False
    check(model, fast, x)
    model.blocks[block].linear.weight = nn.Parameter(torch.randn(8, 8))
    check(model, fast, x)


def test_modes_and_constants_are_part_of_it(model):
    fast, x = compiled(model), torch.randn(3, 8)
    check(model, fast, x)
    check(model, fast, x, flip=True)
    with torch.autocast("cpu", torch.bfloat16):
        check(model, fast, x)


@pytest.mark.skipif(not STAMPS, reason="PyTorch 2.14 itself takes a trace with one tensor for two arguments for one with two")
def test_one_tensor_for_two_arguments_is_another_call(model, monkeypatch):
    found = stamped(monkeypatch)
    check(model, compiled(model), torch.randn(3, 8), twice=True)
    assert found == list(model.blocks)[2:]

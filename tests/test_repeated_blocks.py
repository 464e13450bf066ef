"""Flat graphs of equal blocks: which become regions, that results stay, and what stays outside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tracing import Traced, relative, seeded, world_inputs

from li_compile.passes.propagate import propagate, tidy
from li_compile.passes.regions import drop_unused, hand_in_sizes
from li_compile.passes.repeated_blocks import repeated_blocks
from li_compile.patterns._compat import fake_mode_of
from li_compile.patterns.graph import REGION, name_of, region_calls, subgraphs, value
from li_compile.pipeline import canonical
from li_compile.regions import lower_regions


class Block(nn.Module):
    def __init__(self, dim=8, odd=0.0, chatty=False):
        super().__init__()
        self.norm1, self.norm2, self.odd, self.chatty = nn.LayerNorm(dim), nn.LayerNorm(dim), odd, chatty
        self.qkv, self.out, self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, condition):
        q, k, v = self.qkv(self.norm1(x) * condition + self.odd).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.chatty:
            x = x + torch.randn_like(x)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    """Blocks between two projections."""

    def __init__(self, depth=6, **block):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block(**block) for _ in range(depth))

    def forward(self, x, condition):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(x)


class Scattered(Stack):
    """Every block's output is read again at the end."""

    def forward(self, x, condition):
        x, seen = self.enter(x), []
        for block in self.blocks:
            x = block(x, condition)
            seen.append(x)
        return self.leave(sum(seen))


class Halves(Stack):
    """Two streams that are views of one tensor between the blocks."""

    def forward(self, x, condition):
        a, b = self.enter(x).chunk(2, 1)
        for block in self.blocks:
            a, b = block(torch.cat([a, b], 1), condition).chunk(2, 1)
        return self.leave(torch.cat([a, b], 1))


class Numbered(Stack):
    """Each block is handed its own of a stack of tensors, by its number."""

    def forward(self, x, condition):
        x, conditions = self.enter(x), torch.stack([self.enter.bias * i for i in range(6)])
        stacked = self.blocks[0].norm1.weight.expand(6, 8)
        for i, block in enumerate(self.blocks):
            x = block(x, condition * stacked[i]) + conditions[i]
        return self.leave(x)


class Pairs(nn.Module):
    """Two kinds of blocks by turns, then one of them alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(Block(odd=float(i % 2)) for i in range(10))
        self.second = nn.ModuleList(Block(odd=2.0) for _ in range(5))

    def forward(self, x, condition):
        for block in (*self.first, *self.second):
            x = block(x, condition)
        return x


INPUTS = lambda width=4: (torch.randn(2, 6, width), torch.rand(2, 1, 8))


def run(model, *inputs):
    """(calls of each region, relative error, operators left outside) of a model's graph after the pass."""
    traced = Traced(model, *inputs)
    module = canonical(traced.module, traced.fakes)
    flat = sum(n.op.startswith("call") for n in module.graph.nodes)
    record = repeated_blocks(module)
    tidy(module)
    propagate(module, traced.fakes, fake_mode_of(traced.fakes))
    again = repeated_blocks(module)
    assert again.count == 0
    with torch.no_grad():
        torch.manual_seed(1)
        want = traced(*inputs)
        torch.manual_seed(1)
        error = relative(module(*traced.arguments(*inputs))[0], want)
    calls = [sum(n.target is REGION and n.args[1] == name for n in module.graph.nodes) for name in subgraphs(module)]
    left = sum(n.op.startswith("call") and n.target is not REGION and name_of(n) != "getitem" for n in module.graph.nodes)
    assert record.count == sum(calls) and flat > left or not calls
    return calls, error, left


@pytest.mark.parametrize("case, calls, left", [
    (lambda: Stack(6), [6], 2),  # the two projections
    (lambda: Stack(4), [4], 2),
    (lambda: Scattered(6), [6], 8),  # and the sum
    (lambda: Numbered(6), [6], 10),  # and six conditions, their stack, an expanded weight
    (Pairs, [5, 5], 0),
], ids=["stack", "four", "every output read", "numbered", "two kinds by turns"])
def test_equal_blocks_become_one_region(case, calls, left):
    model = seeded(case)
    found, error, outside = run(model, *INPUTS(8 if isinstance(model, Pairs) else 4))
    assert (sorted(found), outside) == (calls, left) and error <= 1e-6


def test_blocks_whose_streams_are_views_are_cut_elsewhere():
    calls, error, _ = run(seeded(Halves), *INPUTS())
    assert calls and calls[0] >= 5 and error <= 1e-6


@pytest.mark.parametrize("case", [lambda: Stack(3), lambda: Stack(6, chatty=True)], ids=["three", "random"])
def test_few_blocks_and_effects_stay_flat(case):
    calls, error, _ = run(seeded(case), *INPUTS())
    assert calls == [] and error == 0


def test_sizes_may_be_symbolic():
    x, condition = INPUTS()
    torch._dynamo.mark_dynamic(x, 1)
    calls, error, _ = run(seeded(Stack), x, condition)
    assert calls == [6] and error <= 1e-6


def test_autocast_goes_with_the_blocks():
    class Cast(Stack):
        def forward(self, x, condition):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, condition).float()

    model = seeded(Cast)
    calls, error, _ = run(model, *INPUTS())
    assert calls == [6] and error <= 1e-6


def test_the_steps_of_a_flat_world_hold_regions_of_blocks(tiny_world):
    """Behind all other passes: the first block, which computes what the others share, may stay outside."""
    from examples.doom_world.model import ChunkSampler

    world = tiny_world(regional=False, depth=5)
    inputs = world_inputs(world, 8)
    traced = Traced(ChunkSampler(world), *inputs)
    compiled = traced.compile(preset="exact")
    assert relative(compiled(*inputs), traced(*inputs)) <= 1e-5
    (variant,) = compiled.graph.variants
    assert variant.counts()["repeated_blocks"] >= 4 and variant.counts()["share_steps"] == 4


def test_where_inductor_refuses_regions_blocks_are_compiled_one_by_one():
    model, inputs = seeded(Stack), INPUTS()
    traced = Traced(model, *inputs)
    module = canonical(traced.module, traced.fakes)
    repeated_blocks(module)
    tidy(module)
    propagate(module, traced.fakes, fake_mode_of(traced.fakes))

    def lower(graph_module, _):
        if any(n.target is REGION for n in graph_module.graph.nodes):
            raise AssertionError("subgraph args must have consistent values!")
        return graph_module

    with pytest.warns(UserWarning, match="consistent values.*compiled one by one"), torch.no_grad():
        run = lower_regions(module, traced.fakes, lower, {})
        assert relative(run(*traced.arguments(*inputs))[0], traced(*inputs)) <= 1e-6


def test_regions_are_handed_the_sizes_in_their_operands_shapes():
    """Inductor 2.11 cannot get s from the size 4 * s of an operand; passes drop the s that Dynamo hands in beside it, as nothing reads it."""
    inner = torch.compiler.nested_compile_region(lambda x, keys: x + keys.sum(1, keepdim=True))
    outer = torch.compiler.nested_compile_region(lambda x, keys: inner(inner(x, keys), keys) * 2)

    def model(x, context):
        keys = torch.cat([context] * 4, 1)
        return outer(x, keys) + outer(x + 1, keys)

    x, context = torch.randn(2, 1, 3), torch.randn(2, 5, 3)
    torch._dynamo.mark_dynamic(context, 1)
    seen = []

    def backend(gm, inputs):
        module = canonical(gm, [value(p) for p in gm.graph.find_nodes(op="placeholder")])
        for part in (module, *subgraphs(module).values()):
            for name, sub in subgraphs(part).items():
                drop_unused(part, sub, name)
        hand_in_sizes(module)
        for part in (module, *subgraphs(module).values()):
            for name in subgraphs(part):
                for call in region_calls(part, name):
                    seen.append([v for v in map(value, call.args[2:]) if isinstance(v, torch.SymInt)])
        before = len(module.graph.nodes), [len(c.args) for c in module.graph.nodes if c.target is REGION]
        hand_in_sizes(module)  # nothing is missing now
        assert before == (len(module.graph.nodes), [len(c.args) for c in module.graph.nodes if c.target is REGION])
        return module

    got = torch.compile(model, backend=backend, fullgraph=True)(x, context)
    assert torch.allclose(got, model(x, context), atol=1e-5)
    assert len(seen) == 4 and all(len(sizes) == 1 for sizes in seen)

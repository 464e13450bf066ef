"""Shapes are recomputed where a graph changed, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter, symbolic_trace

from li_compile.passes.propagate import propagate
from li_compile.patterns.graph import value


@pytest.fixture
def ran(monkeypatch):
    """Names of the functions that were run on fake tensors."""
    names, call = [], Interpreter.call_function

    def counted(self, target, args, kwargs):
        names.append(target.__name__)
        return call(self, target, args, kwargs)

    monkeypatch.setattr(Interpreter, "call_function", counted)
    return names


def chain(x):
    x = torch.relu(x)
    x = torch.sin(x)
    for _ in range(5):
        x = torch.cos(x)
    return torch.cat([x, torch.exp(x)], dim=1)


def node(module, name):
    return next(n for n in module.graph.nodes if n.op == "call_function" and n.target.__name__ == name)


def test_what_did_not_change_is_not_run_again(ran):
    module, mode = symbolic_trace(chain), FakeTensorMode()
    with mode:
        x = torch.empty(2, 3)
    propagate(module, [x], mode)
    assert len(ran) == 9
    ran.clear()
    other = copy.deepcopy(module)  # as before each pass
    propagate(other, [x], mode)
    assert ran == [] and value(node(other, "cat")).shape == (2, 6)
    node(other, "sin").target = torch.tan  # another operator with the same result
    other.recompile()
    propagate(other, [x], mode)
    assert ran == ["tan"]


def test_what_follows_a_changed_shape_is_run_again(ran):
    module, mode = symbolic_trace(chain), FakeTensorMode()
    with mode:
        x, longer = torch.empty(2, 3), torch.empty(2, 5)
    propagate(module, [x], mode)
    ran.clear()
    propagate(module, [longer], mode)
    assert len(ran) == 9 and value(node(module, "cat")).shape == (2, 10)
    ran.clear()
    exp = node(module, "exp")
    with module.graph.inserting_after(exp):
        half = module.graph.call_function(torch.narrow, (exp, 1, 0, 2))
    exp.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)
    module.recompile()
    propagate(module, [longer], mode)
    assert ran == ["narrow", "cat"] and value(node(module, "cat")).shape == (2, 7)


def test_fake_tensors_of_one_mode_do_not_get_into_another(ran):
    module, modes = symbolic_trace(chain), (FakeTensorMode(), FakeTensorMode())
    for mode in modes:
        with mode:
            x = torch.empty(2, 3)
        ran.clear()
        propagate(module, [x], mode)
        assert len(ran) == 9 and all(value(n).fake_mode is mode for n in module.graph.nodes if isinstance(value(n), torch.Tensor))


def test_dtypes_follow_autocast_that_a_graph_enters_and_leaves():
    def mixed(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.mm(x, w)
        return torch.mm(x, w), y

    modules = []
    torch._dynamo.reset()
    torch.compile(mixed, backend=lambda module, _: modules.append(module) or module)(torch.ones(2, 2), torch.ones(2, 2))
    (module,), mode = modules, FakeTensorMode()
    with mode:
        inputs = [torch.empty(2, 2), torch.empty(2, 2)]
    for _ in range(2):
        propagate(module, inputs, mode)
        plain, cast = (value(n) for n in next(n for n in module.graph.nodes if n.op == "output").args[0])
        assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
        assert not torch.is_autocast_enabled("cpu")


def test_methods_that_reshape_in_place_are_not_applied_twice():
    def turned(x):
        y = x + 1
        y.unsqueeze_(0)
        return y * 2

    module, mode = symbolic_trace(turned), FakeTensorMode()
    with mode:
        x = torch.empty(3)
    for _ in range(3):
        propagate(module, [x], mode)
        assert value(next(n for n in module.graph.nodes if n.op == "output")).shape == (1, 3)


def test_tensors_made_of_numbers_alone_belong_to_the_new_mode():
    class Made(torch.nn.Module):
        def forward(self, x):
            return x + torch.arange(3)

    module = symbolic_trace(Made())
    with module.graph.inserting_before(next(n for n in module.graph.nodes if n.name == "add")):
        made = module.graph.call_function(torch.arange, (3,))
    next(n for n in module.graph.nodes if n.name == "add").args = (next(iter(module.graph.nodes)), made)
    module.recompile()
    for mode in (FakeTensorMode(), FakeTensorMode()):
        with mode:
            x = torch.empty(2, 3)
        propagate(module, [x], mode)
        assert value(made).fake_mode is mode and value(node(module, "add")).fake_mode is mode

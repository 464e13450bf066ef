"""A front end for the matchers that takes milliseconds: torch.fx with example values, spelled as Dynamo spells a graph.

Dynamo needs a tenth of a second a graph, too long for a thousand. That the two write the same operators in the same
order is checked on a sample of every kind of graph.
"""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Proxy, Tracer
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from tracing import Traced

from li_compile.patterns.graph import hint, name_of, shape

FACTORIES = {torch.arange, torch.ones, torch.zeros, torch.full, torch.tensor, torch.randn, torch.rand, torch.linspace, torch.eye}


class Quick(Traced):
    """A module, or a function of tensors that reads modules, traced. Sizes are dynamic as marked for Dynamo."""

    def __init__(self, fn, *inputs):
        weights = dict(_weights(fn))
        tracer = _Tracer(weights, inputs)
        with _read_by_proxy(tracer), _Factories(tracer), torch.no_grad():
            result = fn.forward(*tracer.given) if isinstance(fn, nn.Module) else fn(*tracer.given)
        tracer.create_node("output", "output", (tracer.create_arg(result if isinstance(result, tuple) else (result,)),), {})
        kept = [name for name, proxy in tracer.weights.items() if proxy.node.users]
        for name in weights.keys() - set(kept):
            tracer.graph.erase_node(tracer.weights[name].node)
        tracer.graph.lint()
        self.module = GraphModule(nn.Module(), tracer.graph)
        self.fakes = [n.meta["example_value"] for n in self.module.graph.nodes if n.op == "placeholder"]
        self.example = [*tracer.sizes.values(), *(weights[name] for name in kept), *tree_leaves(list(inputs))]
        self.compiled = {}
        self.position = [next((i for i, x in enumerate(inputs) if x is arg), None) for arg in self.example]


def operators(module: GraphModule) -> list[tuple]:
    """What a graph does, in order, whichever front end wrote it."""
    # Dynamo takes slices of tuples in Python, and notes once a process that a module was made.
    skipped = lambda n: name_of(n) == "_log_api_usage_once" or name_of(n) == "getitem" and shape(n) is None
    return [(name_of(n), [hint(d) for d in shape(n) or ()]) for n in module.graph.nodes if n.op.startswith("call") and not skipped(n)]


def as_dynamo(fn, *inputs) -> Traced:
    """What Dynamo traces, which must be what ``Quick`` writes."""
    traced = Traced(fn, *inputs)
    assert operators(Quick(fn, *inputs).module) == operators(traced.module)
    return traced


def _weights(fn, seen=None):
    """(name, tensor) of the parameters and buffers of a module, or of those in a function's closure."""
    seen = set() if seen is None else seen
    if id(fn) in seen:
        return
    seen.add(id(fn))
    if isinstance(fn, nn.Module):
        for name, tensor in [*fn.named_parameters(), *fn.named_buffers()]:
            yield f"l_{len(seen)}_{name.replace('.', '_')}_", tensor
    for cell in getattr(fn, "__closure__", None) or ():
        yield from _weights(cell.cell_contents, seen)


class _Value(Proxy):
    """A proxy that knows its example value, so that sizes are numbers, and results of several tensors can be unpacked."""

    example = property(lambda self: self.node.meta["example_value"])
    dtype = property(lambda self: self.example.dtype)
    device = property(lambda self: self.example.device)
    ndim = property(lambda self: self.example.dim())
    shape = property(lambda self: tuple(self.size(i) for i in range(self.ndim)))

    mT = property(lambda self: self.tracer.create_proxy("call_function", torch.ops.aten.mT, (self,), {}))

    def dim(self):
        return self.ndim

    def size(self, dim=None):
        size = self.shape if dim is None else self.example.shape[dim]
        if isinstance(size, (int, tuple)):
            return size
        known = self.tracer.symbols.get(str(size))
        return known if known is not None else self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def __len__(self):
        return len(self.example)

    def __iter__(self):
        return iter([self[i] for i in range(len(self.example))])

    def __setitem__(self, index, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Factories(TorchFunctionMode):
    """Records tensors that are made of numbers alone."""

    def __init__(self, tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Tracer(Tracer):
    """Inputs in Dynamo's order: sizes, weights, arguments."""

    def __init__(self, weights: dict[str, torch.Tensor], inputs):
        super().__init__()
        self.root, self.graph = nn.Module(), Graph(tracer_cls=_Tracer)
        self.module_stack, self.scope = {}, torch.fx.proxy.Scope("", None)
        # Without symbols PyTorch's cache of fake results serves all graphs.
        self.mode = FakeTensorMode(shape_env=ShapeEnv() if any(map(_dynamic, tree_leaves(list(inputs)))) else None)
        self.symbols: dict[str, Proxy] = {}
        self.sizes: dict[str, int] = {}
        fakes = [self._fake(tensor) for tensor in tree_leaves(list(inputs))]
        self.tensors = weights
        self.weights = {name: self._input(name, self.mode.from_tensor(w), type(w)) for name, w in weights.items()}
        leaves = iter([self._input(f"l_{i}_", fake) for i, fake in enumerate(fakes)])
        self.given = tree_map(lambda _: next(leaves), list(inputs))

    def _fake(self, tensor):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if self.mode.shape_env is None:
            return self.mode.from_tensor(tensor)
        how = [DimDynamic.DYNAMIC if i in _dynamic(tensor) else DimDynamic.STATIC for i in range(tensor.dim())]
        fake = self.mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=how))
        for size, number in zip(fake.shape, tensor.shape):
            if not isinstance(size, int) and str(size) not in self.sizes:
                self.sizes[str(size)], self.symbols[str(size)] = number, self._input(str(size), size)
        return fake

    def _input(self, name, value, kind=None) -> Proxy:
        proxy = self.create_proxy("placeholder", name, (), {}, type_expr=kind)
        proxy.node.meta["example_value"] = value
        return proxy

    def proxy(self, node):
        return _Value(node, self)

    def iter(self, obj):
        return _Value.__iter__(obj)

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind.startswith("call"):
            given, named = map_arg((proxy.node.args, proxy.node.kwargs), lambda n: n.meta["example_value"])
            with self.mode:
                proxy.node.meta["example_value"] = target(*given, **named) if kind == "call_function" \
                    else getattr(given[0], target)(*given[1:], **named)
        return proxy


def _dynamic(x) -> set[int]:
    """Dimensions of a tensor that are marked as dynamic."""
    return getattr(x, "_dynamo_dynamic_indices", set()) | getattr(x, "_dynamo_weak_dynamic_indices", set())


class _read_by_proxy:
    """While it is active, modules give the tracer's proxies for their weights."""

    def __init__(self, tracer):
        self.proxies = {id(tensor): tracer.weights[name] for name, tensor in tracer.tensors.items()}

    def __enter__(self):
        self.original = nn.Module.__getattr__

        def get(module, name):
            found = self.original(module, name)
            return self.proxies.get(id(found), found)

        nn.Module.__getattr__ = get

    def __exit__(self, *_):
        nn.Module.__getattr__ = self.original

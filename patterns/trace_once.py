"""Regions that are traced once for all modules alike, on PyTorch 2.11 too.

``torch.compiler.nested_compile_region`` compiles a block once, but Dynamo 2.11 finds that blocks are alike by tracing each of them: of 54 blocks
that is most of the time to a first call, and all of it where the caches are warm. Later versions stamp out the first trace (2.14 does). What is
marked with :func:`traced_once` is stamped out on 2.11 as well, where the module and the arguments are like those of a trace; else it is traced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, nn

from ._compat import first_symbol

__all__ = ["alike", "traced_once"]

MARK = "__li_traced_once__"
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
STATE = ("_parameters", "_buffers", "_modules")


def traced_once(function: Callable) -> Callable:
    """``nested_compile_region`` of ``function(module, *args)``, of which must hold: it changes nothing, reads of the outside only its arguments
    and constants, and returns a tuple of tensors that it made."""
    function.__dict__[MARK] = True
    if torch.__version__.startswith("2.11."):
        _install()
    return torch.compiler.nested_compile_region(function)


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether a trace of one module is one of the other: equal classes and attributes down to the last submodule, and tensors of equal kinds, of
    which the same ones are one."""
    return _alike(one, other) and _ties(one) == _ties(other)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other):
        return False
    a, b = vars(one), vars(other)
    if a.keys() != b.keys() or any(a[name].keys() != b[name].keys() for name in STATE):
        return False
    tensors = [(x, b[name][key]) for name in STATE[:2] for key, x in a[name].items()]
    return all(_same(value, b[name]) for name, value in a.items() if name not in STATE) and all(_kind(x) == _kind(y) for x, y in tensors) \
        and all(x is y or x is not None and y is not None and _alike(x, y) for key, x in a["_modules"].items() for y in [b["_modules"][key]])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _ties(module: nn.Module) -> list[int]:
    """For each of a module's tensors the first place where it stands."""
    first: dict[int, int] = {}
    return [first.setdefault(id(x), i) for i, x in enumerate(_tensors(module).values())]


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, PLAIN):
        return x == y
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(map(_same, x, y))
    if isinstance(x, dict):
        return list(x) == list(y) and all(_same(value, y[key]) for key, value in x.items())
    if isinstance(x, set):
        return x == y
    method = getattr(x, "__func__", None)  # of its own module each
    return method is not None and method is y.__func__


def _kind(x: Tensor | None) -> tuple | None:
    return None if x is None else (type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad)


class _Unlike(Exception):
    """A call that is traced by itself."""


@dataclasses.dataclass
class _Trace:
    """One traced call: what of a later call must be equal, and what it is made from.

    key: of the arguments; module and where Dynamo found it; tensors: nodes of those among the arguments; symbols: of their sizes, in the order
    they are met; call: the node in the graph; picked: which of its results the function returned; guards: those on the module; sizes: what was
    found to hold of sizes.
    """

    key: tuple
    module: nn.Module
    source: Any
    tensors: list
    symbols: list
    call: torch.fx.Node
    picked: list[int]
    guards: list
    sizes: list


def _install() -> None:
    """Have Dynamo's variable for ``invoke_subgraph`` look for a trace first (2.11 alone: all of this is private)."""
    from torch._dynamo.variables.higher_order_ops import InvokeSubgraphHigherOrderVariable as variable

    original = variable._call_function
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def call(self, tx, args, kwargs):
        function = args[0].get_function() if hasattr(args[0], "get_function") else None
        if kwargs or not getattr(function, MARK, False) or torch.is_grad_enabled() or tx.output.current_tracer.parent is not None:
            return original(self, tx, args, kwargs)
        try:
            key, tensors, symbols, module = _read(args[1:])
        except _Unlike:
            return original(self, tx, args, kwargs)
        key = (function, key, _modes())
        traces = tx.output.__dict__.setdefault(MARK, [])
        for trace in traces:
            if trace.key == key and alike(trace.module, module.value):
                try:
                    return _stamped(tx, trace, module, tensors, symbols)
                except _Unlike:
                    break
        sizes = tx.output.shape_env.guards
        known = len(sizes)
        result = original(self, tx, args, kwargs)
        made = _trace(key, module, tensors, symbols, result, tx.output.guards, [g.expr for g in sizes[known:]])
        if made is not None:
            traces.append(made)
        return result

    call.__dict__[MARK] = True
    variable._call_function = call


def _modes() -> tuple:
    """What Dynamo has switched on where it traces."""
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds) + (torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled())


def _read(args) -> tuple[tuple, list, list, Any]:
    """(what must be equal, tensors, symbols of their sizes, the module) of a call's arguments, as Dynamo's variables. Symbols are equal by the
    place where they are met first: each block's cache has its own."""
    from torch._dynamo.variables import ConstantVariable, ConstDictVariable, SymNodeVariable, TensorVariable, UnspecializedNNModuleVariable
    from torch._dynamo.variables.lists import BaseListVariable

    tensors: list = []
    symbols: list = []
    modules: list = []

    def size(n):
        if isinstance(n, int):
            return n
        expression = first_symbol(n)
        for symbol in sorted(expression.free_symbols - set(symbols), key=str):
            symbols.append(symbol)
        return expression.xreplace({symbol: sympy.Symbol(f"size{i}") for i, symbol in enumerate(symbols)})

    def read(x):
        x = x.realize()
        if isinstance(x, UnspecializedNNModuleVariable):
            modules.append(x)
            return "module"
        if isinstance(x, TensorVariable):
            nodes = [t.as_proxy().node for t in tensors]
            node = x.as_proxy().node
            tensors.append(x)
            value = node.meta["example_value"]
            sizes = tuple(map(size, (*value.shape, *value.stride())))
            return "tensor", type(x), sizes, value.dtype, value.device, value.requires_grad, nodes.index(node) if node in nodes else -1
        if isinstance(x, ConstantVariable):
            return "constant", type(x.value), x.value
        if isinstance(x, SymNodeVariable):
            return "size", size(x.sym_num)
        if isinstance(x, BaseListVariable):
            return type(x), tuple(map(read, x.items))
        if isinstance(x, ConstDictVariable):
            return "dict", tuple((read(k.vt), read(v)) for k, v in x.items.items())
        raise _Unlike

    key = tuple(map(read, args))
    if len(modules) != 1 or modules[0].source is None:
        raise _Unlike
    return key, tensors, symbols, modules[0]


def _trace(key, module, tensors, symbols, result, guards, sizes) -> _Trace | None:
    """What to keep of a call that was traced; None where its result is not a tuple of tensors that the call in the graph gave."""
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.variables import TensorVariable, TupleVariable

    if not isinstance(result, TupleVariable) or not result.items or not all(isinstance(x, TensorVariable) for x in result.items):
        return None
    nodes = [x.as_proxy().node for x in result.items]
    calls = {n.args[0] for n in nodes if n.op == "call_function" and n.target.__name__ == "getitem"}
    if len(calls) != 1 or (call := calls.pop()).target is not torch.ops.higher_order.invoke_subgraph or any(n.target.__name__ != "getitem" for n in nodes):
        return None
    mine = [g for g in guards if _moved(g.originating_source, module.source, module.source) is not None]
    if any(g.inner_create_fn() is GuardBuilder.DUPLICATE_INPUT for g in mine):
        return None
    mine = [g for g in mine if g.inner_create_fn() is not GuardBuilder.TENSOR_MATCH]  # those come with the tensors
    return _Trace(key, module.value, module.source, [t.as_proxy().node for t in tensors], symbols, call, [n.args[1] for n in nodes], mine, sizes)


def _moved(source, old, new):
    """A source with another one at its root, None where it does not come from ``old``."""
    if source == old:
        return new
    base = getattr(source, "base", None)
    moved = None if base is None else _moved(base, old, new)
    return None if moved is None else dataclasses.replace(source, base=moved)


def _stamped(tx, trace: _Trace, module, tensors, symbols):
    """The traced call once more, with this module's weights, these tensors and their sizes."""
    from torch._dynamo.variables import TupleVariable, VariableTracker
    from torch._dynamo.variables.higher_order_ops import add_call_function
    from torch._guards import Guard

    tracer, env = tx.output.current_tracer, tx.output.shape_env
    renamed = dict(zip(trace.symbols, symbols))
    for holds in trace.sizes:
        if not env.evaluate_expr(holds.xreplace(renamed)):
            raise _Unlike
    names = {id(t): name for name, t in _tensors(trace.module).items()}
    own = _tensors(module.value)

    def operand(node):
        given = node.meta.get("grapharg") if node.op == "placeholder" else None
        source = None if given is None else _moved(given.source, trace.source, module.source)
        name = None if given is None else names.get(id(given.example))
        if name is not None and (source is None or node in trace.tensors):  # a weight that is someone else's too
            raise _Unlike
        if node in trace.tensors:
            return tensors[trace.tensors.index(node)].as_proxy()
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and (symbol := renamed.get(first_symbol(value))) in tracer.bound_symbols:
            found = tracer.bound_symbols[symbol]
            if not isinstance(found, torch.fx.Proxy):  # one that becomes an input when it is asked for
                found = tracer.bound_symbols[symbol] = found()
            return found
        if given is not None and source is None and not isinstance(value, torch.SymInt):  # the same for all
            return torch.fx.Proxy(node, tracer)
        if name is not None:
            return VariableTracker.build(tx, own[name], source).realize().as_proxy()
        raise _Unlike

    def size(n):
        if isinstance(n, int):
            return n
        if isinstance(n, torch.SymFloat):
            raise _Unlike
        expression = first_symbol(n).xreplace(renamed)
        return env.create_symboolnode(expression) if isinstance(n, torch.SymBool) else env.create_symintnode(expression, hint=None)

    read = [operand(n) for n in trace.call.args[2:]]
    with tx.fake_mode:
        results = tuple(torch.empty_strided([*map(size, x.shape)], [*map(size, x.stride())], dtype=x.dtype, device=x.device) if isinstance(x, Tensor)
                        else size(x) for x in trace.call.meta["example_value"])  # fmt: skip
    subgraph = torch.fx.Proxy(trace.call.args[0], tracer)
    made = add_call_function(tx, torch.ops.higher_order.invoke_subgraph, (subgraph, trace.call.args[1], *read), {}, results)
    for guard in trace.guards:
        tx.output.guards.add(Guard(_moved(guard.originating_source, trace.source, module.source), guard.create_fn))
    return TupleVariable([made.items[i] for i in trace.picked])

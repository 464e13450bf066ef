"""The private PyTorch API that matching uses, with its versions and reason."""

from __future__ import annotations

import contextlib

import torch


def known(condition) -> bool:
    """Whether a condition on symbolic sizes is known to hold, without adding a guard (2.11 to 2.14)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(condition) if isinstance(condition, bool) else statically_known_true(condition)


def hint(size) -> int | None:
    """The number that a size stood for while it was traced (2.11 to 2.14: ``SymInt.node.hint``); None if unknown."""
    if isinstance(size, torch.SymInt):
        return None if size.node.hint is None else int(size.node.hint)
    return int(size)


def free_symbols(x) -> set:
    """The size symbols that occur in a tensor's sizes and strides or in a symbolic number (2.11 to 2.14: ``SymInt.node``)."""
    numbers = (*x.shape, *x.stride(), x.storage_offset()) if isinstance(x, torch.Tensor) else (x,)
    return set().union(*(n.node.expr.free_symbols for n in numbers if isinstance(n, torch.SymInt)))


def bare_symbols(x) -> set:
    """The size symbols that are themselves a size or stride of a tensor, or a symbolic number (2.11 to 2.14: ``SymInt.node``)."""
    numbers = (*x.shape, *x.stride()) if isinstance(x, torch.Tensor) else (x,)
    return {n.node.expr for n in numbers if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol}


def first_symbol(size: torch.SymInt):
    """The symbol that a size got when it was met, of which compilers write code; ``SymInt.node.expr`` is what it was found to be equal to
    since (2.11 to 2.14: ``SymInt.node._expr``)."""
    return size.node._expr


def is_packet(target) -> bool:
    """Whether a call's target is an operator without its overload (2.11 to 2.14: ``torch._ops.OpOverloadPacket``)."""
    return isinstance(target, torch._ops.OpOverloadPacket)


def fake_mode_of(values):
    """The mode that the fake tensors among the values were made in, or None (2.11 to 2.14: ``FakeTensor.fake_mode``). Not
    ``detect_fake_mode``: while Dynamo compiles, that gives the mode of its tracing, which a copied graph's values are not of."""
    from torch._subclasses import FakeTensor

    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


@contextlib.contextmanager
def faking(mode):
    """Operators on a mode's fake tensors, or on symbolic sizes alone (mode None), nothing recorded for gradients. Of symbolic sizes C++ knows
    less than Python: without ``enable_python_dispatcher``, ``linear`` of a tensor with 4 dimensions raises on 2.11 (not on 2.14)."""
    from torch._dispatch.python import enable_python_dispatcher

    with mode or contextlib.nullcontext(), enable_python_dispatcher(), torch.no_grad():
        yield


def expression(size):
    """A size as a sympy expression (2.11 to 2.14: ``SymInt.node.expr``)."""
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def undisabled(function):
    """What ``torch.compiler.disable`` was put around (2.11 to 2.14: ``_torchdynamo_orig_callable``), or None."""
    return getattr(function, "_torchdynamo_orig_callable", None)


def dynamo_config():
    """Dynamo's options (2.11 to 2.14: ``torch._dynamo.config``)."""
    return torch._dynamo.config


def settle_sizes(tensor: torch.Tensor, free: int | None) -> None:
    """Make the sizes of a tensor constants of the graphs that are traced next, whatever they were in earlier calls, but for one
    that may be a symbol (2.11 to 2.14: ``torch._dynamo.mark_static`` and ``maybe_mark_dynamic``, exported nowhere else)."""
    for dim in range(tensor.dim()):
        (torch._dynamo.maybe_mark_dynamic if dim == free else torch._dynamo.mark_static)(tensor, dim)

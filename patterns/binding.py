"""What a call is: the names by which a user may give it, and its arguments by the names of its parameters."""

from __future__ import annotations

import inspect

import torch
from torch.fx import Node

from ._compat import is_packet


def names_of_call(target) -> set[str]:
    """``"namespace::operator"`` of an operator, ``"package.module.function"`` of a function."""
    if isinstance(target, torch._ops.OpOverload):
        return {target._schema.name}
    if is_packet(target):
        return {target._qualified_op_name}
    name = getattr(target, "__qualname__", None)
    return {f"{getattr(target, '__module__', '')}.{name}"} if name else set()


def bind(node: Node) -> tuple[dict[str, object], dict[str, object]] | None:
    """(parameter -> argument, defaults filled in; parameter -> default), or None if the callee has no signature that says."""
    target = node.target.default if is_packet(node.target) else node.target
    if isinstance(target, torch._ops.OpOverload):
        parameters = target._schema.arguments
        defaults = {p.name: p.default_value for p in parameters if p.has_default_value()}
        return defaults | dict(zip((p.name for p in parameters), node.args)) | dict(node.kwargs), defaults
    try:
        signature = inspect.signature(target)
        bound = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return dict(bound.arguments), {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}

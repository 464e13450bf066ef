"""The graph-level operators as plain functions whose Triton kernels become nodes of a traced graph.

For ahead-of-time compilers that compile kernels in (AOTInductor): what they make needs nothing of ours where it runs. Always the portable
kernels: a compiler takes in no Gluon, so that Hopper's own is for the operators that are called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from . import _compat, block_sparse_triton
from .encode import ROWS, encode
from .launching import captured
from .pack import why_no_kernel
from .problem import Problem
from .providers import use_provider
from .sparse_attention import pack_context, sparse_attention, sparse_decode

__all__ = ["INLINED", "why_not_inlined"]


def _inlined(operator) -> Callable[..., Any]:
    body = _compat.body_of(operator)

    @functools.wraps(body)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with captured(), use_provider("triton"):
            return body(*args, **kwargs)

    return traced


#: Operator -> a function of the same arguments to be traced in its place.
INLINED = {f"li::{_compat.body_of(o).__name__}": _inlined(o) for o in (sparse_attention, pack_context, sparse_decode, encode)}


def why_not_inlined(name: str, arguments: Mapping[str, Any]) -> str | None:
    """Why a call's kernels cannot be compiled in, None if they can. arguments: by the names of its schema; tensors may be fake."""
    if name not in INLINED:
        return "its kernels are not among those that can be compiled in"
    if _compat.interpreting():
        return "Triton interprets its kernels here"
    held = next(arguments[n] for n in ("q", "k", "x") if n in arguments)
    x = held[0] if isinstance(held, (list, tuple)) else held
    size, parts = arguments.get("block_size"), arguments.get("sub_blocks", 1)
    if size is not None and (why := block_sparse_triton.supports(Problem(x, x, x, x, x, x, size, 1.0))) is not None:
        return why
    return why_no_kernel(x, ROWS if size is None else size // parts)

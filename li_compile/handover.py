"""Caches in tile order between the calls that make them and those that read them: which tensors are, and whether a graph may read one.

Attention does not mind the order of keys and values, so that a cache in tile order is right for whoever attends to all of it. What chooses
among its blocks must know the order. So each tensor that a graph returned in tile order is remembered, weakly, until it is written to, and a call
that is given others than those of one order runs the graph that expects the model's own.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from li_compile.errors import LightInteractionError
from li_compile.kernels import in_raster_order


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of tokens in tiles of ``tile`` (kernels/layout.py) over frames of ``grid``, rows and columns."""

    tile: tuple[int, int, int]
    grid: tuple[int, int]


_REMEMBERED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> its order, and its version then
_EXPECTED: contextvars.ContextVar[Order | None] = contextvars.ContextVar("li_compile_handover", default=None)


def remember(x: torch.Tensor, order: Order) -> None:
    """Note that a tensor is in an order."""
    _REMEMBERED[x] = order, _version(x)


def order_of(x: torch.Tensor) -> Order | None:
    """The order that a tensor was noted to be in; None: none, or it was written to since, or is another one (a view, a copy)."""
    order, version = _REMEMBERED.get(x, (None, None))
    return order if version == _version(x) else None


def common_order(tensors: Sequence[torch.Tensor]) -> Order | None:
    """The order that all of them are in, None if there is none or there are several."""
    orders = {order_of(x) for x in tensors}
    return orders.pop() if len(orders) == 1 else None


def in_model_order(given: Any) -> Any:
    """The same with tensors that are noted to be in tile order brought back."""
    def back(x: torch.Tensor) -> torch.Tensor:
        order = order_of(x)
        return x if order is None else in_raster_order(x, *order.grid, order.tile)

    return tree_map_only(torch.Tensor, back, given) if len(_REMEMBERED) else given


@contextlib.contextmanager
def handing(order: Order | None) -> Iterator[None]:
    """Graphs that are called meanwhile are given caches in this order."""
    token = _EXPECTED.set(order)
    try:
        yield
    finally:
        _EXPECTED.reset(token)


def check(order: Order) -> None:
    """Raise LightInteractionError unless the caches that are given are in this order."""
    if _EXPECTED.get() != order:
        raise LightInteractionError(f"this graph reads keys and values of context in {order}, and is given some in {_EXPECTED.get() or 'an unknown order'}; "
                                    "set exact.tile_order = False")


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version

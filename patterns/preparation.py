"""Preparation: what a family changes in a model before it is traced, listed and undone."""

from __future__ import annotations

from typing import Any

import torch

from ._compat import settle_sizes
from .recognise import qualified, roots
from .registry import Family

_MISSING = object()


class Preparation:
    """Changes of attributes, in order. ``patch(owner, name, new)`` makes one; ``undo()`` takes all back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        self.changes: list[str] = []

    def __call__(self, owner: Any, name: str, new: Any) -> None:
        own = vars(owner) if hasattr(owner, "__dict__") else {}
        if not hasattr(owner, name):
            raise AttributeError(f"{owner!r} has no attribute {name!r} that a preparation could change")
        inherited = name not in own and hasattr(type(owner), name)
        self._before.append((owner, name, _MISSING if inherited else getattr(owner, name)))
        setattr(owner, name, new)
        whose = owner.__name__ if hasattr(owner, "__name__") else qualified(type(owner))
        self.changes.append(f"{whose}.{name}")

    def undo(self) -> None:
        while self._before:
            owner, name, before = self._before.pop()
            if before is _MISSING:  # it was its class's
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def prepare(model: Any, family: Family | None) -> Preparation:
    """Run a family's hook on each module that a module or function holds of the first class that the family names; if it names
    none, on the model itself. What it did can be undone."""
    done = Preparation()
    if family is None or family.prepare is None:
        return done
    try:
        mine = [m for root in roots(model) for m in root.modules() if qualified(type(m)) in family.modules[:1]]
        for target in mine if family.modules else [model]:
            family.prepare(target, done)
    except BaseException:
        done.undo()
        raise
    return done


def arguments(model: Any, family: Family | None, args: tuple, kwargs: dict, prune: bool) -> tuple[tuple, dict]:
    """What a call's arguments are to be for the compiled model, if it is a module of the family's: the family's hook on them, and
    with ``prune`` the sizes of what holds context free to change."""
    if family is None or qualified(type(model)) not in family.modules[:1]:
        return args, kwargs
    if family.arguments is not None:
        args, kwargs = family.arguments(model, args, kwargs)
    if family.holds:
        settle(family, kwargs, prune)
    return args, kwargs


def settle(family: Family, given: dict, prune: bool) -> None:
    """Make the sizes of what a model is given constants of its graphs; with ``prune``, and if there is any context, but for the
    number of its frames."""
    held = [given[name] for name in family.holds if name in given]
    free = family.holds if prune and held and all(isinstance(x, torch.Tensor) for x in held) else {}
    for name, x in given.items():
        for tensor in x if isinstance(x, (list, tuple)) else [x]:
            if isinstance(tensor, torch.Tensor):
                settle_sizes(tensor, free.get(name))

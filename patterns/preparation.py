"""Preparation: what a family changes in a model before it is traced, listed and undone."""

from __future__ import annotations

from typing import Any

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
        self._before.append((owner, name, own.get(name, _MISSING)))
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


def arguments_of(model: Any, family: Family | None):
    """What a family does with the arguments of this model's calls, as ``(args, kwargs) -> (args, kwargs, frames) or None``; None: nothing."""
    if family is None or family.arguments is None or qualified(type(model)) not in family.modules[:1]:
        return None
    return lambda args, kwargs: family.arguments(model, args, kwargs)

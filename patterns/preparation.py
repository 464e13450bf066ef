"""Preparation: what a family changes in a model before it is traced, listed and undone."""

from __future__ import annotations

import dataclasses
import gc
import sys
from typing import Any

import torch

from ._compat import settle_sizes
from .recognise import qualified, roots
from .registry import Family, families

_MISSING = object()


@dataclasses.dataclass(eq=False)
class _Change:
    owner: Any
    name: str
    before: Any
    holders: int = 0

    def __str__(self) -> str:
        whose = self.owner.__name__ if hasattr(self.owner, "__name__") else qualified(type(self.owner))
        return f"{whose}.{self.name}"


# Two models of one family share classes and modules: what is changed there is changed once, and back when the last one is undone.
_LIVE: dict[tuple[int, str], _Change] = {}
_PREPARED: dict[str, int] = {}  # family -> preparations in force


class Preparation:
    """Changes of attributes, in order. ``patch(owner, name, new)`` makes one; ``undo()`` takes all back."""

    def __init__(self) -> None:
        self._mine: list[_Change] = []
        self._families: list[str] = []
        self.changes: list[str] = []

    def __call__(self, owner: Any, name: str, new: Any) -> None:
        if not hasattr(owner, name):
            raise AttributeError(f"{owner!r} has no attribute {name!r} that a preparation could change")
        change = _LIVE.get((id(owner), name))
        if change is None:
            own = vars(owner) if hasattr(owner, "__dict__") else {}
            inherited = name not in own and hasattr(type(owner), name)
            change = _LIVE[id(owner), name] = _Change(owner, name, _MISSING if inherited else getattr(owner, name))
            setattr(owner, name, new)
        if change not in self._mine:
            change.holders += 1
            self._mine.append(change)
            self.changes.append(str(change))

    def run(self, family: Family, model: Any) -> None:
        """Run the family's hook on a module; where it raises, everything is taken back."""
        if family.name not in self._families:
            self._families.append(family.name)
            _PREPARED[family.name] = _PREPARED.get(family.name, 0) + 1
        try:
            family.prepare(model, self)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        while self._mine:
            change = self._mine.pop()
            change.holders -= 1
            if change.holders:
                continue
            del _LIVE[id(change.owner), change.name]
            if change.before is _MISSING:  # it was its class's
                delattr(change.owner, change.name)
            else:
                setattr(change.owner, change.name, change.before)
        while self._families:
            _PREPARED[self._families.pop()] -= 1


def prepare(model: Any, family: Family | None) -> Preparation:
    """Run a family's hook on each module that a module or function holds of the first class that the family names; if it names
    none, on the model itself. What it did can be undone."""
    done = Preparation()
    if family is None or family.prepare is None:
        return done
    mine = [m for root in roots(model) for m in root.modules() if qualified(type(m)) in family.modules[:1]]
    for target in mine if family.modules else [model]:
        done.run(family, target)
    return done


def prepare_loaded() -> Preparation:
    """Run the hooks of all families on the models of theirs that exist in this process."""
    done = Preparation()
    for family in families().values():
        if family.prepare is None or not family.modules or not all(map(_loaded, family.requires)):
            continue
        cls = _loaded(family.modules[0])
        for model in gc.get_objects() if cls is not None else ():
            if type(model) is cls:
                done.run(family, model)
    return done


def _loaded(name: str) -> type | None:
    """The class of a qualified name, if its module was imported."""
    module, _, name = name.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def in_force() -> list[str]:
    """What is changed at the moment, in order."""
    return list(dict.fromkeys(map(str, _LIVE.values())))


def is_prepared(family: Family | None) -> bool:
    """Whether there is nothing to prepare, or some model of the family was."""
    return family is None or family.prepare is None or _PREPARED.get(family.name, 0) > 0


def arguments_of(model: Any, family: Family | None, prune: bool):
    """What a family makes of the arguments of this model's calls, as ``(args, kwargs) -> (args, kwargs, frames)``, or to None where
    the module is to run as it is; None: it leaves them alone. prune: the sizes of what holds context may change."""
    if family is None or family.arguments is None and not family.holds or qualified(type(model)) not in family.modules[:1]:
        return None

    def given(args: tuple, kwargs: dict):
        made = (args, kwargs, None) if family.arguments is None else family.arguments(model, args, kwargs)
        if made is not None and family.holds:
            settle(family, made[1], prune)
        return made

    return given


def settle(family: Family, given: dict, prune: bool) -> None:
    """Make the sizes of what a model is given constants of its graphs; with ``prune``, and if there is any context, but for the
    number of its frames."""
    held = [given[name] for name in family.holds if name in given]
    free = family.holds if prune and held and all(isinstance(x, torch.Tensor) for x in held) else {}
    for name, x in given.items():
        for tensor in x if isinstance(x, (list, tuple)) else [x]:
            if isinstance(tensor, torch.Tensor):
                settle_sizes(tensor, free.get(name))

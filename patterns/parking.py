"""Weights that are of no use for a while, in the memory of another device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


class Parked:
    """Parameters and buffers of some modules. ``with parked.away():`` they are elsewhere inside, and back after it, also after an
    exception. device: where they wait."""

    def __init__(self, modules: Iterable[torch.nn.Module], device: torch.device | str = "cpu") -> None:
        self.modules, self.device = list(modules), torch.device(device)

    def tensors(self) -> list[torch.Tensor]:
        return list({id(t): t for m in self.modules for t in (*m.parameters(), *m.buffers())}.values())

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        homes = [(t, t.device) for t in self.tensors()]
        for t, _ in homes:
            t.data = t.data.to(self.device)
        try:
            yield
        finally:
            for t, home in homes:
                t.data = t.data.to(home)

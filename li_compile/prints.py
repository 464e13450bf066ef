"""Whether an input of a compiled graph is what it was at an earlier call, without keeping it alive."""

from __future__ import annotations

from typing import Any

import torch

from li_compile import _compat

SMALL = 1 << 15  # elements up to which a tensor is compared by its values; a time may be told token by token


class Print:
    """One input at one call. Two are equal if they are certainly the same; unequal if they differ or nobody can tell.

    Large tensors are the same if they are one stretch of memory that was not written to in between, which PyTorch counts
    for all tensors but those made under ``torch.inference_mode``. Small ones may also be equal in their values; on a
    GPU, finding that out waits for the device.
    """

    def __init__(self, x: Any) -> None:
        self.tensor = isinstance(x, torch.Tensor)
        self.value = None if self.tensor else x
        self.identity, self.copy, self.shape = None, None, None
        if self.tensor:
            self.shape = tuple(x.shape)
            self.identity = _compat.memory_of(x)
            if x.numel() <= SMALL:
                self.copy = x.detach().clone()

    @property
    def small(self) -> bool:
        return not self.tensor or self.copy is not None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Print) or self.tensor != other.tensor or self.shape != other.shape:
            return False
        if not self.tensor:
            return type(self.value) is type(other.value) and self.value == other.value
        if self.identity is not None and self.identity == other.identity:
            return True
        return self.copy is not None and other.copy is not None and self.copy.dtype == other.copy.dtype \
            and self.copy.device == other.copy.device and torch.equal(self.copy, other.copy)

    __hash__ = None  # type: ignore[assignment]  # equality may look at values

    def number(self) -> float | None:
        """The first number of a small input; None if it holds none."""
        if not self.tensor:
            return float(self.value) if isinstance(self.value, (int, float)) else None
        return float(self.copy.flatten()[0]) if self.copy is not None and self.copy.numel() else None

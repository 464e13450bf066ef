"""Scratch memory for operators: reused between calls on the CPU, ordinary allocation on other devices.

A fresh buffer of some megabytes costs the CPU more in page faults (measured: 1.2 ms for 4.7 MB) than filling it does
(0.35 ms). CUDA's caching allocator has no such cost. Scratch never leaves the operator that asked for it.
"""

from __future__ import annotations

import math
import threading

import torch

from ._compat import real_tensors

__all__ = ["scratch"]

LIMIT = 256 * 2**20  # bytes; above it a buffer is made for the call and given back
_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of this shape, with the dtype and device of ``like``.

    On the CPU, two requests with the same name and dtype on one thread share memory: give every live buffer of one
    call its own name, and let none of them escape.
    """
    count = math.prod(shape)
    if like.device.type != "cpu" or count * like.element_size() > LIMIT:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    pool = _local.__dict__.setdefault("pool", {})
    buffer = pool.get((name, like.dtype))
    if buffer is None or buffer.numel() < count:
        with real_tensors():
            buffer = pool[name, like.dtype] = torch.empty(count, dtype=like.dtype, device="cpu")
    return buffer[:count].view(shape)

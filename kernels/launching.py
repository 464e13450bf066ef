"""Launching a Triton kernel: on its device, or into a graph that is being traced, for a compiler that takes the kernel in."""

from __future__ import annotations

import contextlib
import contextvars
import functools

import torch

__all__ = ["captured", "capturing", "launcher", "on_device"]

_capturing: contextvars.ContextVar[bool] = contextvars.ContextVar("li_compile_capturing", default=False)


@contextlib.contextmanager
def captured():
    """Within the context, launches become nodes of the graph that is traced (``torch.library.wrap_triton``)."""
    token = _capturing.set(True)
    try:
        yield
    finally:
        _capturing.reset(token)


def capturing() -> bool:
    """Whether launches become nodes of a graph, so that only what a compiler takes in will do."""
    return _capturing.get()


def launcher(kernel):
    """What to index with a grid and call, in place of a ``@triton.jit`` function."""
    return _Capture(kernel) if _capturing.get() else kernel


class _Capture:
    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, num_warps: int = 4, num_stages: int = 3, **constants) -> None:
            torch.library.wrap_triton(_configured(self.kernel, num_warps, num_stages))[grid](*args, **constants)

        return launch


@functools.cache
def _configured(kernel, num_warps: int, num_stages: int):
    """One object for all launches alike, by which a compiler knows that they are one kernel; from options it would make one a launch."""
    import triton

    return triton.autotune([triton.Config({}, num_warps=num_warps, num_stages=num_stages)], key=[])(kernel)


def on_device(device: torch.device):
    """The context to launch in: the tensors' GPU, of several; a graph's compiler sees to that itself."""
    return torch.cuda.device(device) if device.type == "cuda" and not _capturing.get() else contextlib.nullcontext()

"""TF32 for the matrix products of one graph: a switch of the process, thrown while the graph is compiled and while it runs.

Whoever multiplies matrices in fp32 in another thread meanwhile has it too: PyTorch knows no smaller scope.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["tf32", "within_tf32"]


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Products of fp32 matrices on CUDA round their operands to TF32 (10 bits of mantissa) inside; nothing on other devices."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before == "tf32":
        yield
        return
    try:
        matmul.allow_tf32 = True  # sets fp32_precision too; that alone would leave the two at odds, which torch refuses to read
        yield
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before  # "ieee" from the line above, where it may have been left to the general setting


def within_tf32(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, called inside of :func:`tf32`."""

    def run_in_tf32(*args: Any) -> Any:
        with tf32():
            return run(*args)

    return run_in_tf32

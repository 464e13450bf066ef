"""The operator ``li::encode``: query-key normalisation, rotary and camera encodings of one tensor, in one pass over memory.

What :mod:`li_compile.kernels.pack` does on its way into blocks, for attention that reads tokens as they come, and for a cache that is
handed on: a compiler's own fusion of the two branches loads every value nine times.
"""

from __future__ import annotations

import torch

from .pack import ROWS, Encoding, branches, check_encoding, launch, why_no_kernel
from .providers import Provider, register_provider, select_provider

__all__ = ["encode", "encoded", "why_not_encoded"]

NAME = "encode"


@torch.library.custom_op(
    "li::encode", mutates_args=(),
    schema="(Tensor x, Tensor? norm=None, float eps=1e-6, Tensor? cos=None, Tensor? sin=None, Tensor? camera=None) -> Tensor")  # fmt: skip
def encode(x, norm=None, eps=1e-6, cos=None, sin=None, camera=None):
    """Encode the queries, keys or values of one segment.

    Args:
        x: ``[B, H, L, D]``, any strides.
        norm, eps, cos, sin, camera: see :class:`~li_compile.kernels.pack.Encoding`.

    Returns:
        contiguous ``[B', H, L, D]`` of x's dtype, B' being B, or 2 B with ``camera``: without the matrices, then with them.

    Raises ValueError where shapes don't fit. There is no backward.
    """
    return encoded(x, Encoding(norm, eps, cos, sin, camera))


def encoded(x: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """:func:`encode` without the dispatcher around it, for operators that are opaque already."""
    check_encoding(x, encoding)
    out = _empty(x, encoding.camera)
    if x.numel():
        provider, _ = select_provider(NAME, x, encoding, out)
        provider.run(x, encoding, out)
    return out


@encode.register_fake
def _(x, norm=None, eps=1e-6, cos=None, sin=None, camera=None):
    return _empty(x, camera)


def _empty(x, camera):
    batch, *rest = x.shape
    return x.new_empty(batch if camera is None else 2 * batch, *rest)


def why_not_encoded(x: torch.Tensor, *_) -> str | None:
    """Why there is no kernel of ours for tensors like this, None if there is; PyTorch's operators one by one lose to a compiler's fusion."""
    return why_no_kernel(x, ROWS)


def _run_triton(x, encoding: Encoding, out) -> None:
    launch(x, None, out, None, ROWS, -(-x.shape[2] // ROWS), encoding)


def _run_torch(x, encoding: Encoding, out) -> None:
    for i, branch in enumerate(branches(x, encoding)):
        out[i * x.shape[0] : (i + 1) * x.shape[0]].copy_(branch)


register_provider(NAME, Provider("triton", _run_triton, why_not_encoded))
register_provider(NAME, Provider("reference", _run_torch, lambda *args: None))

"""The operator ``li::linear_gelu``: a linear layer and GELU in its tanh form, the activation applied where the product is accumulated.

A compiler leaves the product to cuBLAS, and reads what that wrote a second time for the activation. cuBLASLt does it on the way out, of
unrounded sums (docs/kernels.md: 1.14x to 1.30x on an H100 at the models' sizes, and nearer to fp32).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._compat import addmm_gelu
from .providers import Provider, register_provider, select_provider

__all__ = ["linear_gelu", "why_no_epilogue"]

NAME = "linear_gelu"
LEAST_ROWS = 512  # below, it is a matter of microseconds, which a call of an operator from Python takes too


@torch.library.custom_op("li::linear_gelu", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def linear_gelu(x, weight, bias):
    """``gelu(x @ weight.T + bias)``, in the tanh approximation.

    Args:
        x: ``[..., K]``, any strides. weight: ``[N, K]``. bias: ``[N]``. All of one floating dtype and on one device.

    Returns:
        contiguous ``[..., N]`` of their dtype.

    Raises ValueError where shapes, dtypes or devices don't fit. There is no backward.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
        raise ValueError(f"x, weight and bias must be [..., K], [N, K] and [N]; found {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}.")
    if len({(t.dtype, t.device) for t in (x, weight, bias)}) > 1:
        raise ValueError("x, weight and bias must share dtype and device; found "
                         + ", ".join(f"{t.dtype} on {t.device}" for t in (x, weight, bias)) + ".")
    provider, _ = select_provider(NAME, x)
    return provider.run(x, weight, bias)


@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def why_no_epilogue(x: Tensor) -> str | None:
    """Why this is no faster for an x like this than a compiler's linear layer and GELU; None if it is."""
    if x.device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, found {x.device.type}"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it is for fp16 and bf16, found {x.dtype}"
    return None


def _run_cublaslt(x, weight, bias) -> Tensor:
    return addmm_gelu(bias, x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], weight.shape[0])


def _run_torch(x, weight, bias) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh").contiguous()


register_provider(NAME, Provider("cublaslt", _run_cublaslt, why_no_epilogue))
register_provider(NAME, Provider("reference", _run_torch, lambda *args: None))

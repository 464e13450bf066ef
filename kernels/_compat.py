"""What differs between PyTorch and Triton versions, and every private name that this folder touches.

Each probe names the versions it was written for. Nothing here imports Triton until it is asked to.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch

__all__ = ["aot_compile", "cpu_flash", "has_triton", "interpreting", "real_tensors"]


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; checked without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (on CPU tensors, for tests). Triton reads the variable when a
    kernel is decorated, so it must be set before the first import of a module that holds one."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def cpu_flash(q, k, v, scale, bias=None):
    """Dense attention on CPU tensors ``[B, H, L, D]`` -> ``(out, lse)``, lse fp32 ``[B, H, Lq]``, natural log.

    The operator behind ``scaled_dot_product_attention`` on CPU; called directly because the public function does not
    return the LSE. Its schema is the same from PyTorch 2.3 to 2.14. ``bias`` is added to the scores and may broadcast.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return out, lse


@contextlib.contextmanager
def real_tensors():
    """Tensors made inside are real, and usable in and out of inference mode, whatever mode the caller is in.

    For caches: a fake or an inference tensor that a tracing call left behind would break later, ordinary calls.
    ``unset_fake_temporarily`` is private; PyTorch 2.11 to 2.14 have it in the same place.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        yield


def aot_compile(kernel, signature: dict, constants: dict, capability: int, num_warps: int, num_stages: int):
    """Compile a Triton kernel for ``sm_<capability>`` without a GPU and return Triton's compiled kernel.

    Args:
        kernel: a ``@triton.jit`` function.
        signature: argument name -> type, such as ``"*fp16"`` or ``"i32"``, for the arguments that are no constants.
        constants: argument name -> value for the ``tl.constexpr`` arguments.

    Pointers and strides (names that begin with ``stride_``) are declared divisible by 16, as the launcher would find
    them: without it every load is four bytes wide. Triton 3.6 to 3.8 take the same ``ASTSource``: signature by name
    with ``"constexpr"`` marking constants, attributes by position.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    hinted = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if full[name].startswith("*") or (name.startswith("stride_") and full[name] != "constexpr")
    }
    constexprs = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    source = ASTSource(fn=kernel, signature=full, constexprs=constexprs, attrs=hinted)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "num_stages": num_stages})

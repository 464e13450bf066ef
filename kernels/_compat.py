"""What differs between PyTorch and Triton versions, and every private name that this folder touches.

Each probe names the versions it was written for. Nothing here imports Triton until it is asked to.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re

import torch

__all__ = ["addmm_gelu", "aot_compile", "body_of", "capability", "cpu_flash", "gluon", "has_triton", "interpreting", "real_tensors", "untraced", "without_hidden",
           "without_lines"]  # fmt: skip


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; checked without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (on CPU tensors, for tests). Triton reads the variable when a
    kernel is decorated, so it must be set before the first import of a module that holds one."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def capability(device: torch.device) -> int:
    """80 for sm_80 and sm_86, 90 for sm_90, and so on; 80 in the interpreter."""
    return 80 if interpreting() else 10 * torch.cuda.get_device_capability(device)[0]


def body_of(operator):
    """The function that ``torch.library.custom_op`` made an operator of (2.11 to 2.14: ``CustomOpDef._init_fn``)."""
    return operator._init_fn


def addmm_gelu(bias, x, weight):
    """``gelu(x @ weight + bias)`` in its tanh form as one call of cuBLASLt, for CUDA tensors ``[N]``, ``[M, K]`` and ``[K, N]``
    (2.11 to 2.14: ``_addmm_activation``, whose GELU is another one on a CPU)."""
    return torch._addmm_activation(bias, x, weight, use_gelu=True)


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
    ``unset_fake_temporarily`` is private; PyTorch 2.11 to 2.14 have it in the same place. ``DisableTorchFunction``: torch.export
    would note the switch of gradients in its graph, as an operator with a graph of its own.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with torch._C.DisableTorchFunction(), unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def untraced():
    """:func:`real_tensors`, of which no tracer takes note either (``_disable_current_modes``, private; 2.11 to 2.14)."""
    from torch.utils._python_dispatch import _disable_current_modes

    with real_tensors(), _disable_current_modes():
        yield


class _Gluon:
    """What of Gluon is used outside kernels. Gluon is experimental in Triton 3.6 to 3.8; these names are the same there.

    Kernels use ``tma.async_copy_global_to_shared``, which 3.8 keeps as another name of ``tma.async_load``.
    """

    def __init__(self) -> None:
        from triton.experimental.gluon import language
        from triton.experimental.gluon._runtime import GluonASTSource
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        self.layout, self.source, self._descriptor = language.NVMMASharedLayout, GluonASTSource, TensorDescriptor

    @functools.cache
    def shared_layout(self, box: tuple[int, ...], bits: int = 16):
        """The swizzled layout in shared memory of a TMA box whose rows are a multiple of 128 bytes."""
        if box[-1] * bits % 1024:
            raise ValueError(f"rows of a box must be a multiple of 128 bytes; found {box[-1]} elements of {bits} bits")
        return self.layout(swizzle_byte_width=128, element_bitwidth=bits, rank=len(box))

    def descriptor(self, x, box: tuple[int, ...]):
        """A descriptor, made on the host, of a tensor that is read in boxes."""
        return self._descriptor(x, list(x.shape), list(x.stride()), list(box), self.shared_layout(box, 8 * x.element_size()))


@functools.cache
def gluon() -> _Gluon | None:
    """Gluon, or None where this Triton has none that we know (it came with 3.4; ours needs 3.6)."""
    try:
        return _Gluon()
    except ImportError:
        return None


def aot_compile(kernel, signature: dict, constants: dict, capability: int, **options):
    """Compile a Triton or Gluon kernel for ``sm_<capability>`` without a GPU and return Triton's compiled kernel.

    Args:
        kernel: a ``@triton.jit`` or ``@gluon.jit`` function.
        signature: argument name -> type for the arguments that are no constants: ``"*fp16"``, ``"i32"``, or for a TMA
            descriptor ``("bf16", box)``.
        constants: argument name -> value for the ``tl.constexpr`` arguments.
        options: ``num_warps``, ``num_stages``, ``maxnreg``.

    Pointers and strides (names that begin with ``stride_``) are declared divisible by 16, as the launcher would find
    them: without it every load is four bytes wide. Triton 3.6 to 3.8 take the same ``ASTSource``: signature by name
    with ``"constexpr"`` marking constants, attributes by position.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: _type_text(signature.get(name, "constexpr")) for name in kernel.arg_names}
    hinted = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if full[name].startswith("*") or (name.startswith("stride_") and full[name] != "constexpr")
    }
    constexprs = {(i,): constants[name] for i, name in enumerate(kernel.arg_names) if name in constants}
    is_gluon = getattr(kernel, "is_gluon", lambda: False)()
    source = (gluon().source if is_gluon else ASTSource)(fn=kernel, signature=full, constexprs=constexprs, attrs=hinted)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def without_hidden(compiled, arguments: int) -> str:
    """The PTX of a compiled kernel, whose entry takes its own ``arguments`` and no more.

    Triton adds pointers to scratch memory behind a kernel's own arguments (3.6 to 3.8: for all programs, and for its profiler), which who
    launches it by hand would have to know of. Raises RuntimeError where the kernel uses them.
    """
    name, ptx = compiled.metadata.name, compiled.asm["ptx"]
    entry = re.search(rf"\.visible \.entry {re.escape(name)}\((.*?)\n\)", ptx, re.S)
    listed = [line.strip() for line in entry[1].strip().split(",\n")]
    used = [i for i in range(arguments, len(listed)) if re.search(rf"\b{re.escape(name)}_param_{i}\b", ptx[entry.end() :])]
    if used or compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size or len(listed) < arguments:
        raise RuntimeError(f"{name} was to take {arguments} arguments, and takes {len(listed)}, of which it uses {used} for scratch memory")
    return ptx[: entry.start(1)] + "\n\t" + ",\n\t".join(listed[:arguments]) + ptx[entry.end(1) :]


def without_lines(ptx: str) -> str:
    """PTX without what tells a debugger of source lines: half of it, and paths of the machine that it was compiled on."""
    ptx = re.sub(r"^\t\.(loc|file)\b.*\n", "", ptx, flags=re.M)
    return re.sub(r"^\t\.section\s+\.debug_\w+\s*\{[^}]*\}\n*", "", ptx, flags=re.M)


def _type_text(kind) -> str:
    if isinstance(kind, str):
        return kind
    dtype, box = kind
    layout = f"NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank={len(box)})"
    return f"tensordesc<{dtype}[{', '.join(map(str, box))}],{layout}>"

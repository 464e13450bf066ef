"""The operators ``li::pack`` and ``li::pack_``: from a model's queries, keys or values to blocks, in one pass.

Query-key normalisation, rotary and camera encodings, token order, padding and the means that blocks are chosen by: what
the paper's code (arXiv 2605.31158) spreads over half a dozen passes, three concatenations among them, and repeats for
the whole history at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._compat import has_triton, interpreting
from .launching import launcher, on_device
from .layout import Tile, num_blocks, tile_order
from .providers import Provider, register_provider, select_provider

__all__ = ["Encoding", "empty_pack", "in_raster_order", "in_tile_order", "order_into", "pack", "pack_", "pack_into"]

NAME = "pack"
ROWS = 32  # tokens a program where no means are asked for


@dataclass(frozen=True)
class Encoding:
    """What is done to tokens before they are stored.

    Attributes:
        norm: ``[D]`` weights of an RMS norm over channels, or None. eps: its epsilon.
        cos, sin: fp32 ``[L, D]``, RoPE's tables over interleaved pairs of channels, in the model's token order.
        camera: ``[B, F, 4, 4]``: PRoPE's matrices, one a frame of ``L / F`` tokens; each group of four channels is
            multiplied by its frame's. With it there are two branches, stacked on the batch axis: first without the
            matrices (with RoPE, if given), then with them (without RoPE).
    """

    norm: Tensor | None = None
    eps: float = 1e-6
    cos: Tensor | None = None
    sin: Tensor | None = None
    camera: Tensor | None = None

    @property
    def branches(self) -> int:
        return 1 if self.camera is None else 2

    @property
    def empty(self) -> bool:
        """Nothing is done."""
        return self.norm is None and self.cos is None and self.camera is None


SCHEMA = ("Tensor x, Tensor? order, int block_size, int sub_blocks, Tensor? norm=None, float eps=1e-6, Tensor? cos=None, "
          "Tensor? sin=None, Tensor? camera=None")  # fmt: skip


@torch.library.custom_op("li::pack", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
def pack(x, order, block_size, sub_blocks, norm=None, eps=1e-6, cos=None, sin=None, camera=None):
    """Bring tokens into blocks.

    Args:
        x: ``[B, H, L, D]``, any strides: queries, keys or values of one segment.
        order: integer ``[L]``: which token is the i-th in block order (:func:`~li_compile.kernels.layout.tile_order`).
            None: as they are.
        block_size: tokens of a block. sub_blocks: means kept a block, a divisor of it.
        norm, eps, cos, sin, camera: see :class:`Encoding`.

    Returns:
        ``(packed, means)``: ``[B', H, n * block_size, D]`` like x, padded with zeros to whole blocks, B' being B times
        the branches; and fp32 ``[B', H, n * sub_blocks, D]``, means over true tokens, zero where there are none.

    Raises ValueError where shapes don't fit. There is no backward.
    """
    encoding = Encoding(norm, eps, cos, sin, camera)
    packed, means = empty_pack(x, num_blocks(x.shape[2], block_size), block_size, sub_blocks, encoding)
    pack_into(x, order, packed, means, block_size, sub_blocks, encoding)
    return packed, means


@pack.register_fake
def _(x, order, block_size, sub_blocks, norm=None, eps=1e-6, cos=None, sin=None, camera=None):
    return empty_pack(x, num_blocks(x.shape[2], block_size), block_size, sub_blocks, Encoding(norm, eps, cos, sin, camera))


@torch.library.custom_op("li::pack_", mutates_args=("packed", "means"),
                         schema=f"(Tensor(a!) packed, Tensor(b!) means, int at, {SCHEMA}) -> ()")  # fmt: skip
def pack_(packed, means, at, x, order, block_size, sub_blocks, norm=None, eps=1e-6, cos=None, sin=None, camera=None):
    """:func:`pack` into memory that is there: a cache is written where it stays, and only what is new.

    Args:
        packed, means: as :func:`pack` returns them, but with room for more blocks.
        at: block at which x begins; x is written to the end of its last block, with zeros behind it.
        x and the rest: as for :func:`pack`.
    """
    pack_into(x, order, packed, means, block_size, sub_blocks, Encoding(norm, eps, cos, sin, camera), at)


@pack_.register_fake
def _(packed, means, at, x, order, block_size, sub_blocks, norm=None, eps=1e-6, cos=None, sin=None, camera=None):
    return None


@torch.library.custom_op("li::in_tile_order", mutates_args=(), schema="(Tensor x, SymInt height, SymInt width, int[] tile) -> Tensor")
def in_tile_order(x, height, width, tile):
    """Tokens of whole frames in the order of :func:`~li_compile.kernels.layout.tile_order`: ``[B, H, L, D]``, any strides, to a contiguous
    one of the same shape. A permutation: attention to keys and values that are both in it is the same. Raises ValueError for part of a frame."""
    out = x.new_empty(x.shape)
    order_into(x, tile_order(_frames(x, height, width), height, width, tuple(tile), x.device), out, None, ROWS, 1)
    return out


@in_tile_order.register_fake
def _(x, height, width, tile):
    return x.new_empty(x.shape)


def in_raster_order(x: Tensor, height: int, width: int, tile: Tile) -> Tensor:
    """The way back from :func:`in_tile_order`."""
    return x.index_select(2, torch.argsort(tile_order(_frames(x, height, width), height, width, tuple(tile), x.device)))


def _frames(x: Tensor, height: int, width: int) -> int:
    if x.dim() != 4 or x.shape[2] % (height * width):
        raise ValueError(f"x must be [B, H, whole frames of {height} x {width} tokens, D]; found {tuple(x.shape)}.")
    return x.shape[2] // (height * width)


def empty_pack(x: Tensor, blocks: int, block_size: int, sub_blocks: int, encoding: Encoding = Encoding()) -> tuple[Tensor, Tensor]:
    """Memory for so many blocks of x, and for their means."""
    batch, heads, _, dim = x.shape
    batch *= encoding.branches
    mean_dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.new_empty(batch, heads, blocks * block_size, dim), x.new_empty(batch, heads, blocks * sub_blocks, dim, dtype=mean_dtype))


def pack_into(x: Tensor, order: Tensor | None, packed: Tensor, means: Tensor, block_size: int, sub_blocks: int,
              encoding: Encoding = Encoding(), at: int = 0) -> None:  # fmt: skip
    """:func:`pack_` without the dispatcher around it, for operators that are opaque already."""
    blocks = num_blocks(x.shape[2], block_size)
    _check(x, order, packed, means, block_size, sub_blocks, encoding, at, blocks)
    if not x.shape[2]:
        return
    packed = packed[:, :, at * block_size : (at + blocks) * block_size]
    means = means[:, :, at * sub_blocks : (at + blocks) * sub_blocks]
    provider, _ = select_provider(NAME, x, order, packed, means, block_size, sub_blocks, encoding)
    provider.run(x, order, packed, means, block_size, sub_blocks, encoding)


def order_into(x: Tensor, order: Tensor | None, out: Tensor | None, means: Tensor | None, block_size: int, sub_blocks: int,
               encoding: Encoding = Encoding()) -> None:  # fmt: skip
    """What :func:`pack_into` does, without padding: tokens to ``out``, ``[B', H, L, D]``, and their means to ``means``,
    ``[B', H, n * sub_blocks, D]``; either may be None, and is then not written."""
    blocks = num_blocks(x.shape[2], block_size)
    _check_sizes(x, order, block_size, sub_blocks)
    check_encoding(x, encoding)
    want = (x.shape[0] * encoding.branches, x.shape[1], x.shape[3])
    for what, rows in ((out, x.shape[2]), (means, blocks * sub_blocks)):
        if what is not None and (what.shape != (*want[:2], rows, want[2]) or what.stride(3) != 1 or what.stride(2) != want[2]):
            raise ValueError(f"out and means must be {[*want[:2], rows, want[2]]}, of rows that lie one after the other; found {tuple(what.shape)}.")
    if out is not None and out.dtype != x.dtype:
        raise ValueError(f"out must have the dtype of x, {x.dtype}; found {out.dtype}.")
    if x.shape[2] and (out is not None or means is not None):
        provider, _ = select_provider(NAME, x, order, out, means, block_size, sub_blocks, encoding)
        provider.run(x, order, out, means, block_size, sub_blocks, encoding)


def _check_sizes(x, order, block_size, sub_blocks) -> None:
    if x.dim() != 4 or (order is not None and order.shape != (x.shape[2],)):
        raise ValueError(f"x must be [B, H, L, D] and order [L]; found {tuple(x.shape)} and {None if order is None else tuple(order.shape)}.")
    if block_size < 1 or sub_blocks < 1 or block_size % sub_blocks:
        raise ValueError(f"{sub_blocks} sub-blocks must divide the block size {block_size}.")


def _check(x, order, packed, means, block_size, sub_blocks, encoding: Encoding, at: int, blocks: int) -> None:
    _check_sizes(x, order, block_size, sub_blocks)
    batch, heads, length, dim = x.shape
    want = (batch * encoding.branches, heads, dim)
    if (packed.shape[0], packed.shape[1], packed.shape[3]) != want or packed.shape[2] < (at + blocks) * block_size or at < 0:
        raise ValueError(f"{blocks} blocks of {block_size} at block {at} need [{want[0]}, {want[1]}, {(at + blocks) * block_size} or more, {want[2]}]; "
                         f"found {tuple(packed.shape)}.")  # fmt: skip
    if means.shape != (want[0], want[1], packed.shape[2] // block_size * sub_blocks, dim):
        raise ValueError(f"means must have {sub_blocks} rows for each of {packed.shape[2] // block_size} blocks; found {tuple(means.shape)}.")
    if packed.dtype != x.dtype or packed.stride(3) != 1 or means.stride(3) != 1 or packed.stride(2) != dim or means.stride(2) != dim:
        raise ValueError("packed must have the dtype of x, and packed and means rows that lie one after the other.")
    check_encoding(x, encoding)


def check_encoding(x: Tensor, encoding: Encoding) -> None:
    """Raise ValueError if its tables do not fit x [B, H, L, D]."""
    batch, _, length, dim = x.shape
    if encoding.norm is not None and encoding.norm.shape != (dim,):
        raise ValueError(f"norm must be [{dim}]; found {tuple(encoding.norm.shape)}.")
    if (encoding.cos is None) != (encoding.sin is None):
        raise ValueError("cos and sin go together; give both or neither.")
    if encoding.cos is not None and (encoding.cos.shape != (length, dim) or encoding.sin.shape != (length, dim) or dim % 2):
        raise ValueError(f"cos and sin must be [{length}, {dim}], with an even number of channels; found {tuple(encoding.cos.shape)} "
                         f"and {tuple(encoding.sin.shape)}.")  # fmt: skip
    camera = encoding.camera
    if camera is not None and (camera.dim() != 4 or camera.shape[0] != batch or camera.shape[2:] != (4, 4) or dim % 4 or length % camera.shape[1]):
        raise ValueError(f"camera must be [{batch}, F, 4, 4] with F dividing {length} tokens, and channels a multiple of 4; found {tuple(camera.shape)}.")


def _supports_cpu(x, *args) -> str | None:
    """CPU tensors: PyTorch's index_select and sums are as fast there as anything of ours."""
    return None if x.device.type == "cpu" else f"it needs CPU tensors, found {x.device.type}"


def branches(x: Tensor, encoding: Encoding) -> list[Tensor]:
    """What becomes of x, in plain PyTorch, in fp32 (fp64 for fp64): one [B, H, L, D] a branch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute)
    if encoding.norm is not None:
        y = (y * (y.square().mean(-1, keepdim=True) + encoding.eps).rsqrt()).to(x.dtype).to(compute) * encoding.norm.to(compute)
    first = y
    if encoding.cos is not None:
        pairs = y.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
        first = y * encoding.cos.to(compute) + turned * encoding.sin.to(compute)
    if encoding.camera is None:
        return [first]
    groups = y.unflatten(-1, (-1, 4)).unflatten(2, (encoding.camera.shape[1], -1))  # [B, H, F, S, D / 4, 4]
    return [first, torch.einsum("bfij,bhfscj->bhfsci", encoding.camera.to(compute), groups).flatten(-2).flatten(2, 3)]


def _run_torch(x, order, packed, means, block_size, sub_blocks, encoding: Encoding) -> None:
    """In plain PyTorch, on any device, in fp32 (fp64 for fp64): the meaning that the kernel is tested against."""
    batch, _, length, dim = x.shape
    plain = encoding == Encoding(eps=encoding.eps)
    if packed is None:
        packed = x if plain and order is None else x.new_empty(batch * encoding.branches, x.shape[1], length, dim)
    if packed is x:
        pass
    elif plain:
        if order is None:
            packed[:, :, :length].copy_(x)
        else:
            torch.index_select(x, 2, order, out=packed[:, :, :length])
    else:
        for i, branch in enumerate(branches(x, encoding)):
            rows = branch if order is None else branch.index_select(2, order)
            packed[i * batch : (i + 1) * batch, :, :length].copy_(rows)
    if packed.shape[2] > length:
        packed[:, :, length:].zero_()
    if means is None:
        return
    size = block_size // sub_blocks
    whole = length // size
    means[:, :, :whole] = packed[:, :, : whole * size].unflatten(2, (whole, size)).sum(-2, dtype=means.dtype).div_(size)
    if whole < means.shape[2]:
        means[:, :, whole] = packed[:, :, whole * size : length].sum(2, dtype=means.dtype).div_(max(length - whole * size, 1))
        means[:, :, whole + 1 :].zero_()


def _supports_triton(x, order, packed, means, block_size, sub_blocks, encoding: Encoding) -> str | None:
    return why_no_kernel(x, block_size // sub_blocks)


def why_no_kernel(x: Tensor, size: int) -> str | None:
    """CUDA (or the interpreter), head_dim a power of two from 16 to 256, parts of a power of two tokens, from 16 to 256."""
    if not has_triton():
        return "Triton is not installed"
    if interpreting():
        if x.dtype == torch.bfloat16:
            return "Triton's interpreter computes bf16 wrongly"
    elif x.device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, found {x.device.type}"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes fp16, bf16 or fp32, found {x.dtype}"
    for what, number in (("head_dim", x.shape[-1]), ("tokens of a sub-block", size)):
        if number & (number - 1) or not 16 <= number <= 256:
            return f"it takes a power of two from 16 to 256 as {what}, found {number}"
    return None


def _run_triton(x, order, packed, means, block_size, sub_blocks, encoding: Encoding) -> None:
    launch(x, order, packed, means, block_size // sub_blocks, num_blocks(x.shape[2], block_size) * sub_blocks, encoding)


def launch(x, order, packed, means, rows: int, parts: int, encoding: Encoding) -> None:
    """The kernel over so many parts of so many rows. packed: None to write means alone; without padding where it has no room for it.
    means: None to write tokens alone, without padding."""
    from ._pack_kernel import pack_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    whole = lambda t: x if t is None else t.contiguous()
    camera = encoding.camera
    together = heads_together(heads, encoding)
    out = x if packed is None else packed
    with on_device(x.device):
        launcher(pack_kernel)[(heads // together, parts, batch)](
            x, whole(order), whole(encoding.norm), whole(encoding.cos), whole(encoding.sin), whole(camera), out, out if means is None else means,
            *x.stride()[:3], *out.stride()[:2], *((0, 0) if means is None else means.stride()[:2]), 0 if camera is None else camera.shape[1] * 16,
            batch, length, 1 if camera is None else length // camera.shape[1], encoding.eps,
            DIM=dim, ROWS=rows, HEADS=together, ORDERED=order is not None, NORMED=encoding.norm is not None,
            ROTATED=encoding.cos is not None, PROJECTED=camera is not None,
            TOKENS=packed is not None, PADDED=means is not None and packed is not None and packed.shape[2] >= parts * rows,
            AVERAGED=means is not None, num_warps=8 if rows * dim > 8192 else 4,
        )  # fmt: skip


def heads_together(heads: int, encoding: Encoding) -> int:
    """Heads that a program takes one after the other: several where tables and matrices are read that all of them share."""
    shares = encoding.cos is not None or encoding.camera is not None
    return next(n for n in (4, 2, 1) if heads % n == 0) if shares else 1


register_provider(NAME, Provider("cpu", _run_torch, _supports_cpu))
register_provider(NAME, Provider("triton", _run_triton, _supports_triton))
register_provider(NAME, Provider("reference", _run_torch, lambda *args: None))

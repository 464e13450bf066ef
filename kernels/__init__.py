"""What runs: operators with a reference, a CPU lowering, a portable Triton kernel and a Hopper kernel behind one contract each.

Knows neither graphs nor models; imports PyTorch, and Triton only when a Triton kernel is launched.
"""

if __name__ == "kernels":
    raise ImportError("import li_compile.kernels instead")

from .block_sparse import block_sparse_attention, expected_provider
from .block_sparse_plugin import block_sparse_plugin
from .dense_attention import dense_attention
from .frame_attention import frame_attention
from .linear_gelu import linear_gelu
from .pack import Encoding, in_raster_order, in_tile_order, pack, pack_
from .plan import Density, density
from .problem import Problem
from .providers import Provider, explain_provider, providers, register_provider, use_provider
from .selection import choose_blocks
from .sparse_attention import pack_context, sparse_attention, sparse_decode, sparse_prefill

__all__ = [
    "Density",
    "Encoding",
    "Problem",
    "Provider",
    "block_sparse_attention",
    "block_sparse_plugin",
    "choose_blocks",
    "dense_attention",
    "density",
    "expected_provider",
    "explain_provider",
    "frame_attention",
    "in_raster_order",
    "in_tile_order",
    "linear_gelu",
    "pack",
    "pack_",
    "pack_context",
    "providers",
    "register_provider",
    "sparse_attention",
    "sparse_decode",
    "sparse_prefill",
    "use_provider",
]

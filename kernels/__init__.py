"""What runs: operators with a reference, a CPU lowering and a portable Triton kernel behind one contract each.

Knows neither graphs nor models; imports PyTorch, and Triton only when a Triton kernel is launched.
"""

if __name__ == "kernels":
    raise ImportError("import li_compile.kernels instead")

from .block_sparse import block_sparse_attention
from .plan import Density, density
from .providers import Provider, explain_provider, providers, register_provider, use_provider
from .selection import select_blocks
from .sparse_attention import sparse_attention

__all__ = [
    "Density",
    "Provider",
    "block_sparse_attention",
    "density",
    "explain_provider",
    "providers",
    "register_provider",
    "select_blocks",
    "sparse_attention",
    "use_provider",
]

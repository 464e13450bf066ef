"""What work would take at best: the roofline of a device, peak FLOP/s by dtype and bytes a second of its memory.

A product takes the longer of its operations at the peak and its bytes at the bandwidth. Nothing reaches both, and what is
no product is not counted: read the milliseconds against one another, not against a clock.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterable
from functools import cache

import torch

from li_compile.passes.cost import Product

# Name as torch gives it (regular expression) -> dense peak TFLOP/s in bf16 and fp16, in TF32, in fp32 without tensor cores,
# TB/s, and where that is written. The makers' numbers, without sparsity.
HOPPER = "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-tensor-core-gpu-datasheet"
KNOWN: tuple[tuple[str, float, float, float, float, str], ...] = (
    (r"H100 PCIe", 756.0, 378.0, 51.2, 2.0, HOPPER),
    (r"H100", 989.4, 494.7, 66.9, 3.35, HOPPER),
    (r"H200", 989.4, 494.7, 66.9, 4.8, "https://www.nvidia.com/en-us/data-center/h200/"),
    (r"A100.*80GB PCIe", 312.0, 156.0, 19.5, 1.935, "https://www.nvidia.com/en-us/data-center/a100/"),
    (r"A100.*80GB", 312.0, 156.0, 19.5, 2.039, "https://www.nvidia.com/en-us/data-center/a100/"),
    (r"A100", 312.0, 156.0, 19.5, 1.555, "https://www.nvidia.com/en-us/data-center/a100/"),
    (r"L40S", 362.05, 183.0, 91.6, 0.864, "https://www.nvidia.com/en-us/data-center/l40s/"),
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device's roofline. peak: FLOP/s by dtype name; bandwidth: bytes a second; source: where the numbers are from."""

    name: str
    peak: dict[str, float]
    bandwidth: float
    source: str

    def seconds(self, operations: float, moved: float, dtype: torch.dtype) -> float:
        """The longer of the operations at the dtype's peak and the bytes at the bandwidth."""
        slowest = min(self.peak.values())
        return max(operations / self.peak.get(str(dtype).removeprefix("torch."), slowest), moved / self.bandwidth)

    def milliseconds(self, work: Iterable[Product]) -> float:
        """Of all products, one after another."""
        return 1e3 * sum(p.runs * self.seconds(p.operations, p.bytes, p.dtype) for p in work)


def known_machine(name: str) -> Machine | None:
    """A GPU's roofline by the name that torch gives it, from the makers' tables; None if it is in none of ours."""
    for pattern, half, tf32, single, bandwidth, source in KNOWN:
        if re.search(pattern, name):
            fp32 = tf32 if torch.backends.cuda.matmul.allow_tf32 else single
            return Machine(name, {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": fp32 * 1e12}, bandwidth * 1e12, source)
    return None


def machine_of(device: torch.device, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> Machine:
    """The roofline of a device: known GPUs from the table, all else measured once for these dtypes (a second at most)."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    else:
        # The graph may have been traced for a GPU that is not here; this machine's processor then stands in.
        device, name = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
    wanted = sorted({str(d).removeprefix("torch.") for d in dtypes if d.is_floating_point} or {"float32"})
    return (known_machine(name) if device.type == "cuda" else None) or _measured(device, name, tuple(wanted))


@cache
def _measured(device: torch.device, name: str, dtypes: tuple[str, ...]) -> Machine:
    size = 768 if device.type == "cpu" else 8192
    peak = {}
    for dtype in dtypes:
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        peak[dtype] = 2 * size**3 / _fastest(lambda a=a: a @ a, device)
    a = torch.empty(64 * 2**20 if device.type == "cpu" else 2**30, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    bandwidth = 2 * a.nbytes / _fastest(lambda: a.copy_(b), device)
    return Machine(name, peak, bandwidth, f"measured: products of {size} x {size} matrices, copies of {a.nbytes >> 20} MB")


def _fastest(run, device: torch.device, most: float = 0.3) -> float:
    """Seconds of the fastest run, of at least three and as many as fit into ``most`` seconds."""
    finish = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, count, began = float("inf"), 0, time.perf_counter()
    with torch.no_grad():
        run()
        while count < 3 or time.perf_counter() - began < most:
            finish()
            start = time.perf_counter()
            run()
            finish()
            best, count = min(best, time.perf_counter() - start), count + 1
    return best

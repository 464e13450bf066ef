"""Which target suits a graph on a device, from what would become of our operators in TensorRT; no speed is guessed at."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from li_compile.exporting.targets import aot_inductor, tensorrt

#: Compute capabilities that NVIDIA's support matrix lists for TensorRT-RTX (1.4 to 1.7); others may run, and are nobody's promise.
RTX_LISTED = ([7, 5], [8, 6], [8, 9], [12, 0], [12, 1])


@dataclasses.dataclass(frozen=True)
class Advice:
    """target: one of ``export``'s, or "backend": ``torch.compile``, in this process. why: the facts that speak for it."""

    target: str
    why: str

    def __str__(self) -> str:
        return f"advised target: {self.target}, since {self.why}"


def advise(rows: Sequence[dict[str, Any]], device: dict[str, Any], breaks: int = 0) -> Advice:
    """rows: of ``lowering.lowered(graph, "tensorrt")``, of all variants. device: as ``manifest.device_of`` gives it. breaks: of the graph."""
    if breaks:
        return Advice("backend", f"the graph breaks {breaks} time{'s' if breaks > 1 else ''}, and an export takes one graph")
    package = "aot_inductor" if aot_inductor.unavailable() is None else "exported_program"
    if device["type"] != "cuda":
        return Advice(package, "the inputs are on the CPU, where no TensorRT engine runs")
    ours = f"; {package} runs our kernel, as the backend does"
    for way, what in (("segment", "runs in PyTorch between two engines"), ("plugin", "is a plugin"), ("native", "is not our kernel")):
        for row in rows:
            if row["lowering"] == way and (way != "native" or row["why"].startswith("gathered blocks")):
                return Advice(package, f"in TensorRT {row['operator']} {what} ({row['why']}){ours}")
    if (missing := tensorrt.unavailable()) is not None:
        return Advice(package, f"TensorRT cannot be had here ({missing})")
    if "torch-tensorrt-rtx" in tensorrt.installed() and device["capability"] not in (None, *RTX_LISTED):
        return Advice(package, f"TensorRT-RTX is not listed for {device['name']} (compute capability {'.'.join(map(str, device['capability']))})")
    return Advice("tensorrt", "no operator of ours keeps any part of it out of an engine, or has to be written out at a cost")

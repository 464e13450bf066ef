"""What a pass did: one record a pass and graph, the substance of every report."""

from __future__ import annotations

import dataclasses

from li_compile.patterns import Miss


@dataclasses.dataclass
class Record:
    """name of the pass; count of sites it rewrote; details for the report; misses: what it left alone, and why.

    flops, bytes: of products, as passes/cost.py counts them, that one run of the graph saves by this pass.
    """

    name: str
    count: int = 0
    details: list[str] = dataclasses.field(default_factory=list)
    misses: list[Miss] = dataclasses.field(default_factory=list)
    flops: int = 0
    bytes: int = 0


class Refused(Exception):
    """Raised by a pass that cannot apply to a graph: the graph stays as it was, and the report says why."""

    def __init__(self, miss: Miss) -> None:
        super().__init__(miss.reason)
        self.miss = miss

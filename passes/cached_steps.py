"""Cached steps, approximate: denoising steps between the first and the last take the first one's output.

Before::                                   After::

    v0 = model(x0, 1000); x1 = x0 + v0*d0      v0 = model(x0, 1000); x1 = x0 + v0*d0
    v1 = model(x1, 900);  x2 = x1 + v1*d1                            x2 = x1 + v0*d1
    v2 = model(x2, 750);  x3 = x2 + v2*d2                            x3 = x2 + v0*d2
    v3 = model(x3, 500);  x4 = x3 + v3*d3      v3 = model(x3, 500);  x4 = x3 + v3*d3

Paper eq. 5-8. The last step is always computed; below three steps there is nothing to skip. With guidance, where the
model is called twice a step, each of the two outputs is taken from its own first one. When to run this variant is
decided once a chunk, outside the graph.
"""

from __future__ import annotations

from torch.fx import GraphModule

from li_compile.patterns import DenoisingLoop, Miss

from .record import Record


def cached_steps(module: GraphModule, loop: DenoisingLoop, min_steps: int) -> Record:
    """Rewrite the loop in place. Counts the steps that are no longer computed."""
    record = Record("cached_steps")
    if loop.steps < min_steps:
        reason = f"{loop.steps} denoising steps; reuse needs at least {min_steps}, since first and last are computed"
        record.misses.append(Miss("cached steps", loop.calls[0][0].name, reason))
        return record
    for outputs in loop.outputs[1:-1]:
        for node, first in zip(outputs, loop.outputs[0]):
            node.replace_all_uses_with(first)
        record.count += 1
    record.details.append(f"{loop.steps} steps, 2 computed ({loop.form})")
    return record

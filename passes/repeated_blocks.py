"""Repeated blocks become one region, exact: a model of 54 blocks is compiled in the time of one.

Before::                                     After::

    h0 = linear(x0, w0); x1 = x0 + silu(h0)      x1 = invoke_subgraph("li_block_0", x0, w0)[0]
    h1 = linear(x1, w1); x2 = x1 + silu(h1)      x2 = invoke_subgraph("li_block_0", x1, w1)[0]
    ...                                          ...

For graphs that Dynamo left flat. It runs last: the other passes see all blocks side by side, and blocks that they made unequal
(the first one computes what the others reuse, the first layers stay dense) stay outside.
"""

from __future__ import annotations

from torch.fx import GraphModule

from li_compile.patterns.graph import subgraphs
from li_compile.patterns.repeats import find_repeats

from .merge_regions import merge_regions
from .outline import outline
from .record import Record
from .share_steps import shared_regions

TIMES, NODES = 4, 12  # below that, what is saved is not worth a border that Inductor does not fuse across
PREFIX = "li_block_"


def repeated_blocks(module: GraphModule) -> Record:
    """Rewrite a graph, or the regions in it that are compiled by themselves, in place. Counts the calls of the new regions."""
    record = Record("repeated_blocks")
    for graph_module in [getattr(module, name) for name in shared_regions(module)] or [module]:
        while (body := find_repeats(graph_module.graph, TIMES, NODES)) is not None:
            name = f"{PREFIX}{sum(name.startswith(PREFIX) for name in subgraphs(graph_module))}"
            record.count += len(outline(graph_module, body, name))
            record.details.append(f"{body.calls} x {len(body.nodes)} nodes")
        if record.count:
            merge_regions(graph_module)  # the blocks of one step and of the next
    return record

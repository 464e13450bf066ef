"""Norm, rotary and camera encodings of queries, keys and values in one operator, exact.

Before::                                                          After::

    y = rms_norm(x); a = rope(y); b = matrices over y             z = li.encode(x.transpose(1, 2), norm, eps, cos, sin, camera)
    z = cat([a, b], 0)                                            z = z.transpose(1, 2)

A compiler fuses the chain too, but an output of it reads nine values where a kernel made for it reads one: on an H100 1.0 against 0.26 ms
a block of HY-WorldPlay's context encoding (docs/numbers.md). Where there is no such kernel, as on a CPU, the chain stays.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from li_compile.kernels.encode import why_not_encoded
from li_compile.patterns import Miss
from li_compile.patterns.encodings import read_encoded
from li_compile.patterns.graph import shape, source_line, subgraphs, value

from .record import Record
from .regions import drop_dead


def encode(module: GraphModule, anywhere: bool = False) -> Record:
    """Rewrite a graph and its regions, in place. anywhere: also where no kernel is. Counts the tensors that are encoded."""
    record = Record("encode")
    for graph_module in (module, *subgraphs(module).values()):
        graph = graph_module.graph
        for node in list(graph.nodes):
            found = read_encoded(node) if node.op == "call_function" else None
            if found is None:
                continue
            why = why_not_encoded(value(found.x))
            if why is not None and not anywhere:
                record.misses.append(Miss("encode", node.name, f"left to Inductor: {why}", source_line(node)))
                continue
            with graph.inserting_before(node):
                x = graph.call_method("transpose", (found.x, 1, 2))
                cos, sin = (t if t is None else graph.call_method("reshape", (t, (-1, shape(found.x)[3]))) for t in (found.cos, found.sin))
                done = graph.call_function(torch.ops.li.encode.default, (x, found.norm, found.eps, cos, sin, found.camera))
                new = graph.call_method("transpose", (done, 1, 2))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            record.count += 1
        drop_dead(graph_module)
    return record

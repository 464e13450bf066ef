"""Padding that a family's preparation leaves out before anything is traced, exact: what it would have cost, from the graph without it.

::

    x = cat([x, zeros(padded - tokens)], 1)            # upstream; every product of tokens has ``padded`` rows
    y = attention(q, k[:, :tokens], v[:, :tokens])     # keys are cut, so that no result depends on the padding

No pass can see it, since it never was in the graph; in the report it stands beside them, apart from what pruning saves.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch.fx import GraphModule, Node

from li_compile.patterns.graph import CONV, SDPA, argument, calls, hint, value

from .cost import nbytes, products
from .record import Record


def padding_left_out(module: GraphModule, tokens: int, padded: int, exempt: Callable[[Node], bool] = lambda node: False) -> Record | None:
    """What ``padded - tokens`` more rows would have added to the products of a sequence of ``tokens``, once for each run of the graph.

    exempt: tells products of the sequence that upstream cuts to its tokens first. None where no product has such rows.
    """
    more, record = Fraction(padded - tokens, tokens), Record("padding left out")
    for product in products(module):
        node = product.node
        if calls(node, CONV) or not _has_rows(value(node), tokens) or exempt(node):  # convolutions come before the padding
            continue
        read = [argument(node, 0, "query")] if calls(node, SDPA) else node.all_input_nodes  # keys and values are cut
        grown = [x for n in (node, *read) if _has_rows(x := value(n), tokens)]
        record.count += product.runs
        record.flops += int(product.runs * product.operations * more)
        record.bytes += int(product.runs * sum(map(nbytes, grown)) * more)
    record.details.append(f"{padded - tokens} of {padded} tokens, exact, by the family's preparation")
    return record if record.count and padded > tokens else None


def _has_rows(x, tokens: int) -> bool:
    return isinstance(x, torch.Tensor) and tokens in map(hint, x.shape[:-1])

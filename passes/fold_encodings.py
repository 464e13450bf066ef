"""Norm, rotary and camera encodings on the way into blocks, exact: what ``li::encode`` would write for block-sparse attention alone is not written.

Before::                                                   After::

    q1 = li.encode(q, q_norm, eps, cos, sin, p)                o, k1, v1 = li.sparse_prefill(q, [text_k, k], [text_v, v], ..., eps=eps,
    k1 = li.encode(k, k_norm, eps, cos, sin, r)                    q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin, q_camera=p, kv_camera=r)
    v1 = li.encode(v, camera=r)
    o, k1, v1 = li.sparse_prefill(q1, [text_k, k1], [text_v, v1], ...)

The same kernel brings tokens into blocks and encodes them: done at once, it reads one branch where it would read two that were written before.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from li_compile.patterns import CURRENT, Miss
from li_compile.patterns.graph import argument, name_of, region_calls, source_line, subgraphs, value

from .cost import nbytes
from .record import Record
from .regions import drop_dead, structure

ATTENTION = (torch.ops.li.sparse_attention.default, torch.ops.li.sparse_prefill.default)
ENCODE = torch.ops.li.encode.default


def fold_encodings(module: GraphModule) -> Record:
    """Rewrite a graph and its regions, in place. Counts the tensors that attention encodes itself."""
    record, saved = Record("fold_encodings"), 0
    for region, graph_module in {"": module, **subgraphs(module)}.items():
        times = len(region_calls(module, region)) if region else 1
        for node in [n for n in graph_module.graph.nodes if n.target in ATTENTION]:
            current = node.args[3].index(CURRENT)
            found = [_encoded(x, node) for x in (node.args[0], node.args[1][current], node.args[2][current])]
            if not any(found):
                continue
            why = _why_not(*found)
            if why is not None:
                record.misses.append(Miss("fold encodings", node.name, why, source_line(node)))
                continue
            q, k, v = found
            beside = lambda i, x: [x if s == current else y for s, y in enumerate(node.args[i])]
            node.args = (q.args[0], beside(1, k.args[0]), beside(2, v.args[0]), *node.args[3:])
            q_norm, eps, cos, sin, q_camera = _parts(q)
            k_norm, _, _, _, kv_camera = _parts(k)
            node.kwargs = {**node.kwargs, "eps": eps, "q_norm": q_norm, "k_norm": k_norm, "cos": cos, "sin": sin, "q_camera": q_camera,
                           "kv_camera": kv_camera}  # fmt: skip
            record.count += 3 * times
            saved += 2 * times * sum(nbytes(value(x)) for x in found)
        drop_dead(graph_module)
    if record.count:
        record.details.append(f"{record.count} queries, keys and values are encoded on their way into blocks, which moves {saved / 1e6:,.0f} MB less")
    return record


def _encoded(node: Node, reader: Node) -> Node | None:
    """The encoding that a value of the attention is, if nothing else reads it."""
    turned = False
    while name_of(node) == "transpose" and {d % 4 for d in node.args[1:]} == {1, 2} and set(node.users) == {reader}:
        node, reader, turned = node.args[0], node, not turned
    return node if node.target is ENCODE and not turned and set(node.users) == {reader} else None


def _parts(node: Node) -> tuple:
    """norm, eps, cos, sin, camera."""
    defaults = (None, 1e-6, None, None, None)
    return tuple(argument(node, i, name, default) for i, (name, default) in enumerate(zip(("norm", "eps", "cos", "sin", "camera"), defaults), 1))


def _why_not(q: Node | None, k: Node | None, v: Node | None) -> str | None:
    if q is None or k is None or v is None:
        return "not all of queries, keys and values are encoded for it alone"
    (q_norm, q_eps, *q_tables, q_camera), (k_norm, k_eps, *k_tables, k_camera), (v_norm, _, *v_tables, v_camera) = map(_parts, (q, k, v))
    if q_norm is not None and k_norm is not None and q_eps != k_eps or structure(q_tables) != structure(k_tables):
        return "queries and keys are normalised or rotated differently"
    if v_norm is not None or v_tables != [None, None]:
        return "values are normalised or rotated"
    if (q_camera is None) != (k_camera is None) or structure(k_camera) != structure(v_camera):
        return "keys and values are seen by different cameras"
    return None

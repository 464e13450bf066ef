"""Spellings that PyTorch itself has: FlexAttention, and masks that are constants.

::

    flex_attention(q, k, v)                                    no mask, no score function
    scaled_dot_product_attention(q, k, v, arange(L) < n)       n a number: the first n keys, which a slice gives
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .attention_call import meaning, prefix
from .graph import SDPA, Miss, ancestors, argument, calls, name_of, placeholders, shape
from .spelling import Spelling, refuse, replaced_by

FLEX = torch.ops.higher_order.flex_attention


def read_flex(node: Node) -> Spelling | Miss | None:
    if node.target is not FLEX:
        return None
    no = lambda reason: refuse("attention", node, "flex_attention", reason)
    query, key, val, score, mask, scale = node.args[:6]
    inside = lambda n: getattr(node.graph.owning_module, str(n.target))
    out = _result(inside(score))
    if out is not placeholders(inside(score).graph)[0]:
        return no("it has a score function")
    # Without a block mask PyTorch makes one of a single block, of queries and keys whose number it gives as 1.
    if mask[:2] != (1, 1) or name_of(_result(inside(mask[-1]))) != "new_ones":
        return no("it has a block mask, and which keys that allows is not read; select keys by slices instead")
    replaced = replaced_by(node, 0)
    if isinstance(replaced, int):
        return no("its log-sum-exp is used")
    head_dim, extra = shape(query)[-1], {}
    if not isinstance(scale, (int, float)):
        return no("its scale is computed in the graph; needed: a number")
    if not isinstance(head_dim, int) or abs(scale - head_dim**-0.5) > 1e-6 * scale:
        extra["scale"] = float(scale)
    if shape(query)[1] != shape(key)[1]:
        extra["enable_gqa"] = True
    return Spelling("flex_attention", "attention", [node], replaced, [query, key, val], meaning("BHSD", 0, None, extra),
                    _only_for(node, [n for n in mask if isinstance(n, Node)], [query, key, val]))


def _only_for(node: Node, masks: list[Node], operands: list[Node]) -> list[Node]:
    """What makes a block mask and nothing else: it writes in place and opens vmaps, so that it would not count as dead code."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    cone, kept = {a for a in ancestors(masks) if a.op.startswith("call")}, set(ancestors(operands))
    start = min((order[a] for a in cone - kept), default=order[node])
    dead = {n for n, i in order.items() if start <= i < order[node] and n not in kept}
    while outside := {n for n in dead if any(u not in dead and u is not node for u in n.users)}:
        dead -= outside
    mine = {n for n in dead if n in cone or name_of(n).startswith("_vmap") or any(a in cone for a in n.all_input_nodes)}
    return sorted(mine, key=order.get)


def _result(module: GraphModule) -> Node:
    out = module.graph.output_node().args[0]
    return out[0] if isinstance(out, (tuple, list)) else out


def read_masked(node: Node) -> Spelling | None:
    """SDPA with a mask that is known to be full or to allow a prefix of the keys; what is not known, its matcher refuses."""
    mask = argument(node, 3, "attn_mask") if calls(node, SDPA) else None
    operands = [argument(node, i, n) for i, n in enumerate(("query", "key", "value"))] if mask is not None else []
    if mask is None or len(shape(operands[1]) or ()) != 4 or argument(node, 5, "is_causal", default=False):
        return None
    keys = prefix(mask, shape(operands[1])[2])
    if isinstance(keys, str):
        return None
    extra = {k: v for k, v in (("dropout_p", argument(node, 4, "dropout_p", default=0.0)), ("scale", argument(node, 6, "scale")),
                               ("enable_gqa", argument(node, 7, "enable_gqa", default=False))) if v}
    return Spelling("constant mask", "attention", [node], [node], operands, meaning("BHSD", 0, keys, extra))

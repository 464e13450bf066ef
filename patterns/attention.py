"""Attention sites: a scaled dot-product attention whose keys are a concatenation [text | context | current].

Found on the canonical graph, in the graph itself or in a nested region::

    k1 = cat([context_k, k], dim=2); k2 = cat([text_k, k1], dim=2)        # nested, flattened to segments
    sdpa(q, k2, v2)                                                        # the same for v

A segment is *current* if its keys come from the projection that the queries come from, *context* if it holds whole
latent frames, *text* otherwise.
"""

from __future__ import annotations

import dataclasses
import math

from torch.fx import GraphModule, Node

from .graph import (CONV, LINEAR, REGION, SDPA, Miss, ancestors, argument, calls, cat_operands, hint, known, region_calls,
                    region_operand, shape, source_line, subgraphs, through_shapes)
from .grids import solve_grids, why_unknown

TEXT, CONTEXT, CURRENT = 0, 1, 2
ROLE_NAMES = ("text", "context", "current")


@dataclasses.dataclass
class Segment:
    """A run of keys and values along the sequence: nodes [B, H, length, D] and what they stand for."""

    key: Node
    value: Node
    length: object  # int or SymInt
    role: int


@dataclasses.dataclass
class AttentionSite:
    """One attention node, read. ``region`` is the attribute of the nested region that holds it, "" in the graph itself.

    calls: the region's calls, or the attention node itself. layers: of each call, the weight that makes its queries:
    one name a layer of the model, the same in all denoising steps. frames: latent frames of (context, current).
    protected: of a prefill's frames, how many at the end are new; None: that cannot be told, though the family has some.
    """

    node: Node
    region: str
    query: Node
    segments: list[Segment]
    scale: float | None
    grid: tuple[int, int]
    kind: str  # "decode" (context is attended to), "prefill" (no context: the frames attend to each other)
    branches: int
    calls: list[Node]
    layers: list[str]
    protected: int | None = 0

    def tokens(self, *roles: int):
        return sum(s.length for s in self.segments if s.role in roles)

    def frames(self, role: int):
        return self.tokens(role) // (self.grid[0] * self.grid[1])

    @property
    def chosen_from(self):
        """Latent frames that block-sparse attention chooses from: the context, or of a prefill all that are not protected."""
        return self.frames(CONTEXT) if self.kind == "decode" else self.frames(CURRENT) - (self.protected or 0)


def token_grids(module: GraphModule) -> list[tuple[int, int]]:
    """Rows and columns of tokens in a frame, as the patch embeddings (convolutions over frames) of the graph give them."""
    return list(dict.fromkeys(_grid(n) for n in module.graph.nodes if calls(n, CONV) and _grid(n))) or solve_grids(module)


def _grid(node: Node) -> tuple[int, int] | None:
    """Rows and columns of what a convolution over frames gives."""
    s = shape(node)
    return s[-2:] if s is not None and len(s) >= 4 and all(isinstance(n, int) for n in s[-2:]) else None


def _embeddings(module: GraphModule) -> list[tuple]:
    """Shapes [B, C, T, H, W] of what convolutions over videos give: with one over images, B and T cannot be told apart."""
    return [s for n in module.graph.nodes if calls(n, CONV) and len(s := shape(n) or ()) == 5]


def _nearest_first(module: GraphModule, region: str, node: Node, grids: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The grids, first the one of the convolution that the tokens went through last: a UNet or a pyramid has several."""
    if len(grids) < 2:
        return grids
    order = {n: i for i, n in enumerate(module.graph.nodes)}
    above = [n for n in ancestors(_where_called(module, region, node)) if calls(n, CONV) and _grid(n) in grids]
    return sorted(grids, key=lambda g: -max((order[n] for n in above if _grid(n) == g), default=-1))


def _times(*sizes) -> int | None:
    """The product of sizes, as they were traced; None if one of them is unknown."""
    numbers = [hint(n) for n in sizes]
    return None if None in numbers else math.prod(numbers)


def projection_inputs(node: Node) -> tuple[set[Node], list[Node]]:
    """What the projections nearest above a node read, and those projections, nearest first."""
    stop = lambda n: calls(n, LINEAR) or n.target is REGION
    linears = [n for n in ancestors([node], stop) if calls(n, LINEAR)]
    return {through_shapes(n.args[0]) for n in linears}, linears


def flatten_cat(node: Node, dim: int) -> list[Node]:
    """Operands of nested concatenations along one dimension, in order."""
    read = cat_operands(node)
    if read is None or read[1] != dim:
        return [node]
    return [leaf for operand in read[0] for leaf in flatten_cat(operand, dim)]


def branch_count(query: Node) -> int:
    """How many branches are stacked on the batch axis of the queries (RoPE and PRoPE: 2)."""
    read = cat_operands(through_shapes(query))
    return len(read[0]) if read is not None and read[1] == 0 else 1


def _where_called(module: GraphModule, region: str, node: Node) -> list[Node]:
    return region_calls(module, region) if region else [node]


def _layer(module: GraphModule, region: str, call: Node, weight: Node) -> str:
    if region and weight.op == "placeholder":
        weight = through_shapes(region_operand(call, getattr(module, region), weight))
    return weight.name


def _equal(a, b) -> bool:
    """Whether two lengths are one: Dynamo gives the keys and the values of a cache a symbol each, and nothing in between
    says that they are equal, though attention could not take anything else."""
    return known(a == b) or (not isinstance(a, int) and not isinstance(b, int) and hint(a) is not None and hint(a) == hint(b))


def why_not_plain(node: Node) -> str | None:
    """What an attention node has beyond queries, keys and values and a scale, None if nothing."""
    if argument(node, 3, "attn_mask") is not None:
        return "it has an attention mask"
    if argument(node, 5, "is_causal", default=False) or (argument(node, 4, "dropout_p", default=0.0) or 0.0) != 0.0:
        return "it is causal or has dropout"
    return None


def segments(key: Node, val: Node) -> tuple[list[Node], list[Node]] | None:
    """What keys and values are concatenated from, None where these are not pairs of equal lengths."""
    keys, values = flatten_cat(key, 2), flatten_cat(val, 2)
    alike = len(keys) == len(values) and all(_equal(shape(k)[2], shape(v)[2]) for k, v in zip(keys, values))
    return (keys, values) if alike else None


def read_site(module: GraphModule, region: str, node: Node, grids: list[tuple[int, int]]) -> AttentionSite | Miss:
    """Read one attention node; a Miss says why it is no site of a video model."""
    refuse = lambda reason: Miss("attention", node.name, reason, source_line(node))
    query, key, val = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    q_shape, k_shape = shape(query), shape(key)
    if q_shape is None or k_shape is None or len(q_shape) != 4 or len(k_shape) != 4:
        return refuse(f"queries and keys are {q_shape} and {k_shape}; needed: [batch, heads, tokens, head_dim]")
    if (why := why_not_plain(node)) is not None:
        return refuse(why)
    if argument(node, 7, "enable_gqa", default=False) or not known(q_shape[1] == k_shape[1]):
        return refuse("queries and keys have different numbers of heads")
    if (parts := segments(key, val)) is None:
        return refuse("keys and values are not concatenated from segments of equal lengths")
    keys, values = parts
    mine, linears = projection_inputs(query)
    if not linears:
        return refuse("no projection found above its queries")
    fresh = [bool(projection_inputs(k)[0] & mine) for k in keys]
    if not any(fresh):
        return refuse("its keys come from another stream than its queries (cross-attention)")
    if sum(fresh) > 1 or not fresh[-1]:
        return refuse("the keys of the current tokens are not one segment at the end")
    if not known(shape(keys[-1])[2] == q_shape[2]):
        return refuse(f"{q_shape[2]} queries but {shape(keys[-1])[2]} keys of the current tokens")
    tokens = _times(q_shape[0], q_shape[2])
    rows = [_times(*shape(n)[:-1]) for n in linears]
    if tokens is not None and None not in rows and not any(r and tokens % r == 0 for r in rows):
        return refuse(f"{q_shape[0]} x {q_shape[2]} queries of {rows[0]} projected tokens: it attends among channels")
    grids = _nearest_first(module, region, node, grids)
    grid = next((g for g in grids if known(q_shape[2] % (g[0] * g[1]) == 0)), None)
    if grid is None:
        known_grids = ", ".join(f"{h} x {w}" for h, w in grids) or why_unknown(module)
        return refuse(f"{q_shape[2]} tokens are no whole number of latent frames (token grids: {known_grids}); "
                      "give sparse.grid=(rows, columns)")
    per_frame = grid[0] * grid[1]
    branches = branch_count(query)
    if per_frame > 1 and known(q_shape[0] % per_frame == 0) and not any(
            s[-2:] == grid and known(s[0] * branches == q_shape[0]) for s in _embeddings(module)):
        return refuse(f"it runs along {q_shape[0]} sequences, a number of whole frames of {per_frame} tokens: temporal attention, "
                      "each place of a frame by itself")
    roles = [CURRENT if f else CONTEXT if known(shape(k)[2] % per_frame == 0) else TEXT for k, f in zip(keys, fresh)]
    # Cached keys of a dynamic number of frames: nothing in the graph says that they are whole frames, but for their size.
    before = shape(keys[-2])[2] if len(keys) > 1 and CONTEXT not in roles else None
    if before is not None and not isinstance(before, int) and hint(before) and hint(before) % per_frame == 0:
        roles[-2] = CONTEXT
    if roles.count(CONTEXT) > 1 and TEXT not in roles:
        return refuse(f"text and context cannot be told apart: {roles.count(CONTEXT)} segments before the current one "
                      f"hold whole frames of {per_frame} tokens")
    kind = "decode" if CONTEXT in roles else "prefill"
    if kind == "prefill" and known(q_shape[2] == per_frame):
        return refuse("it attends within one frame and to no context: an image model, with nothing to select from")
    sites = _where_called(module, region, node)
    return AttentionSite(
        node, region, query,
        [Segment(k, v, shape(k)[2], r) for k, v, r in zip(keys, values, roles)],
        argument(node, 6, "scale"), grid, kind, branches, sites,
        [_layer(module, region, call, through_shapes(linears[0].args[1])) for call in sites])


def find_attention(module: GraphModule, grid: tuple[int, int] | None = None) -> tuple[list[AttentionSite], list[Miss]]:
    """All attention sites of a graph and its nested regions, and the attention nodes that are none, with the reason."""
    grids = [grid] if grid else token_grids(module)
    sites, misses = [], []
    for region, graph_module in {"": module, **subgraphs(module)}.items():
        for node in graph_module.graph.nodes:
            if calls(node, SDPA):
                read = read_site(module, region, node, grids)
                (misses if isinstance(read, Miss) else sites).append(read)
    if not sites and not misses:
        misses.append(Miss("attention", "graph", "no scaled dot-product attention in this graph; call "
                           "torch.nn.functional.scaled_dot_product_attention, since attention inside a custom operator "
                           "or behind a graph break cannot be seen"))
    return sites, misses

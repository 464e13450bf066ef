"""Context concatenation: where the frames of the past come into a graph, and which of its inputs hold them.

Four forms, told apart by what the graph holds::

    frames    keys = cat([text, context, current])     the context is encoded in the graph: its latents are an input
    latents   x = cat([x_memory, x], dim=2)            memory goes through the model with the new frames; q and k are
                                                       often taken apart for RoPE and joined again with cat
    cache     keys = cat([cached, current])            only cached keys and values are an input
    slices    cache[:, a:b] = k; keys = cache[:, c:b]  they stand in a preallocated cache that the graph writes to

In the first two the source is at hand: selecting frames of the inputs prunes everything behind. In the last two the
pruned frames were computed by another graph; what is left is not to read them (``context_cache.py``).
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from .attention import CONTEXT, CURRENT, AttentionSite
from .graph import Miss, hint, is_parameter, known, placeholders, shape, source_line, value


@dataclasses.dataclass(frozen=True)
class ContextInput:
    """How an input holds the context: along ``dim``, ``per`` entries a frame, first; then ``rest`` that are not context."""

    dim: int
    per: int = 1
    rest: int = 0

    def frames(self, size: int) -> int:
        """Context frames of an input whose dimension has this size."""
        return (size - self.rest) // self.per

    def size(self, frames: int) -> int:
        return frames * self.per + self.rest

    def entries(self, indices: torch.Tensor, size: int) -> torch.Tensor:
        """Positions along the dimension, of this size, that these frames and the rest take: int64, where ``indices`` is."""
        own = (indices[:, None] * self.per + torch.arange(self.per, device=indices.device)).flatten()
        return torch.cat((own, torch.arange(size - self.rest, size, device=indices.device)))


@dataclasses.dataclass
class ContextConcat:
    """form: see the module. inputs: placeholder name -> how it holds the context; sizes: SymInt placeholders that stand
    for such a dimension -> the same, their ``dim`` meaning nothing.

    history_w2c, current_w2c: names of the camera inputs [..., N, 4, 4] and [..., Q, 4, 4], or None: the session's plan
    decides then. latents: name of the input with the context's latents, or None. positions: of the input with their
    temporal RoPE indices, or None: they follow from the context's length; compact: these are renumbered, not selected.
    sites: concatenations that the context feeds; tokens: of a latent frame; current: latent frames generated together
    (Q); frames: N, as traced.
    """

    form: str
    inputs: dict[str, ContextInput]
    sizes: dict[str, ContextInput]
    history_w2c: str | None
    current_w2c: str | None
    sites: int
    tokens: int
    current: int
    frames: int
    latents: str | None = None
    positions: str | None = None
    compact: bool = False

    @property
    def at_source(self) -> bool:
        return self.form in ("frames", "latents")


def find_context(module: GraphModule, sites: list[AttentionSite],
                 roles: dict[str, str] | None = None) -> tuple[ContextConcat | None, list[Miss]]:
    """The context of a graph, or None with the reasons. roles: input names that a family fixes (its ``roles``)."""
    from .context_cache import find_cache, find_slices
    from .context_latents import find_latents

    found = [_find_frames(module, sites, roles or {})]
    for find in (find_cache, find_latents, find_slices):
        if isinstance(found[-1], ContextConcat):
            break
        found.append(find(module, sites, roles or {}))
    if isinstance(found[-1], ContextConcat):
        return found[-1], []
    # A form of which the graph shows no sign has no reason to give; the first one always has.
    return None, [m for m in found if m is not None]


def _find_frames(module: GraphModule, sites: list[AttentionSite], roles: dict[str, str]) -> ContextConcat | Miss:
    decode = [s for s in sites if s.kind == "decode"]
    if not decode:
        return miss("no attention has context frames among its keys")
    site = decode[0]
    frames, current = site.frames(CONTEXT), site.frames(CURRENT)
    if isinstance(frames, int):
        return miss(f"the number of context frames ({frames}) is a constant of this graph, so that every context "
                    "length has a graph of its own; compile without dynamic=False, or mark the frame dimension with "
                    "torch._dynamo.mark_dynamic", site.node)
    tokens, count = site.grid[0] * site.grid[1], hint(frames)
    inputs = inputs_of(module, count, [(1, 0)])
    if not inputs:
        return miss(f"no input of the graph has a dimension of the {frames} context frames", site.node)
    cameras = find_cameras(module, inputs, count, current, roles)
    if isinstance(cameras, str):
        return miss(cameras, site.node)
    layouts = [(1, 0), (tokens, 0)]  # a mask may have the context's tokens
    inputs = inputs_of(module, count, layouts)
    return ContextConcat("frames", inputs, sizes_of(module, count, layouts), *cameras, sum(len(s.calls) for s in decode), tokens,
                         current, count, latents_of(module, inputs), positions_of(module, inputs, roles))


def miss(reason: str, node: Node | None = None) -> Miss:
    return Miss("context", node.name if node is not None else "graph", reason, source_line(node) if node is not None else "")


def tensor_inputs(module: GraphModule) -> list[Node]:
    return [p for p in placeholders(module.graph) if isinstance(value(p), torch.Tensor) and not is_parameter(p)]


def inputs_of(module: GraphModule, frames: int, layouts: list[tuple[int, int]]) -> dict[str, ContextInput]:
    """Inputs that hold so many frames along a dynamic dimension; layouts: (per, rest) of a ContextInput, likeliest first."""
    # Dynamo may give every input a size symbol of its own; that they are one and the same shows in what they stood for.
    found: dict[str, ContextInput] = {}
    for per, rest in layouts:
        for p in tensor_inputs(module):
            dims = [i for i, d in enumerate(shape(p)) if isinstance(d, torch.SymInt) and hint(d) == frames * per + rest]
            if dims:
                found.setdefault(p.name, ContextInput(dims[0], per, rest))
    return found


def sizes_of(module: GraphModule, frames: int, layouts: list[tuple[int, int]]) -> dict[str, ContextInput]:
    """SymInt placeholders that stand for so many frames."""
    found: dict[str, ContextInput] = {}
    for per, rest in layouts:
        for p in placeholders(module.graph):
            if isinstance(value(p), torch.SymInt) and hint(value(p)) == frames * per + rest:
                found.setdefault(p.name, ContextInput(0, per, rest))
    return found


def is_pose(node: Node) -> bool:
    """A matrix a frame: floating point [frames, 4, 4] or [B, frames, 4, 4], and no weight."""
    s = shape(node)
    return s is not None and len(s) in (3, 4) and s[-2:] == (4, 4) and value(node).is_floating_point() \
        and not is_parameter(node)


def find_cameras(module: GraphModule, inputs: dict[str, ContextInput], frames: int, current,
                 roles: dict[str, str]) -> tuple[str, str] | str:
    """Names of the context's and of the current cameras among the inputs, or why there are none."""
    tensors = tensor_inputs(module)
    named = lambda role: [p for p in tensors if roles.get(role) and roles[role] in p.name.lower()]
    history = [p for p in named("history_w2c") or filter(is_pose, tensors) if p.name in inputs]
    now = [p for p in named("current_w2c") or filter(is_pose, tensors) if p.name not in inputs]
    now = [p for p in now if known(shape(p)[-3] == current)]
    if len(history) != 1 or len(now) != 1:
        found = ", ".join(f"{p.name} of {hint(shape(p)[-3])}" for p in filter(is_pose, tensors)) or "none"
        return (f"camera poses: needed one input [..., {frames} context frames, 4, 4] and one [..., {current}, "
                f"4, 4], found {found}; give one pose a latent, or name the inputs in a family's roles")
    return history[0].name, now[0].name


def latents_of(module: GraphModule, inputs: dict[str, ContextInput]) -> str | None:
    """The one context input that is a video: floating point [B, C, N, H, W] or [B, N, C, H, W]."""
    videos = [p.name for p in tensor_inputs(module) if p.name in inputs and len(shape(p)) == 5
              and (inputs[p.name].per, inputs[p.name].rest) == (1, 0) and value(p).is_floating_point()]
    return videos[0] if len(videos) == 1 else None


def positions_of(module: GraphModule, inputs: dict[str, ContextInput], roles: dict[str, str]) -> str | None:
    """The input with the context's temporal indices: the one that a family names, else the only integer vector [N]."""
    vectors = [p.name for p in tensor_inputs(module) if p.name in inputs and len(shape(p)) == 1
               and (inputs[p.name].per, inputs[p.name].rest) == (1, 0) and not value(p).is_floating_point()]
    if roles.get("positions"):
        vectors = [name for name in inputs if roles["positions"] in name.lower()]
    return vectors[0] if len(vectors) == 1 else None

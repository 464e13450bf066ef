"""Context concatenation: which inputs of a graph hold the context frames that end up in the keys and values.

Matched from the attention sites backwards: their context segments hold N whole frames, and N is a dynamic size of the
graph. The inputs that have this size (latents, actions, cameras) are the context; selecting frames of them at the
graph's entrance prunes the context everywhere behind, the prefill included.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from .attention import CONTEXT, CURRENT, AttentionSite
from .graph import Miss, hint, is_parameter, known, placeholders, shape, source_line, value


@dataclasses.dataclass
class ContextConcat:
    """inputs: placeholder name -> dimension of the frames; sizes: names of the SymInt placeholders that are N;
    history_w2c, current_w2c: names of the camera inputs [..., N, 4, 4] and [..., Q, 4, 4]; sites: concatenations that
    it feeds; tokens: of a latent frame; current: latent frames generated together (Q)."""

    inputs: dict[str, int]
    sizes: list[str]
    history_w2c: str
    current_w2c: str
    sites: int
    tokens: int
    current: int


def _is_pose(node: Node) -> bool:
    """A matrix a frame: floating point [frames, 4, 4] or [B, frames, 4, 4], and no weight."""
    s = shape(node)
    return s is not None and len(s) in (3, 4) and s[-2:] == (4, 4) and value(node).is_floating_point() \
        and not is_parameter(node)


def find_context(module: GraphModule, sites: list[AttentionSite],
                 roles: dict[str, str] | None = None) -> tuple[ContextConcat | None, list[Miss]]:
    """The context of a graph, or None with the reason. roles: input names that a family fixes (its ``roles``)."""
    decode = [s for s in sites if s.kind == "decode"]
    refuse = lambda reason, node=None: (None, [Miss("context", node.name if node is not None else "graph", reason,
                                                    source_line(node) if node is not None else "")])
    if not decode:
        return refuse("no attention has context frames among its keys")
    site = decode[0]
    frames, current = site.frames(CONTEXT), site.frames(CURRENT)
    if isinstance(frames, int):
        return refuse(f"the number of context frames ({frames}) is a constant of this graph, so that every context "
                      "length has a graph of its own; compile without dynamic=False, or mark the frame dimension with "
                      "torch._dynamo.mark_dynamic", site.node)
    tensors = [p for p in placeholders(module.graph) if isinstance(value(p), torch.Tensor)]
    # Dynamo may give every input a size symbol of its own; that they are one and the same shows in what they stood for.
    same = lambda d: isinstance(d, torch.SymInt) and hint(d) == hint(frames)
    inputs = {p.name: next(i for i, d in enumerate(shape(p)) if same(d))
              for p in tensors if any(same(d) for d in shape(p))}
    sizes = [p.name for p in placeholders(module.graph) if same(value(p))]
    if not inputs:
        return refuse(f"no input of the graph has a dimension of the {frames} context frames", site.node)
    named = lambda role: [p for p in tensors if roles and roles.get(role) and roles[role] in p.name.lower()]
    history = [p for p in named("history_w2c") or filter(_is_pose, tensors) if p.name in inputs]
    now = [p for p in named("current_w2c") or filter(_is_pose, tensors) if p.name not in inputs]
    now = [p for p in now if known(shape(p)[-3] == current)]
    if len(history) != 1 or len(now) != 1:
        found = ", ".join(f"{p.name} of {hint(shape(p)[-3])}" for p in filter(_is_pose, tensors)) or "none"
        return refuse(f"camera poses: needed one input [..., {hint(frames)} context frames, 4, 4] and one [..., {current}, "
                      f"4, 4], found {found}; give one pose a latent, or name the inputs in a family's roles", site.node)
    return ContextConcat(inputs, sizes, history[0].name, now[0].name, sum(len(s.calls) for s in decode),
                         site.grid[0] * site.grid[1], current), []

"""Memory that goes through the model with the new frames, as in Matrix-Game-3.0: clean latents before the noisy ones.

::

    x = cat([x_memory, x], dim=2)                             # latents [B, C, M + F, H, W], then the patch embedding
    q = cat([rope(q[:, :m], idx), rope(q[:, m:], ...)], 1)    # in each block, m = M * tokens; k likewise, v is not split
    return out[:, :, M:]                                      # memory is dropped at the end

Inputs that hold memory do so in four ways: [.., M, ..] (latents, actions, indices), [.., M * tokens, ..] (time, masks),
and, already joined with the new frames, [.., M + F, ..] (camera rays) or [.., (M + F) * tokens, ..].
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .attention import AttentionSite, token_grids
from .context import ContextConcat, find_cameras, inputs_of, latents_of, miss, positions_of, sizes_of
from .graph import CONV, LINEAR, SDPA, Miss, ancestors, calls, cat_operands, hint, shape, subgraphs


def find_latents(module: GraphModule, sites: list[AttentionSite], roles: dict[str, str]) -> ContextConcat | Miss | None:
    """The memory latents of a graph; a Miss where they are there and cannot be pruned, None where there are none."""
    joined = [read for node in module.graph.nodes if (read := _latent_cat(node)) is not None]
    rotated, grids = _rotated_apart(module), token_grids(module)
    if not joined and not rotated:
        return None
    if not grids:
        return miss("memory is joined with new latents, but no patch embedding tells the tokens of a frame", [*joined, *rotated][0][0])
    tokens = grids[0][0] * grids[0][1]
    found = joined or [(node, memory // tokens, window // tokens) for node, memory, window in rotated]
    # Past frames that are pinned in front of the new ones look the same, but for their constant number.
    node, memory, window = next((f for f in found if not isinstance(f[1], int)), found[0])
    if isinstance(memory, int):
        return miss(f"the number of memory latents ({memory}) is a constant of this graph; mark their dimension of every input that "
                    "has it with torch._dynamo.mark_dynamic", node)
    if not isinstance(window, int):
        return miss("the number of new latents is no constant of this graph, so that memory cannot be told from them in the inputs that "
                    "hold both; give new latents of one constant number", node)
    frames = hint(memory)
    layouts = [(1, 0), (tokens, 0), (1, window), (tokens, window * tokens)]
    inputs = inputs_of(module, frames, layouts)
    cameras = find_cameras(module, inputs, frames, window, roles)
    return ContextConcat("latents", inputs, sizes_of(module, frames, layouts), *((None, None) if isinstance(cameras, str) else cameras),
                         len(rotated) + len(joined), tokens, window, frames, latents_of(module, inputs),
                         positions_of(module, inputs, roles))


def _latent_cat(node: Node) -> tuple[Node, object, object] | None:
    """(node, memory frames, new frames) of a cat of two videos along frames that no layer has touched and one will."""
    read = cat_operands(node)
    if read is None or len(read[0]) != 2 or read[1] != 2 or len(shape(node)) != 5:
        return None
    operands, dim = read
    if any(calls(a, LINEAR | CONV | SDPA) for a in ancestors(operands)) or not _embedded(node):
        return None
    sources = [a for a in ancestors([operands[0]]) if a.op == "placeholder" and len(shape(a) or ()) == 5]
    if not sources:
        return None
    return node, shape(operands[0])[dim], shape(operands[1])[dim]


def _embedded(node: Node) -> bool:
    """Whether a convolution (the patch embedding) reads a node, with nothing but moves and joins in between."""
    todo, seen = [node], set()
    while todo:
        for user in todo.pop().users:
            if calls(user, CONV):
                return True
            if user not in seen and not calls(user, LINEAR | SDPA) and len(shape(user) or ()) in (4, 5):
                seen.add(user)
                todo.append(user)
    return False


def _rotated_apart(module: GraphModule) -> list[tuple[Node, object, object]]:
    """(node, memory tokens, new tokens) of tensors that are joined again along tokens after RoPE: cats of two slices of one
    projection, memory first."""
    found = []
    for graph_module in (module, *subgraphs(module).values()):
        for node in graph_module.graph.nodes:
            read = cat_operands(node)
            if read is None or len(read[0]) != 2 or read[1] not in (1, 2) or len(shape(node)) != 4:
                continue
            roots = [{a for a in ancestors([o], lambda n: calls(n, LINEAR)) if calls(a, LINEAR)} for o in read[0]]
            if roots[0] and roots[0] == roots[1]:
                found.append((node, *(shape(o)[read[1]] for o in read[0])))
    return found

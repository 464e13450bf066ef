"""Token grids that no patch embedding tells: read where tokens become a picture again, or solved from shapes.

::

    x.view(B, C, T, rows, p, columns, q)          a patchify by reshape
    tokens.unflatten(1, (T, rows, columns))       an unpatchify
    T * H * W = tokens * p * q                    else: p divides H, q divides W, and there may be several answers
"""

from __future__ import annotations

import sympy
from torch.fx import GraphModule, Node

from ._compat import expression, known
from .graph import SDPA, argument, calls, is_parameter, name_of, placeholders, shape, subgraphs, value

_RESHAPES = {"view", "reshape", "unflatten"}


def solve_grids(module: GraphModule) -> list[tuple[int, int]]:
    """Rows and columns of tokens in a latent frame, if they are the only ones that fit; else none."""
    sizes = _frames(module)
    read = _distinct(g for n in _nodes(module) if name_of(n) in _RESHAPES and (g := _reshaped(n, sizes)) is not None)
    if read:
        return read
    found = candidates(module)
    return found if len(found) == 1 else []


def why_unknown(module: GraphModule) -> str:
    """What is known of the grid where ``solve_grids`` gives none, in words."""
    found = candidates(module)
    if len(found) > 1:
        return "none found in a patch embedding, and shapes alone leave " + " or ".join(f"{r} x {c}" for r, c in found)
    return "none found in a patch embedding"


def candidates(module: GraphModule) -> list[tuple[int, int]]:
    """All grids that the sizes of latents and the tokens of attention allow."""
    found: list[tuple[int, int]] = []
    queries = [shape(argument(n, 0, "query")) for n in _nodes(module) if calls(n, SDPA)]
    for tokens in _distinct(q[2] for q in queries if q is not None and len(q) == 4):
        for frames, height, width in _frames(module):
            area = sympy.cancel(expression(frames) * height * width / expression(tokens))
            if not area.is_Integer or area < 1:
                continue
            for p in map(int, sympy.divisors(area)):
                q = int(area) // p
                if height % p == 0 and width % q == 0 and (height // p, width // q) not in found:
                    found.append((height // p, width // q))
    return found


def _nodes(module: GraphModule) -> list[Node]:
    return [n for m in (module, *subgraphs(module).values()) for n in m.graph.nodes if n.op in ("call_function", "call_method")]


def _frames(module: GraphModule) -> list[tuple]:
    """(frames, height, width) of the graph's videos [B, C, T, H, W] or [B, T, C, H, W]; both readings where both may be."""
    found = []
    for p in placeholders(module.graph):
        s = shape(p)
        if s is None or len(s) != 5 or is_parameter(p) or not value(p).is_floating_point():
            continue
        if isinstance(s[3], int) and isinstance(s[4], int):
            found += [(t, s[3], s[4]) for t in (s[2], s[1])]
    return _distinct(found)


def _distinct(items) -> list:
    """Without repetitions; by their text, since symbolic sizes cannot be hashed."""
    return list({str(i): i for i in items}.values())


def _reshaped(node: Node, frames: list[tuple]) -> tuple[int, int] | None:
    """The grid that a reshape of a video's frames or of its tokens shows."""
    before = shape(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    after = shape(node)
    if before is None or after is None:
        return None
    for t, height, width in frames:
        if len(after) >= 6 and before[-2:] == (height, width) and all(isinstance(d, int) for d in after[-4:]):
            rows, p, columns, q = after[-4:]
            if rows * p == height and columns * q == width and p * q > 1:
                return rows, columns
        for i in range(len(after) - 2):
            own, rows, columns = after[i: i + 3]
            if i < len(before) and isinstance(rows, int) and isinstance(columns, int) and known(own == t) and rows > 1 and columns > 1 \
                    and known(before[i] == own * rows * columns) and height % rows == 0 and width % columns == 0:
                return rows, columns
    return None

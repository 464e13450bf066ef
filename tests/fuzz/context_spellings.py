"""Context in random spellings: a block whose keys hold context of a dynamic length, given in one of the four forms."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from attention_spellings import CAST, COLUMNS, DIM, EMBED, FRAME, HEAD_DIM, HEADS, JOIN, MOVE, NORM, PROJECT, ROWS, WHERE
from torch import nn

FORMS = ("frames", "cache", "latents", "slices")
# The spellings of EMBED that hold for any number of frames.
EMBEDS = [name for name in EMBED if name.startswith("conv3d")]


@dataclasses.dataclass(frozen=True)
class Context:
    form: str = "frames"
    embed: str = "conv3d"
    project: str = "chunk"
    norm: str = "none"
    move: str = "transpose"
    join: str = "flat"
    where: str = "heads first"
    cast: str = "none"
    frames: int = 9
    current: int = 4
    text: bool = True
    depth: int = 1


class Model(nn.Module):
    def __init__(self, context: Context):
        super().__init__()
        self.context = context
        embed, self.tokens = EMBED[context.embed]
        layers, self.project = PROJECT[context.project]
        self.embed, self.layers, self.out = embed(), nn.ModuleList(make() for make in layers), nn.Linear(DIM, DIM)
        self.pose = nn.Linear(16, DIM)

    def forward(self, x, *given):
        return getattr(self, self.context.form)(x, *given)

    def attend(self, tokens, pieces):
        """Attention of tokens to pieces [(k, v), ...] of [B, L, H, D] and to themselves."""
        c = self.context
        move = MOVE[c.move]
        q, k, v = self.project(self.layers, tokens)
        keys, values = WHERE[c.where](JOIN[c.join], [*pieces, (NORM[c.norm](k), v)], move)
        q, keys, values = CAST[c.cast](move(NORM[c.norm](q)), keys, values)
        out = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
        return tokens + self.out(out.to(tokens.dtype))

    def posed(self, tokens, poses):
        return tokens + self.pose(poses.flatten(-2)).repeat_interleave(FRAME, 1)

    def frames(self, x, history, history_w2c, current_w2c, *text):
        """The context is encoded in the graph, with cameras."""
        past = self.posed(self.tokens(self.embed, history), history_w2c)
        now = self.posed(self.tokens(self.embed, x), current_w2c)
        for _ in range(self.context.depth):
            _, k, v = self.project(self.layers, past)
            now = self.attend(now, [*zip(text[::2], text[1::2]), (k, v)])
        return now

    def cache(self, x, *given):
        """Keys and values of text and context are given."""
        now = self.tokens(self.embed, x)
        for _ in range(self.context.depth):
            now = self.attend(now, [*zip(given[::2], given[1::2])])
        return now

    def latents(self, x, memory):
        """Memory goes through the model in front of the new latents."""
        now = self.tokens(self.embed, JOIN[self.context.join]([memory, x], 2))
        for _ in range(self.context.depth):
            now = self.attend(now, [])
        return now.unflatten(1, (-1, ROWS, COLUMNS))[:, memory.shape[2]:]

    def slices(self, x, key_cache, value_cache):
        """Own keys are written into a preallocated cache behind the context, which is then read as a whole."""
        c, now = self.context, self.tokens(self.embed, x)
        begin, stop = c.frames * FRAME, (c.frames + c.current) * FRAME
        q, k, v = self.project(self.layers, now)
        key_cache[:, begin:stop] = NORM[c.norm](k)
        value_cache[:, begin:stop] = v
        move = MOVE[c.move]
        q, k, v = CAST[c.cast](move(NORM[c.norm](q)), *(move(cache[:, :stop]) for cache in (key_cache, value_cache)))
        return now + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(now.dtype))


def inputs(context: Context) -> list[torch.Tensor]:
    """Inputs, the context's dimensions marked as dynamic."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(1, *size, generator=random)
    n, q = context.frames, context.current
    x, text = draw(3, q, ROWS, COLUMNS), [draw(5, HEADS, HEAD_DIM) for _ in range(2 * context.text)]
    mark = lambda tensor, dim: torch._dynamo.mark_dynamic(tensor, dim) or tensor
    poses = lambda count: torch.eye(4).expand(1, count, 4, 4).clone()
    if context.form == "frames":
        return [x, mark(draw(3, n, ROWS, COLUMNS), 2), mark(poses(n), 1), poses(q), *text]
    if context.form == "cache":
        return [x, *text, *(mark(draw(n * FRAME, HEADS, HEAD_DIM), 1) for _ in range(2))]
    if context.form == "latents":
        return [x, mark(draw(3, n, ROWS, COLUMNS), 2)]
    return [x, *(draw((n + q + 3) * FRAME, HEADS, HEAD_DIM) for _ in range(2))]

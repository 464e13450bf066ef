"""The form of Matrix-Game-3.5: keys are cached before their rotation and rotated at every read, over the whole window; camera
matrices of all frames enter keys and queries; a keep-mask says which cached frames count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import DIM, HEAD_DIM, HEADS, Modulated, TimeEmbedding, rotary, unpatchify

CHANNELS, PATCH, ROWS, COLUMNS, CHUNK, DEPTH = 4, 2, 4, 4, 4, 2
TOKENS = ROWS * COLUMNS


class PosedWorld(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv3d(CHANNELS, DIM, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.time, self.head = TimeEmbedding(), nn.Linear(DIM, CHANNELS * PATCH * PATCH)
        self.blocks = nn.ModuleList(Modulated() for _ in range(DEPTH))
        self.pose = nn.ModuleList(nn.Linear(12, HEAD_DIM, bias=False) for _ in range(DEPTH))

    def mask(self, keep: Tensor | None, frames: int) -> Tensor | None:
        """Which keys [B, 1, 1, keys] count: those of frames kept, and the new ones."""
        if keep is None:
            return None
        return F.pad(keep, (0, frames), value=True).repeat_interleave(TOKENS, 1)[:, None, None]

    def forward(self, x: Tensor, t: Tensor, w2c: Tensor, keys: list[Tensor], values: list[Tensor], past_w2c: Tensor,
                keep: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x [B, C, F, H, W], t [B, F], w2c [B, F, 4, 4]; unrotated keys and values of N frames [B, N * tokens, heads, D] a layer, their
        cameras [B, N, 4, 4], keep bool [B, N]. Returns the velocity, and the chunk's own unrotated keys and its values."""
        frames, past = x.shape[2], past_w2c.shape[1]
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        e = self.time(t).repeat_interleave(TOKENS, 1)
        index = torch.arange(past + frames, device=x.device).repeat_interleave(TOKENS)
        mask, own = self.mask(keep, frames), ([], [])
        for block, pose, past_k, past_v in zip(self.blocks, self.pose, keys, values):
            place = lambda m, pose=pose: pose(m[:, :, :3].flatten(2)).repeat_interleave(TOKENS, 1)[:, :, None]

            def mix(q, k, v, past_k=past_k, past_v=past_v, place=place):
                own[0].append(k)
                own[1].append(v)
                k = torch.cat([past_k, k], 1) + torch.cat([place(past_w2c), place(w2c)], 1)
                k, v = rotary(k, index), torch.cat([past_v, v], 1)
                q = rotary(q + place(w2c), index[past * TOKENS:])
                return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=mask).transpose(1, 2)

            tokens = block(tokens, e, mix)
        return unpatchify(self.head(tokens), frames, ROWS, COLUMNS, CHANNELS, PATCH), *own


def turn(frames: int, first: int = 0) -> Tensor:
    """Cameras [1, frames, 4, 4] that turn by 10 degrees a frame."""
    angle = torch.arange(first, first + frames) * (torch.pi / 18)
    pose = torch.eye(4).repeat(frames, 1, 1)
    pose[:, 0, 0] = pose[:, 2, 2] = angle.cos()
    pose[:, 0, 2], pose[:, 2, 0] = -angle.sin(), angle.sin()
    return pose[None]


def inputs(frames: int) -> list:
    random = torch.Generator().manual_seed(frames)
    draw = lambda *size: torch.randn(*size, generator=random)
    cached = lambda: [draw(1, frames * TOKENS, HEADS, HEAD_DIM) for _ in range(DEPTH)]
    return [draw(1, CHANNELS, CHUNK, ROWS * PATCH, COLUMNS * PATCH), torch.full((1, CHUNK), 700.0), turn(CHUNK, frames), cached(), cached(),
            turn(frames)]

"""Our selection against the authors', at as many blocks, on queries, keys and values that a model made: ours is closer to dense attention.

The authors' rule, from a description of their released code (arXiv 2605.31158; block-sparse decode): tiles of 4 x 8 x 4 tokens, padded with
zeros that are neither masked in the softmax nor left out of the means; scores of means; text and the current chunk kept whole.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import upstream
from models import worldplay_rollout as reduced
from test_policy import left_right

from li_compile.kernels import sparse_attention
from li_compile.kernels.plan import CONTEXT, CURRENT, TEXT


def tiles(x: torch.Tensor, height: int, width: int, tile) -> tuple[torch.Tensor, torch.Tensor]:
    """[H, L, D] -> tiles [H, n, volume, D], zeros where there is no token, and the slot of each token."""
    heads, length, dim = x.shape
    sizes = (length // (height * width), height, width)
    grid = [-(-n // t) for n, t in zip(sizes, tile)]
    padded = F.pad(x.view(heads, *sizes, dim), (0, 0, *(v for n, g, t in reversed(list(zip(sizes, grid, tile))) for v in (0, g * t - n))))
    number = torch.arange(length).view(1, *sizes, 1) + 1
    number = F.pad(number, (0, 0, *(v for n, g, t in reversed(list(zip(sizes, grid, tile))) for v in (0, g * t - n))))

    def cut(y):
        y = y.unflatten(1, (grid[0], tile[0])).unflatten(3, (grid[1], tile[1])).unflatten(5, (grid[2], tile[2]))
        return y.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(y.shape[0], math.prod(grid), math.prod(tile), -1)

    slots = torch.empty(length, dtype=torch.long)
    flat = cut(number).flatten() - 1
    slots[flat[flat >= 0]] = (flat >= 0).nonzero()[:, 0]
    return cut(padded), slots


def authors(q, keys, values, height: int, width: int, tile, ratio: float) -> torch.Tensor:
    """q [H, L, D]; keys and values of text, context and current chunk."""
    volume = math.prod(tile)
    text = lambda x: F.pad(x, (0, 0, 0, -x.shape[1] % volume)).unflatten(1, (-1, volume))
    queries, slots = tiles(q, height, width, tile)
    k, v = ([text(xs[0]), *(tiles(x, height, width, tile)[0] for x in xs[1:])] for xs in (keys, values))
    history, count = k[1].shape[1], math.floor(ratio * k[1].shape[1])
    scores = queries.mean(2) @ k[1].mean(2).transpose(1, 2) * q.shape[-1] ** -0.5
    chosen = scores.topk(count, -1).indices
    blocks_k, blocks_v = torch.cat(k, 1), torch.cat(v, 1)
    always = torch.tensor([*range(k[0].shape[1]), *range(k[0].shape[1] + history, blocks_k.shape[1])])
    out = torch.empty_like(queries)
    for head in range(q.shape[0]):
        for block in range(queries.shape[1]):
            picked = torch.cat((always, chosen[head, block] + k[0].shape[1]))
            pick = lambda x: x[head, picked].flatten(0, 1)
            out[head, block] = F.scaled_dot_product_attention(queries[head, block, None], pick(blocks_k)[None], pick(blocks_v)[None])[0]
    return out.flatten(1, 2)[:, slots]


def recorded(model, chunks_of_context: int, given: dict, dtype=torch.float32):
    """(q, keys and values of all three segments) of the last block's attention in a denoising step, [2 * H, L, D] each."""
    calls = []
    attention = F.scaled_dot_product_attention

    def record(q, k, v, **more):
        calls.append((q, k, v))
        return attention(q, k, v, **more)

    frames = 4 * chunks_of_context
    pick = lambda at: dict(
        hidden_states=torch.cat([given[n][:, :, at] for n in ("latents", "cond_latents")], 1).to(dtype), **{n: given[n][:, at].to(dtype) for n in ("viewmats", "Ks", "action")})
    rope = lambda count, start: dict(rope_temporal_size=start + count, start_rope_start_idx=start)
    vision = dict(bi_inference=False, ar_txt_inference=False, ar_vision_inference=True, timestep_r=None, mask_type="i2v", return_dict=False)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        text = model(bi_inference=False, ar_txt_inference=True, ar_vision_inference=False, text_states=given["prompt_embeds"], mask_type="i2v",
                     encoder_attention_mask=given["prompt_mask"], timestep_txt=torch.zeros(1), vision_states=given["vision_states"], kv_cache=[],
                     cache_txt=True, extra_kwargs=given["extra_kwargs"])
        history, current = torch.arange(frames), torch.arange(frames, frames + 4)
        cache = model(kv_cache=text, timestep=torch.full((frames,), 14.0), cache_vision=True, **pick(history), **rope(frames, 0), **vision)
        patched.setattr(F, "scaled_dot_product_attention", record)
        model(kv_cache=cache, timestep=torch.full((4,), 833.3), cache_vision=False, **pick(current), **rope(4, frames), **vision)
    q, k, v = calls[-1]
    lengths = [k.shape[2] - cache[-1]["k_vision"].shape[2] - q.shape[2], cache[-1]["k_vision"].shape[2], q.shape[2]]
    return q.flatten(0, 1), *([part.flatten(0, 1) for part in x.split(lengths, 2)] for x in (k, v))


CASES = {
    "reduced": ((5, 6), (4, 4, 4), 64, 1),
    "upstream, tiny": ((5, 6), (4, 4, 4), 64, 1),
    "upstream, full width": ((30, 52), (4, 8, 4), 128, 16),
}


@pytest.fixture(params=["reduced", *(pytest.param(n, marks=(upstream.needs_upstream, *([pytest.mark.slow] if "full" in n else []))) for n in list(CASES)[1:])])
def case(request, monkeypatch):
    """((q, k, v) of a few heads, grid, tile, block size)"""
    grid, tile, block, every = CASES[request.param]
    if request.param == "reduced":
        size = dict(height=grid[0], width=grid[1])
        model = reduced.pipeline(monkeypatch, 3, **size).transformer
        given = reduced.inputs(3, left_right(), grid=grid)
    else:
        full = "full" in request.param
        torch.manual_seed(0)
        model = upstream.transformer(**(upstream.FULL | {"mm_double_blocks_depth": 2} if full else {}))
        given = reduced.inputs(3, left_right(), *((32, grid, upstream.FULL_WIDTHS) if full else (8, grid, upstream.WIDTHS)))
    q, k, v = recorded(model, 1 if "full" in request.param else 2, given)
    heads = slice(0, None, max(q.shape[0] // 4, 1) if every > 1 else 1)
    return (q[heads], [x[heads] for x in k], [x[heads] for x in v]), grid, tile, block


@pytest.mark.parametrize("ratio", [0.175, 0.4])
def test_at_as_many_blocks_ours_is_closer_to_dense(case, ratio):
    (q, k, v), grid, tile, block = case
    dense = F.scaled_dot_product_attention(q[None], torch.cat(k, 1)[None], torch.cat(v, 1)[None])[0]
    theirs = authors(q, k, v, *grid, tile, ratio)
    # As many blocks of history as theirs, which has more of them to choose from, since it pads.
    area = math.prod(-(-n // t) for n, t in zip((k[1].shape[1] // math.prod(grid), *grid), tile))
    own = -(-k[1].shape[1] // block)
    same = (math.floor(ratio * area) + 0.5) / own
    scale, roles = q.shape[-1] ** -0.5, [TEXT, CONTEXT, CURRENT]
    ours = sparse_attention(q[None], [x[None] for x in k], [x[None] for x in v], roles, *grid, list(tile), block, same, 1.0, 4, scale)[0]
    distance = lambda x: ((x - dense).norm() / dense.norm()).item()
    assert own < area
    assert distance(ours) < distance(theirs), f"{distance(ours):.2e}, theirs {distance(theirs):.2e}"

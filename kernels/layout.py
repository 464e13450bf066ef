"""Token order and blocks: how a ``T x H x W`` grid of video tokens becomes a list of equal blocks.

The paper (arXiv 2605.31158, 3-D block-sparse attention) pads every space-time tile to a whole block, which costs 11 to
24 % of the kernel's FLOPs on the models it treats and lets the padding into the softmax. Here tiles are cut off at the
grid's edges instead, their tokens are listed one tile after the other, and the list is cut every ``block_size`` tokens,
so only the last block of a segment is partial. Tiles follow each other as an ox ploughs (serpentine): where a block
holds the end of one tile and the start of the next, the two are neighbours in space or time.

The order of a grid is a prefix of the order of any longer one with whole time tiles, so history may be appended to.

Index tensors are made on the device they are for, without host synchronisation, and cached, in memory that is no CUDA
graph's. What is first asked for while one is being captured is not kept, because memory made in a capture belongs to the graph.
"""

from __future__ import annotations

import functools
import math
import threading

import torch
from torch.utils._pytree import tree_map_only

from ._compat import real_tensors, untraced

__all__ = ["block_coordinates", "block_valid", "cached", "forced_counts", "forced_mask", "laid_out", "neighbour_mask", "num_blocks", "row_places", "tile_order"]

Tile = tuple[int, int, int]


def num_blocks(length: int, block_size: int) -> int:
    """Blocks that ``length`` tokens fill, the last one perhaps partly. Works with SymInts."""
    return (length + block_size - 1) // block_size


def tile_order(frames: int, height: int, width: int, tile: Tile = (4, 4, 4), device="cpu") -> torch.Tensor:
    """The serpentine-over-tiles order of a token grid.

    Args:
        frames, height, width: the grid, in tokens; raster (T, H, W) order is what the model uses.
        tile: tokens of a tile along (T, H, W); tiles at the far edges are truncated.

    Returns:
        int64 ``[frames * height * width]``: entry i is the raster index of the i-th token in block order, so
        ``x[..., order, :]`` brings tokens into block order. Shared and cached: don't write to it.

    Raises:
        ValueError: a size below 1.
    """
    return cached(_tile_order, device, frames, height, width, tuple(tile))


def row_places(frames: int, height: int, width: int, tile: Tile, block_size: int, device="cpu") -> torch.Tensor:
    """Where each row of whole blocks goes in raster order, -1 for padding: int32 ``[num_blocks * block_size]``.

    :func:`tile_order` with its tail: ``y[places[i]] = x[i]`` undoes ``x = y[order]``.
    """
    return cached(_row_places, device, frames, height, width, tuple(tile), block_size)


def block_valid(length: int, block_size: int, device="cpu") -> torch.Tensor:
    """True tokens of each block of a segment of ``length`` tokens: int32 ``[num_blocks]``; only the last is partial."""
    return cached(_block_valid, device, length, block_size)


def block_coordinates(frames: int, height: int, width: int, tile: Tile, block_size: int, device="cpu") -> torch.Tensor:
    """Mean tile coordinate (t, h, w) of each block's tokens: fp32 ``[num_blocks, 3]``, in tiles.

    Integers where a block is a tile; fractions where truncated tiles made a block straddle two.
    """
    return cached(_block_coordinates, device, frames, height, width, tuple(tile), block_size)


def neighbour_mask(frames: int, height: int, width: int, tile: Tile, block_size: int, device="cpu") -> torch.Tensor:
    """Blocks at Manhattan distance at most 1 from each other: bool ``[n, n]``, symmetric, true on the diagonal.

    The rule of the authors' prefill (method notes C.3): self and the six face neighbours, 7 at most where blocks are
    tiles. Distances are those of :func:`block_coordinates`.
    """
    return cached(_neighbour_mask, device, frames, height, width, tuple(tile), block_size)


def forced_mask(frames: int, height: int, width: int, tile: Tile, block_size: int, protected: int = 0, device="cpu") -> torch.Tensor:
    """What each query block keeps whatever it scores: :func:`neighbour_mask`, and every block that holds a token of the last
    ``protected`` frames. Bool ``[n, n]``, queries by keys."""
    return cached(_forced_mask, device, frames, height, width, tuple(tile), block_size, protected)


@functools.lru_cache(maxsize=64)
def forced_counts(frames: int, height: int, width: int, tile: Tile, block_size: int, protected: int = 0) -> tuple[tuple[int, ...], int]:
    """(row sums of :func:`forced_mask`, how many blocks hold protected tokens) as Python integers, computed on the CPU."""
    counts = forced_mask(frames, height, width, tuple(tile), block_size, protected, "cpu").sum(1).tolist()
    return tuple(counts), int(cached(_protected, "cpu", frames, height, width, tuple(tile), block_size, protected).sum())


def laid_out(out: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] as our operators lay their results out: [B, L, H, D] in memory."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


_made: dict[tuple, object] = {}
_captured: set[tuple] = set()  # in a CUDA graph, which reads them at every replay
_MOST = 1024  # a table more than this many starts the cache anew


def cached(make, device, *args):
    """``make(device, *args)``, made once for equal (hashable) arguments. Shared: don't write to it."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = (make, device, *args)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key in _made:
        if capturing:
            _captured.add(key)
        return _own(_made[key])
    if capturing:
        return make(device, *args)
    if len(_made) >= _MOST:
        for old in _made.keys() - _captured:
            del _made[old]
    with real_tensors():
        _made[key] = _elsewhere(make, device, *args) if device.type == "cuda" else make(device, *args)
    return _own(_made[key])


def _elsewhere(make, device, *args):
    """In a thread of its own: what a CUDA graph's rehearsal allocates in its thread belongs to the graph and is given to others again."""
    made, failed = [], []

    def run() -> None:
        try:
            with torch.cuda.device(device):
                made.append(make(device, *args))
                made.append(torch.cuda.current_stream().record_event())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="li_compile tables")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    torch.cuda.current_stream(device).wait_event(made[1])
    return made[0]


def _own(made):
    """In torch.export every use has a copy of its own: a tensor that it has seen in the branch of a condition, it takes for an attribute of
    that branch wherever else it comes up (2.11 to 2.14)."""
    if not torch.compiler.is_exporting():
        return made
    with untraced():
        return tree_map_only(torch.Tensor, torch.clone, made)


def _tile_grid(device, frames, height, width, tile):
    """Per raster token: its tile (t, h, w), int64 [tokens] each, and its offset within the tile."""
    if min(frames, height, width, *tile) < 1:
        raise ValueError(f"A token grid and its tiles need sizes of at least 1; found grid {(frames, height, width)} with tile {tile}.")
    index = torch.arange(frames * height * width, device=device)
    position = (index // (height * width), index // width % height, index % width)
    tiles = [p // size for p, size in zip(position, tile)]
    within = [p % size for p, size in zip(position, tile)]
    return tiles, (within[0] * tile[1] + within[1]) * tile[2] + within[2]


def _tile_order(device, frames, height, width, tile):
    (t, h, w), offset = _tile_grid(device, frames, height, width, tile)
    rows, columns = math.ceil(height / tile[1]), math.ceil(width / tile[2])
    row = t * rows + torch.where(t % 2 == 0, h, rows - 1 - h)  # odd time slabs are walked upwards
    rank = row * columns + torch.where(row % 2 == 0, w, columns - 1 - w)  # odd rows from right to left
    return torch.argsort(rank * math.prod(tile) + offset)  # keys are unique


def _row_places(device, frames, height, width, tile, block_size):
    order = _tile_order(device, frames, height, width, tile)
    places = torch.full((num_blocks(order.numel(), block_size) * block_size,), -1, dtype=torch.int32, device=device)
    places[: order.numel()] = order
    return places


def _block_valid(device, length, block_size):
    if length < 0 or block_size < 1:
        raise ValueError(f"A segment needs a length of at least 0 and a block size of at least 1; found {length} and {block_size}.")
    first = torch.arange(num_blocks(length, block_size), device=device, dtype=torch.int32) * block_size
    return (length - first).clamp(max=block_size)


def _block_coordinates(device, frames, height, width, tile, block_size):
    tiles, _ = _tile_grid(device, frames, height, width, tile)
    order = _tile_order(device, frames, height, width, tile)
    n = num_blocks(order.numel(), block_size)
    tokens = torch.stack(tiles, 1)[order]
    padded = torch.zeros(n * block_size, 3, dtype=torch.int64, device=device)
    padded[: order.numel()] = tokens
    return padded.view(n, block_size, 3).sum(1).float() / _block_valid(device, order.numel(), block_size)[:, None]


def _forced_mask(device, frames, height, width, tile, block_size, protected):
    return _neighbour_mask(device, frames, height, width, tile, block_size) | _protected(device, frames, height, width, tile, block_size, protected)


def _protected(device, frames, height, width, tile, block_size, protected):
    """Blocks with a token of the last frames: bool [n]."""
    late = _tile_order(device, frames, height, width, tile) // (height * width) >= frames - protected
    blocks = num_blocks(late.numel(), block_size)
    return torch.cat([late, late.new_zeros(blocks * block_size - late.numel())]).view(blocks, block_size).any(1)


def _neighbour_mask(device, frames, height, width, tile, block_size):
    at = _block_coordinates(device, frames, height, width, tile, block_size)
    distance = (at[:, None] - at[None]).abs().sum(-1)
    return distance <= 1 + 1e-4  # means of straddling blocks are rounded

"""Token order: a permutation, tile by tile, neighbours side by side, the same for a longer grid."""

import itertools

import pytest
import torch

from li_compile.kernels.layout import block_coordinates, block_valid, forced_counts, forced_mask, neighbour_mask, num_blocks, row_places, tile_order

GRIDS = [((8, 12, 16), (4, 4, 4)), ((4, 30, 52), (4, 8, 4)), ((5, 7, 9), (4, 4, 4)), ((1, 1, 1), (4, 4, 4)), ((3, 22, 40), (4, 4, 8))]


def brute_order(grid, tile):
    """Walk the tiles as an ox ploughs, and the tokens of each in raster order."""
    frames, height, width = grid
    tiles = [range(-(-n // t)) for n, t in zip(grid, tile)]
    order, row = [], 0
    for t in tiles[0]:
        for h in tiles[1] if t % 2 == 0 else reversed(tiles[1]):
            # Direction follows the count of rows walked so far in a grid whose time slabs have equally many rows.
            for w in tiles[2] if row % 2 == 0 else reversed(tiles[2]):
                spans = (range(i * s, min(i * s + s, n)) for i, s, n in zip((t, h, w), tile, grid))
                order += [(a * height + b) * width + c for a, b, c in itertools.product(*spans)]
            row += 1
    return order


@pytest.mark.parametrize("grid,tile", GRIDS, ids=str)
def test_order(grid, tile):
    assert tile_order(*grid, tile).tolist() == brute_order(grid, tile)


@pytest.mark.parametrize("grid,tile", GRIDS, ids=str)
def test_round_trip_is_bit_exact(grid, tile):
    x = torch.randn(2, grid[0] * grid[1] * grid[2], 3)
    places = row_places(*grid, tile, 16).long()
    assert places.numel() % 16 == 0 and (places[x.shape[1] :] == -1).all()
    back = torch.empty_like(x)
    back[:, places[: x.shape[1]]] = x[:, tile_order(*grid, tile)]
    assert torch.equal(back, x)


def test_longer_grids_begin_the_same():
    short, long = tile_order(4, 30, 52, (4, 8, 4)), tile_order(20, 30, 52, (4, 8, 4))
    assert torch.equal(short, long[: short.numel()])


def test_consecutive_tiles_touch():
    at = block_coordinates(8, 12, 16, (4, 4, 4), 64)
    assert ((at[1:] - at[:-1]).abs().sum(1) == 1).all()


def test_valid_counts():
    assert block_valid(130, 64).tolist() == [64, 64, 2] and block_valid(130, 64).dtype == torch.int32
    assert block_valid(128, 64).tolist() == [64, 64]
    assert num_blocks(4 * 30 * 52, 128) == 49  # 52 if every tile were padded


def test_neighbours_of_whole_tiles():
    near = neighbour_mask(12, 12, 16, (4, 4, 4), 64)
    assert torch.equal(near, near.T) and near.diagonal().all()
    middle = next(i for i, c in enumerate(block_coordinates(12, 12, 16, (4, 4, 4), 64).tolist()) if c == [1, 1, 1])
    assert near[middle].sum() == 7
    assert torch.equal(forced_mask(12, 12, 16, (4, 4, 4), 64), near)
    assert forced_counts(12, 12, 16, (4, 4, 4), 64) == (tuple(near.sum(1).tolist()), 0)


@pytest.mark.parametrize("protected", [1, 4, 7])
@pytest.mark.parametrize("grid", [(9, 5, 7), (12, 12, 16)], ids=str)
def test_blocks_with_a_token_of_the_last_frames_are_forced_on_all(grid, protected):
    """And no other on top of the neighbours, whatever tiles the frames' border cuts."""
    tile, size = (4, 4, 4), 64
    late = {i // size for i, token in enumerate(tile_order(*grid, tile).tolist()) if token // (grid[1] * grid[2]) >= grid[0] - protected}
    want = neighbour_mask(*grid, tile, size).clone()
    want[:, sorted(late)] = True
    assert torch.equal(forced_mask(*grid, tile, size, protected), want)
    assert forced_counts(*grid, tile, size, protected) == (tuple(want.sum(1).tolist()), len(late))


def test_straddling_blocks_have_mean_coordinates():
    grid, tile, size = (4, 6, 6), (4, 4, 4), 64
    order, at = tile_order(*grid, tile), block_coordinates(*grid, tile, size)
    tokens = order[size : 2 * size]
    expected = torch.stack([tokens // 36 // 4, tokens // 6 % 6 // 4, tokens % 6 // 4], 1).float().mean(0)
    torch.testing.assert_close(at[1], expected)


def test_usable_after_a_tracing_or_inference_call():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tile_order(3, 5, 7, (2, 2, 2))
    with torch.inference_mode():
        tile_order(3, 5, 9, (2, 2, 2))
    for width in (7, 9):
        order = tile_order(3, 5, width, (2, 2, 2))
        assert type(order) is torch.Tensor and not order.is_inference()


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        tile_order(0, 4, 4)

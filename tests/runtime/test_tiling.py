"""Tiles of a plane, and what is made of them joined again; diffusers' own are in `test_tiles_against_diffusers`."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsdiff_runtime.tiling import Seams, tiles

SIZES = st.integers(1, 40)
SIDES = st.integers(4, 16).flatmap(lambda side: st.tuples(st.just(side), st.integers(1, side // 2)))


def joined(plane: np.ndarray, side: int, overlap: int, scale: int) -> np.ndarray:
    """(..., h, w) -> (..., h scale, w scale), each tile enlarged by itself."""
    found = np.full((*plane.shape[:-2], plane.shape[-2] * scale, plane.shape[-1] * scale), np.nan, plane.dtype)
    seams = Seams()
    for tile in tiles(*plane.shape[-2:], side, overlap):
        made = plane[..., tile.height, tile.width].repeat(scale, -2).repeat(scale, -1)
        high, wide = tile.settles(scale)
        assert np.isnan(found[..., high, wide]).all()  # nobody settled it before
        found[..., high, wide] = seams.settled(tile, made)
    return found


@given(SIZES, SIZES, SIDES, st.integers(1, 3))
def test_what_is_made_of_each_pixel_alone_is_made_whole(
    height: int, width: int, sides: tuple[int, int], scale: int
) -> None:
    """Every pixel is settled once, and the shares of neighbours add up to one."""
    plane = np.random.default_rng(0).standard_normal((2, height, width))
    np.testing.assert_allclose(joined(plane, *sides, scale), plane.repeat(scale, 1).repeat(scale, 2), atol=1e-12)
    np.testing.assert_allclose(joined(np.ones((1, height, width)), *sides, scale), 1, atol=1e-15)


@given(SIZES, SIZES, SIDES, st.integers(1, 3), st.integers(0, 99))
def test_a_patch_is_blended_as_a_pixel_is(
    height: int, width: int, sides: tuple[int, int], patch: int, seed: int
) -> None:
    """What is made of tiles depends on the tile: here it is noise."""
    noise, pixels, patches = np.random.default_rng(seed), Seams(), Seams(patch)
    for tile in tiles(height, width, *sides):
        made = noise.standard_normal((1, *tile.size))
        small = pixels.settled(tile, made)
        large = patches.settled(tile, made.repeat(patch, 1).repeat(patch, 2))
        np.testing.assert_allclose(large, small.repeat(patch, 1).repeat(patch, 2), atol=1e-15)


@given(SIZES, SIZES, SIDES)
def test_tiles_are_no_larger_than_asked_and_overlap_as_asked(height: int, width: int, sides: tuple[int, int]) -> None:
    side, overlap = sides
    found = list(tiles(height, width, side, overlap))
    lengths = [part.stop - part.start for tile in found for part in (tile.height, tile.width)]
    assert min(lengths) >= 1
    assert max(lengths) <= side
    assert (len(found) == 1) == (max(height, width) <= side)
    for before, behind in pairwise(found):
        if behind.row == before.row:
            assert before.width.stop - behind.width.start == min(overlap, width - behind.width.start)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (8, [(0, 8)]),
        (9, [(0, 8), (6, 9)]),
        (14, [(0, 8), (6, 14), (12, 14)]),  # all of the last one lies in the one before: so it is in diffusers
        (20, [(0, 8), (6, 14), (12, 20), (18, 20)]),
    ],
)
def test_the_last_tile_ends_where_the_plane_does(size: int, expected: list[tuple[int, int]]) -> None:
    assert [(tile.width.start, tile.width.stop) for tile in tiles(1, size, 8, 2)] == expected


def test_a_tile_goes_over_into_the_next_in_equal_steps() -> None:
    seams = Seams()
    first, second = tiles(1, 10, 8, 3)
    np.testing.assert_array_equal(seams.settled(first, np.zeros((1, 8))), np.zeros((1, 5)))
    np.testing.assert_allclose(seams.settled(second, np.ones((1, 5))), [[0, 1 / 3, 2 / 3, 1, 1]])

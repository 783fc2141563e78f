"""Tiles: cores partition the image, halos are whole, and cutting and stitching lose nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.tiles import Box, TilePlan, cut, pad, plan_tiles, stitch

sides = st.integers(1, 700)
models = st.builds(
    ModelConfig,
    level=st.integers(1, 4),
    upsample=st.sampled_from(["deconv", "nearest", "bilinear"]),
    pad_multiple=st.sampled_from([16, 32, 64]),
)
cores = st.integers(1, 8)


def plan_for(model: ModelConfig, height: int, width: int, tile_px: int) -> TilePlan:
    return plan_tiles(
        height,
        width,
        tile_px=tile_px,
        stride=model.stride,
        halo_px=model.halo_px,
        pad_multiple=model.pad_multiple,
    )


@given(sides, sides, models, cores)
def test_cores_partition_the_image(height: int, width: int, model: ModelConfig, core: int) -> None:
    plan = plan_for(model, height, width, core * model.pad_multiple)
    covered = np.zeros((height, width), np.int32)
    for tile in plan.tiles:
        assert min(tile.core.height, tile.core.width) >= 1
        covered[tile.core.slices] += 1
    assert (covered == 1).all()
    assert 0 <= plan.padded_height - height < model.pad_multiple
    assert 0 <= plan.padded_width - width < model.pad_multiple


@given(sides, sides, models, cores)
def test_a_tile_reaches_its_halo_or_the_true_border(height: int, width: int, model: ModelConfig, core: int) -> None:
    plan, halo_px = plan_for(model, height, width, core * model.pad_multiple), model.halo_px
    for tile in plan.tiles:
        assert tile.outer.y0 == max(0, tile.core.y0 - halo_px)
        assert tile.outer.x0 == max(0, tile.core.x0 - halo_px)
        at_bottom, at_right = tile.core.y1 == height, tile.core.x1 == width
        assert tile.outer.y1 == (plan.padded_height if at_bottom else min(plan.padded_height, tile.core.y1 + halo_px))
        assert tile.outer.x1 == (plan.padded_width if at_right else min(plan.padded_width, tile.core.x1 + halo_px))


@given(sides, sides, models, cores)
def test_tiles_start_on_the_stride_grid_and_have_whole_strides(
    height: int, width: int, model: ModelConfig, core: int
) -> None:
    for tile in plan_for(model, height, width, core * model.pad_multiple).tiles:
        assert tile.outer.y0 % model.stride == 0
        assert tile.outer.x0 % model.stride == 0
        assert tile.shape[0] % model.stride == 0
        assert tile.shape[1] % model.stride == 0


@given(sides, sides, models, cores)
def test_no_tile_is_larger_than_one_in_the_middle(height: int, width: int, model: ModelConfig, core: int) -> None:
    tile_px = core * model.pad_multiple
    for tile in plan_for(model, height, width, tile_px).tiles:
        assert max(tile.shape) <= tile_px + 2 * model.halo_px


@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([0, 1, 3]), models, cores, st.integers(0, 2**32 - 1))
def test_stitching_what_was_cut_gives_the_image_back(
    height: int, width: int, channels: int, model: ModelConfig, core: int, seed: int
) -> None:
    shape = (height, width, channels) if channels else (height, width)
    image = np.random.default_rng(seed).integers(0, 65536, shape, dtype=np.uint16)
    plan = plan_for(model, height, width, core * model.pad_multiple)
    padded = pad(image, model.pad_multiple)
    assert padded.shape[:2] == (plan.padded_height, plan.padded_width)
    whole = stitch(plan, (cut(padded, tile)[tile.core_slices] for tile in plan.tiles))
    assert whole.dtype == image.dtype
    np.testing.assert_array_equal(whole, image)


@given(sides, sides, models, cores)
def test_an_image_up_to_one_core_is_one_tile(height: int, width: int, model: ModelConfig, core: int) -> None:
    tile_px = core * model.pad_multiple
    plan = plan_for(model, min(height, tile_px), min(width, tile_px), tile_px)
    assert len(plan.tiles) == 1
    assert plan.tiles[0].outer == Box(0, 0, plan.padded_height, plan.padded_width)


def test_a_cut_tile_sees_its_neighbours_pixels() -> None:
    model = ModelConfig(level=2)
    image = np.arange(300 * 200, dtype=np.int64).reshape(300, 200)
    plan = plan_for(model, 300, 200, 64)
    padded = pad(image, model.pad_multiple)
    tile = next(tile for tile in plan.tiles if tile.core.y0 == 64 and tile.core.x0 == 64)
    np.testing.assert_array_equal(cut(padded, tile), image[40:152, 40:152])
    np.testing.assert_array_equal(cut(padded, tile)[tile.core_slices], image[64:128, 64:128])


def test_padding_repeats_the_last_row_and_column() -> None:
    image = np.array([[1, 2], [3, 4]], np.uint8)
    padded = pad(image, 4)
    np.testing.assert_array_equal(padded, [[1, 2, 2, 2], [3, 4, 4, 4], [3, 4, 4, 4], [3, 4, 4, 4]])
    assert pad(padded, 4) is padded


def test_one_row_more_than_a_core_makes_no_sliver() -> None:
    plan = plan_for(ModelConfig(level=4), 513, 513, 512)
    assert [tile.shape for tile in plan.tiles] == [(528, 528)]


def test_cost_ratio_counts_halo_and_padding() -> None:
    level_4 = plan_for(ModelConfig(level=4), 512 * 40, 512 * 40, 512)
    assert level_4.computed_to_kept == pytest.approx((736 / 512) ** 2, rel=0.03)  # all but the clipped border tiles
    assert plan_for(ModelConfig(level=1), 256, 256, 512).computed_to_kept == 1.0
    assert plan_for(ModelConfig(level=1), 1, 1, 512).computed_to_kept == 256.0


def test_a_tile_side_off_the_padding_grid_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"tile_px is 48.*multiples of 32.*multiple of 32"):
        plan_for(ModelConfig(pad_multiple=32), 100, 100, 48)

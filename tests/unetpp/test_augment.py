"""Training crops: image and target move together, draws repeat, values stay in range."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import ndimage

from unetpp.augment import STAINS_SC, Foreground, View, augment, random_view
from unetpp.config import IGNORE, AugmentConfig

STILL = AugmentConfig(
    flip=False,
    rotate90=False,
    scale=(1, 1),
    gamma=(1, 1),
    brightness=(1, 1),
    noise_std=0,
    blur_sigma=0,
    channel_jitter=0,
)
BENDS = {"elastic_px": 8, "elastic_sigma_px": 12}
MOVES = {"flip": True, "rotate90": True, "rotate_degrees": 180, "scale": (0.6, 1.7), **BENDS}
GEOMETRIES = [{"flip": True}, {"rotate90": True}, {"rotate_degrees": 180}, {"scale": (0.6, 1.7)}, BENDS, MOVES]
WILD = AugmentConfig.model_validate(
    {
        **MOVES,
        "gamma": (0.2, 5),
        "brightness": (0.1, 10),
        "contrast": (0.2, 5),
        "noise_std": 1,
        "blur_sigma": 3,
        "invert": 0.5,
        "drop_colour": 0.5,
        "channel_jitter": 0.9,
        "stain_jitter": 0.9,
        "counterstain": 2,
    }
)


def still_but(**fields: object) -> AugmentConfig:
    return AugmentConfig.model_validate({**STILL.model_dump(), **fields})


def disks(height: int = 160, width: int = 140) -> np.ndarray:
    """A mask of some disks, 0 and 1."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for _ in range(max(1, height * width // 700)):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(6, 12)
        mask |= ((y - cy) ** 2 + (x - cx) ** 2 < radius**2).astype(np.uint8)
    return mask


def drawn(mask: np.ndarray, num_channels: int = 3) -> np.ndarray:
    """The image that shows a mask: light where it is not 0."""
    return np.repeat((mask[..., None] > 0).astype(np.float32), num_channels, axis=2)


def crop_of(
    image: np.ndarray,
    target: np.ndarray,
    config: AugmentConfig,
    seed: int,
    crop_px: int = 48,
    centre: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    view = random_view(target.shape, crop_px, config, rng, centre)
    return augment(view.cut(image), view.cut(target), view, config, rng)


def position(view: View) -> np.ndarray:
    """Row and column in the image of every pixel of a view that interpolates."""
    assert view.at_2HW is not None
    return view.at_2HW.astype(np.float64) + np.array([view.top, view.left])[:, None, None]


# ---------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("seed", range(5))
def test_nothing_asked_for_is_a_plain_crop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, target = rng.random((80, 60, 3), np.float32), rng.integers(0, 256, (80, 60), np.uint8)
    view = random_view(target.shape, 32, STILL, np.random.default_rng(seed))
    crop, crop_target = crop_of(image, target, STILL, seed, 32)
    assert np.array_equal(crop, image[view.top : view.top + 32, view.left : view.left + 32])
    assert np.array_equal(crop_target, target[view.top : view.top + 32, view.left : view.left + 32])
    assert not np.shares_memory(crop, image)
    assert not np.shares_memory(crop_target, target)


def test_flips_and_quarter_turns_move_pixels_without_changing_them() -> None:
    image = np.arange(32 * 32, dtype=np.float32).reshape(32, 32, 1) / 1024
    target = np.arange(32 * 32).reshape(32, 32).astype(np.uint8)
    seen = set()
    for seed in range(60):
        crop, crop_target = crop_of(image, target, still_but(flip=True, rotate90=True), seed, 32)
        assert np.array_equal(np.round(crop[..., 0] * 1024).astype(int) % 256, crop_target)
        assert np.array_equal(np.sort(crop, axis=None), image.ravel())
        seen.add(tuple(crop[[0, 0, -1], [0, -1, 0], 0]))
    assert len(seen) == 8  # all symmetries of the square


@pytest.mark.parametrize("geometry", GEOMETRIES, ids="+".join)
def test_image_and_target_move_together(geometry: dict[str, object]) -> None:
    target = disks()
    for seed in range(12):
        crop, crop_target = crop_of(drawn(target), target, still_but(**geometry), seed)
        assert crop.shape == (48, 48, 3)
        assert crop_target.shape == (48, 48)
        light = crop[..., 0] > 0.5
        assert (light & (crop_target > 0)).sum() > 0.94 * (light | (crop_target > 0)).sum() > 0


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    num_channels=st.sampled_from([1, 2, 3, 5, 64]),
    crop_px=st.sampled_from([16, 32, 48]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_view_reads_what_the_whole_image_mirrored_at_its_borders_has_there(
    height: int, width: int, num_channels: int, crop_px: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.random((height, width, num_channels), np.float32)
    target = rng.integers(0, 256, (height, width), np.uint8)
    config = still_but(rotate_degrees=180, scale=(0.5, 2), **BENDS)
    view = random_view(target.shape, crop_px, config, rng)
    crop, crop_target = augment(view.cut(image), view.cut(target), view, config, rng)
    at = position(view)
    for channel in {0, num_channels - 1}:
        expected = ndimage.map_coordinates(image[..., channel].astype(np.float64), at, order=1, mode="reflect")
        np.testing.assert_allclose(crop[..., channel], expected, atol=2e-4)
    between = np.abs(at % 1 - 0.5).min(0) < 1e-3  # where either neighbour is the nearest
    nearest = ndimage.map_coordinates(target, np.floor(at + 0.5), order=0, mode="reflect")
    assert np.array_equal(crop_target[~between], nearest[~between])


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (31, 33), (200, 200)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids="+".join)
def test_no_crop_has_dark_corners(size: tuple[int, int], geometry: dict[str, object]) -> None:
    for seed in range(5):
        crop, crop_target = crop_of(
            np.full((*size, 3), 0.75, np.float32), np.full(size, 7, np.uint8), still_but(**geometry), seed, 64
        )
        np.testing.assert_allclose(crop, np.full((64, 64, 3), 0.75), atol=1e-6)
        assert (crop_target == 7).all()


def test_a_crop_reads_no_more_of_a_huge_image_than_it_needs() -> None:
    size = (100_000, 100_000)
    image, target = np.broadcast_to(np.uint8(9), (*size, 3)), np.broadcast_to(np.uint8(1), size)
    for seed in range(20):
        view = random_view(size, 96, still_but(**MOVES), np.random.default_rng(seed))
        assert max(view.cut(image).shape[:2]) <= (96 * np.sqrt(2) + 2 * 8) / 0.6 + 3
        assert view.cut(target).shape == view.cut(image).shape[:2]


def test_a_turn_keeps_distances_and_a_zoom_divides_them() -> None:
    angles = []
    for seed in range(100):
        view = random_view((300, 300), 48, still_but(rotate_degrees=25, scale=(0.5, 0.5)), np.random.default_rng(seed))
        down, right = np.diff(position(view), axis=1), np.diff(position(view), axis=2)
        np.testing.assert_allclose(np.hypot(*down), 2, atol=1e-3)
        np.testing.assert_allclose(np.hypot(*right), 2, atol=1e-3)
        np.testing.assert_allclose((down[:, :, 1:] * right[:, 1:, :]).sum(0), 0, atol=1e-3)
        angles.append(np.rad2deg(np.arctan2(*right[:, 0, 0])))
    assert -25.1 < min(angles) < -20
    assert 20 < max(angles) < 25.1


def test_a_bend_displaces_no_pixel_further_than_asked_and_folds_nothing() -> None:
    longest = []
    for seed in range(60):
        config = still_but(elastic_px=6, elastic_sigma_px=12)
        view = random_view((96, 96), 96, config, np.random.default_rng(seed))
        moved = position(view) - np.mgrid[:96, :96]
        longest.append(np.hypot(*moved).max())
        (yy, yx), (xy, xx) = (np.gradient(axis) for axis in position(view))
        assert (yy * xx - yx * xy).min() > 0
        assert np.abs(np.diff(moved, axis=1)).max() < 1.5 * longest[-1] / 12  # smooth
    assert max(longest) < 6.001
    assert 2 < np.mean(longest) < 4
    assert max(longest) > 5


def test_crops_come_from_everywhere_in_the_image() -> None:
    for config in (STILL, still_but(scale=(0.8, 0.8))):
        corners = []
        for seed in range(300):
            view = random_view((70, 61), 48, config, np.random.default_rng(seed))
            assert view.top >= 0
            assert view.left >= 0
            assert view.top + view.height <= 70 + 1  # the pixel after the last one, with a weight of almost 0
            assert view.left + view.width <= 61 + 1
            corners.append((view.top, view.left))
        assert {0, round(70 - 48 / config.scale[0])} <= {top for top, _ in corners}
        assert {0, round(61 - 48 / config.scale[0])} <= {left for _, left in corners}


@pytest.mark.parametrize("geometry", [{}, *GEOMETRIES], ids="+".join)
def test_a_crop_lies_around_the_pixel_asked_for_as_far_as_the_borders_let_it(geometry: dict[str, object]) -> None:
    config = still_but(**geometry)
    for seed, centre in enumerate([(80, 70), (70, 90), (0, 0), (159, 139), (3, 137)]):
        target = np.zeros((160, 140), np.uint8)
        y, x = np.mgrid[:160, :140]
        target[np.hypot(y - centre[0], x - centre[1]) < 4] = 1
        _, crop_target = crop_of(drawn(target), target, config, seed, 48, centre)
        assert crop_target.any()
        if 58 <= centre[0] <= 102 and 50 <= centre[1] <= 90:
            found = np.argwhere(crop_target).mean(0)
            assert np.hypot(*(found - 23.5)) < 1.5 + (config.elastic_px and 8.5)


def test_values_to_be_ignored_stay_where_and_what_they_are() -> None:
    ignored = disks()
    target = np.where(ignored > 0, np.uint8(IGNORE), np.uint8(2))
    for seed in range(12):
        crop, crop_target = crop_of(drawn(ignored), target, still_but(**MOVES), seed)
        assert set(np.unique(crop_target)) <= {2, IGNORE}
        assert np.mean((crop[..., 0] > 0.5) != (crop_target == IGNORE)) < 0.02


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("num_channels", [1, 3, 6])
def test_equal_generators_give_equal_crops_and_others_do_not(num_channels: int) -> None:
    image = np.random.default_rng(0).random((80, 60, num_channels), np.float32)
    crops = [crop_of(image, disks(80, 60), WILD, seed) for seed in (3, 3, 4)]
    assert np.array_equal(crops[0][0], crops[1][0])
    assert np.array_equal(crops[0][1], crops[1][1])
    assert not np.array_equal(crops[0][0], crops[2][0])


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 64])
def test_values_stay_between_zero_and_one_and_finite(num_channels: int) -> None:
    image = np.random.default_rng(0).random((64, 64, num_channels), np.float32) * 3 - 1
    before = image.copy()
    for seed in range(20):
        crop, _ = crop_of(image, np.zeros((64, 64), np.uint8), WILD, seed)
        assert crop.shape == (48, 48, num_channels)
        assert crop.dtype == np.float32
        assert crop.flags.c_contiguous
        assert np.isfinite(crop).all()
        assert 0 <= crop.min() <= crop.max() <= 1
    assert np.array_equal(image, before)


def coloured(side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 0.8, (side, side, 3)).astype(np.float32)


def test_inverting_exchanges_dark_and_light() -> None:
    image, target = drawn(disks(32, 32)), disks(32, 32)
    inverted, same = crop_of(image, target, still_but(invert=1), 0, 32)
    np.testing.assert_allclose(inverted, 1 - image)
    assert np.array_equal(same, target)


def test_dropping_colour_makes_channels_equal() -> None:
    grey, _ = crop_of(coloured(), disks(32, 32), still_but(drop_colour=1), 0, 32)
    np.testing.assert_allclose(grey, np.repeat(coloured().mean(2, keepdims=True), 3, axis=2), rtol=1e-6)


def test_contrast_stretches_every_channel_about_its_mean() -> None:
    image = 0.5 + (coloured() - 0.5) / 3
    for seed in range(10):
        crop, _ = crop_of(image, disks(32, 32), still_but(contrast=(0.5, 2)), seed, 32)
        np.testing.assert_allclose(crop.mean((0, 1)), image.mean((0, 1)), atol=1e-5)
        factor = crop.std((0, 1)) / image.std((0, 1))
        assert np.ptp(factor) < 1e-4
        assert 0.5 <= factor[0] <= 2


def test_contrast_and_brightness_go_together() -> None:
    image = 0.4 + (coloured() - 0.5) / 5
    crop, _ = crop_of(image, disks(32, 32), still_but(contrast=(1.5, 1.5), brightness=(1.2, 1.2)), 0, 32)
    bright = image * 1.2
    np.testing.assert_allclose(crop, bright.mean((0, 1)) + 1.5 * (bright - bright.mean((0, 1))), atol=1e-5)


def test_stain_jitter_changes_the_amount_of_each_stain_and_nothing_else() -> None:
    """Before and after, in optical density, are an affine map apart whose directions are the stains'."""
    image = coloured()
    stains = STAINS_SC / np.linalg.norm(STAINS_SC, axis=1, keepdims=True)
    gains = []
    for seed in range(20):
        crop, _ = crop_of(image, disks(32, 32), still_but(stain_jitter=0.05), seed, 32)
        before, after = -np.log10(image.reshape(-1, 3)), -np.log10(crop.reshape(-1, 3))
        unclipped = (after > 1e-3).all(1)
        fitted, *_ = np.linalg.lstsq(np.c_[before, np.ones(len(before))][unclipped], after[unclipped], rcond=None)
        matrix, offset = fitted[:3], fitted[3]
        amounts = stains @ matrix @ np.linalg.inv(stains)
        np.testing.assert_allclose(amounts, np.diag(np.diag(amounts)), atol=1e-3)
        gains.append(np.diag(amounts) - 1)
        assert np.abs(offset @ np.linalg.inv(stains)).max() < 0.0501
    assert 0.04 < np.abs(gains).max() < 0.0501


def test_counterstain_lays_a_pattern_of_eosin_or_red_over_every_second_colour_crop() -> None:
    """What is added, in optical density, is one colour times an amount that differs from pixel to pixel."""
    image = coloured()
    added = []
    for seed in range(60):
        crop, _ = crop_of(image, disks(32, 32), still_but(counterstain=0.8), seed, 32)
        added.append(np.log10(image.reshape(-1, 3)) - np.log10(crop.reshape(-1, 3)))
        if added[-1].max() < 1e-6:
            continue
        red, green, blue = added[-1].sum(0) / np.linalg.norm(added[-1].sum(0))
        np.testing.assert_allclose(added[-1], np.outer(added[-1] @ (red, green, blue), (red, green, blue)), atol=1e-5)
        assert red < 0.08 < blue < 0.6 < green
        assert added[-1].min() > -1e-6
        assert added[-1][:, 1].max() < 0.8
        assert np.ptp(added[-1][:, 1]) > 0.02 * added[-1][:, 1].max()
    most = np.array([each.max() for each in added])
    assert 20 < (most > 1e-6).sum() < 40
    assert most.max() > 0.6


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_changes_of_stains_leave_grey_crops_and_other_images_as_they_are(num_channels: int) -> None:
    rng = np.random.default_rng(0)
    grey = np.repeat(rng.random((32, 32, 1), np.float32), num_channels, axis=2)
    almost = np.clip(grey + rng.uniform(-0.01, 0.01, grey.shape), 0, 1).astype(np.float32)
    for image in (grey, almost):
        for seed in range(4):
            crop, _ = crop_of(image, disks(32, 32), still_but(stain_jitter=0.5, counterstain=1), seed, 32)
            assert np.array_equal(crop, image)


def test_values_change_without_moving_the_target() -> None:
    target = disks(48, 48)
    image = 0.3 + 0.4 * drawn(target)
    values = {name: getattr(WILD, name) for name in AugmentConfig.model_fields.keys() - MOVES.keys()}
    for seed in range(5):
        crop, crop_target = crop_of(image, target, still_but(**values), seed)
        assert np.array_equal(crop_target, target)
        assert not np.array_equal(crop, image)


# -------------------------------------------------------------------------------------------- foreground


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_a_foreground_pixel_is_one_of_those_there_are(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (height, width), p=[0.6, 0.1, 0.1, 0.2])
    there = {(int(y), int(x)) for y, x in np.argwhere((target == 1) | (target == 2))}
    found = {Foreground(target).pixel(rng) for _ in range(20)}
    assert found <= there if there else found == {None}


def test_foreground_pixels_are_equally_likely() -> None:
    target = np.zeros((5, 40), np.uint8)
    target[1, :30], target[3, 7], target[4, 38:] = 1, 2, 1
    rng, foreground = np.random.default_rng(0), Foreground(target)
    counts = np.zeros_like(target, dtype=int)
    for _ in range(33 * 200):
        counts[foreground.pixel(rng)] += 1
    assert (counts[target == 0] == 0).all()
    assert 140 < counts[target > 0].min() < counts[target > 0].max() < 260


# ------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (1.2, 0.8)}, r"scale: saw \[1.2, 0.8\], wanted two factors above 0, the smaller one first"),
        ({"contrast": (0, 1)}, r"contrast: saw \[0.0, 1.0\]"),
        ({"elastic_px": 9, "elastic_sigma_px": 8}, "elastic_px 9.0 must be at most elastic_sigma_px 8.0"),
        ({"rotate_degrees": 181}, "less than or equal to 180"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AugmentConfig.model_validate(fields)

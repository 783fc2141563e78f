"""Training crops: image and target move together, draws repeat, values stay in range."""

import numpy as np
import pytest

from unetpp.augment import augment, random_window
from unetpp.config import AugmentConfig

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


def pair(height: int = 80, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """An image whose three channels are its target, as far as a smooth image can be: disks of light."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    target = np.zeros((height, width), np.uint8)
    for _ in range(6):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        target |= ((y - cy) ** 2 + (x - cx) ** 2 < 12**2).astype(np.uint8)
    return np.repeat(target[..., None], 3, axis=2).astype(np.float32), target


def test_nothing_asked_for_is_a_plain_crop() -> None:
    image, target = pair()
    window, cut = random_window(image, target, 32, STILL, np.random.default_rng(0))
    crop, crop_target = augment(window, cut, 32, STILL, np.random.default_rng(1))
    assert np.array_equal(crop, window)
    assert np.array_equal(crop_target, cut)


@pytest.mark.parametrize("seed", range(12))
def test_image_and_target_move_together(seed: int) -> None:
    image, target = pair()
    moving = STILL.model_copy(update={"flip": True, "rotate90": True, "scale": (0.6, 1.7)})
    rng = np.random.default_rng(seed)
    crop, crop_target = augment(*random_window(image, target, 48, moving, rng), 48, moving, rng)
    assert crop.shape == (48, 48, 3)
    assert crop_target.shape == (48, 48)
    assert np.mean((crop[..., 0] > 0.5) != crop_target) < 0.04


def test_equal_generators_give_equal_crops_and_others_do_not() -> None:
    image, target = pair()
    config = AugmentConfig(invert=0.5, drop_colour=0.5)

    def crop(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return augment(*random_window(image, target, 48, config, rng), 48, config, rng)[0]

    assert np.array_equal(crop(3), crop(3))
    assert not np.array_equal(crop(3), crop(4))


@pytest.mark.parametrize("size", [(1, 1), (5, 90), (31, 33)])
def test_small_images_are_mirrored_up_to_the_crop(size: tuple[int, int]) -> None:
    image, target = pair(*size)
    config = AugmentConfig(scale=(0.5, 2.0))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        crop, crop_target = augment(*random_window(image, target, 64, config, rng), 64, config, rng)
        assert crop.shape == (64, 64, 3)
        assert crop_target.shape == (64, 64)
        assert set(np.unique(crop_target)) <= set(np.unique(target))


def test_values_stay_between_zero_and_one_and_finite() -> None:
    image = np.random.default_rng(0).random((64, 64, 3), np.float32)
    wild = AugmentConfig(
        gamma=(0.2, 5), brightness=(0.1, 10), noise_std=1, blur_sigma=3, invert=0.5, channel_jitter=0.9
    )
    for seed in range(20):
        crop, _ = augment(image, np.zeros((64, 64), np.uint8), 64, wild, np.random.default_rng(seed))
        assert crop.dtype == np.float32
        assert np.isfinite(crop).all()
        assert 0 <= crop.min() <= crop.max() <= 1


def test_inverting_exchanges_dark_and_light() -> None:
    image, target = pair(32, 32)
    inverted, same = augment(image, target, 32, STILL.model_copy(update={"invert": 1.0}), np.random.default_rng(0))
    np.testing.assert_allclose(inverted, 1 - image)
    assert np.array_equal(same, target)


def test_dropping_colour_makes_channels_equal() -> None:
    image = np.random.default_rng(0).random((32, 32, 3), np.float32)
    grey, _ = augment(
        image, np.zeros((32, 32), np.uint8), 32, STILL.model_copy(update={"drop_colour": 1.0}), np.random.default_rng(0)
    )
    np.testing.assert_allclose(grey, np.repeat(image.mean(2, keepdims=True), 3, axis=2), rtol=1e-6)

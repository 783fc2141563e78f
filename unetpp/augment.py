"""Random training crops: what moves image and target together, and what changes the image's values alone.

Every draw comes from the generator that is passed in: equal generators give equal crops.
"""

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from unetpp.config import AugmentConfig

PixelT = TypeVar("PixelT", bound=np.generic)
Image = NDArray[np.float32]
Target = NDArray[np.uint8]


def random_window(
    image_HWC: NDArray[PixelT], target_HW: Target, crop_px: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[NDArray[PixelT], Target]:
    """A random square of the pair, as large as a crop of `crop_px` is before its zoom; any pixel type.

    Where the image is smaller than that, it is mirrored at its borders.
    """
    window_px = max(1, round(crop_px / log_uniform(config.scale, rng)))
    missing = [max(0, window_px - side) for side in target_HW.shape]
    if any(missing):
        margins = [(side // 2, side - side // 2) for side in missing]
        image_HWC = np.pad(image_HWC, [*margins, (0, 0)], mode="symmetric")
        target_HW = np.pad(target_HW, margins, mode="symmetric")
    y, x = (int(rng.integers(0, side - window_px + 1)) for side in target_HW.shape)
    return image_HWC[y : y + window_px, x : x + window_px], target_HW[y : y + window_px, x : x + window_px]


def augment(
    image_HWC: Image, target_HW: Target, crop_px: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Image, Target]:
    """A window zoomed to `crop_px`, flipped, turned and changed in its values as `config` says.

    `image_HWC` is float32, its value range in 0..1. Returns new arrays, float32 HWC in 0..1 and uint8 HW.
    """
    if image_HWC.shape[0] != crop_px:
        image_HWC, target_HW = _zoom(image_HWC, target_HW, crop_px)
    image_HWC, target_HW = _flip_and_turn(image_HWC, target_HW, config, rng)
    return _change_values(image_HWC, config, rng), np.ascontiguousarray(target_HW)


def log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """A factor whose logarithm is uniform: x and 1/x are equally likely where the bounds are reciprocal."""
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def _zoom(image_HWC: Image, target_HW: Target, crop_px: int) -> tuple[Image, Target]:
    image_1CHW = torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)[None]
    target_11HW = torch.from_numpy(np.ascontiguousarray(target_HW))[None, None]
    zoomed_1CHW = F.interpolate(image_1CHW, (crop_px, crop_px), mode="bilinear", align_corners=False)
    target_11HW = F.interpolate(target_11HW, (crop_px, crop_px), mode="nearest-exact")
    return zoomed_1CHW[0].permute(1, 2, 0).numpy(), target_11HW[0, 0].numpy()


def _flip_and_turn(
    image_HWC: Image, target_HW: Target, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Image, Target]:
    if config.flip:
        for axis in (0, 1):
            if rng.random() < 0.5:
                image_HWC, target_HW = np.flip(image_HWC, axis), np.flip(target_HW, axis)
    if config.rotate90:
        turns = int(rng.integers(4))
        image_HWC, target_HW = np.rot90(image_HWC, turns), np.rot90(target_HW, turns)
    return image_HWC, target_HW


def _change_values(image_HWC: Image, config: AugmentConfig, rng: np.random.Generator) -> Image:
    image_HWC = np.clip(image_HWC, 0.0, 1.0)
    if rng.random() < config.invert:
        image_HWC = 1.0 - image_HWC
    if rng.random() < config.drop_colour:
        image_HWC = np.broadcast_to(image_HWC.mean(2, keepdims=True), image_HWC.shape)
    image_HWC = image_HWC ** np.float32(log_uniform(config.gamma, rng))
    gain_C = rng.uniform(1 - config.channel_jitter, 1 + config.channel_jitter, image_HWC.shape[2])
    image_HWC = image_HWC * np.asarray(gain_C * log_uniform(config.brightness, rng), np.float32)
    if config.blur_sigma > 0 and rng.random() < 0.25:
        sigma = rng.uniform(0, config.blur_sigma)
        image_HWC = ndimage.gaussian_filter(image_HWC, (sigma, sigma, 0))
    if config.noise_std > 0 and rng.random() < 0.5:
        noise_HWC = rng.standard_normal(image_HWC.shape, dtype=np.float32)
        image_HWC = image_HWC + noise_HWC * np.float32(rng.uniform(0, config.noise_std))
    return np.ascontiguousarray(np.clip(image_HWC, 0.0, 1.0), dtype=np.float32)

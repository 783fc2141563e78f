"""Random training crops: what moves image and target together, and what changes the image's values alone.

A `View` says which pixels of an image one crop reads. Zoom, rotation and the elastic field are one map from the crop to
the image, so that the image is interpolated once; a view that needs none of them copies pixels as they are.
Every draw comes from the generator that is passed in, in a fixed order: equal generators give equal crops.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage, special

from unetpp.config import IGNORE, AugmentConfig

PixelT = TypeVar("PixelT", bound=np.generic)
Image = NDArray[np.float32]
Target = NDArray[np.uint8]
Point = NDArray[np.float64]

STAINS_SC = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities in red, green and blue of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""

GREY = 0.02
"""A crop whose channels differ by less than this, on average over its pixels and in values 0..1, is grey."""

PATTERN_SIGMAS_PX = (3.0, 6.0, 12.0, 24.0)
"""How smooth a pattern of counterstain may be: deviation of the Gaussian that its noise is like, pixels of the crop."""

DARKEST = 1e-3
"""The value that stands for 0 where a logarithm is taken."""


@dataclass(frozen=True, slots=True)
class View:
    """Where one crop lies in its image: the window that is read, and how the crop is taken from it.

    The window may reach beyond the image, which is then mirrored at its borders, the border pixel included.
    """

    top: int
    left: int
    height: int
    width: int
    flips: tuple[bool, bool]
    turns: int
    at_2HW: Image | None
    """Row and column in the window that every pixel of the crop reads; None: the window is the crop."""

    def cut(self, array: NDArray[PixelT]) -> NDArray[PixelT]:
        """The window of an HWC or HW array of any type: a part of `array` itself, or a mirrored copy."""
        rows = _pixels(self.top, self.height, array.shape[0])
        columns = _pixels(self.left, self.width, array.shape[1])
        return array[rows][:, columns] if isinstance(rows, slice) else array[:, columns][rows]  # slices first

    def sample(self, window_HWC: Image, window_HW: Target) -> tuple[Image, Target]:
        """The crop of a cut pair, new arrays: `image_CHW` interpolated bilinearly, `target_HW` by the nearest pixel."""
        if self.at_2HW is None:
            image_CHW = np.moveaxis(window_HWC, 2, 0)
            return np.array(self._turned(image_CHW), order="C"), np.array(self._turned(window_HW), order="C")
        y_HW, x_HW = self._turned(self.at_2HW)
        nearest_HW = (y_HW + np.float32(0.5)).astype(np.intp) * self.width + (x_HW + np.float32(0.5)).astype(np.intp)
        # grid_sample counts from -1 to 1 between the outer borders of the window, x first
        grid_1HW2 = np.empty((1, *y_HW.shape, 2), np.float32)
        for axis, (at_HW, side) in enumerate(((x_HW, self.width), (y_HW, self.height))):
            grid_1HW2[0, ..., axis] = at_HW * np.float32(2 / side) + np.float32(1 / side - 1)
        image_1CHW = F.grid_sample(
            torch.from_numpy(window_HWC).permute(2, 0, 1)[None],
            torch.from_numpy(grid_1HW2),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return image_1CHW[0].numpy(), window_HW.ravel().take(nearest_HW)

    def _turned(self, array: NDArray[PixelT]) -> NDArray[PixelT]:
        """Flips and quarter turns of the last two axes, as a view."""
        for axis, flip in zip((-2, -1), self.flips, strict=True):
            array = np.flip(array, axis) if flip else array
        return np.rot90(array, self.turns, (-2, -1))


def random_view(
    size_HW: tuple[int, ...],
    crop_px: int,
    config: AugmentConfig,
    rng: np.random.Generator,
    centre: tuple[int, int] | None = None,
) -> View:
    """A random square of an image of `size_HW`, zoomed, turned and bent to `crop_px` as `config` says.

    It is placed so that, before it is turned or bent, it lies within the image; where the image is smaller, in its
    middle. `centre` (row, column) places it around that pixel, as far as the borders let it.
    """
    zoom = log_uniform(config.scale, rng)
    angle = np.deg2rad(rng.uniform(-config.rotate_degrees, config.rotate_degrees)) if config.rotate_degrees else 0.0
    bend_2HW = _elastic_field(crop_px, config, rng) if config.elastic_px else None
    shares = rng.random(2)
    flips = (bool(rng.random() < 0.5), bool(rng.random() < 0.5)) if config.flip else (False, False)
    turns = int(rng.integers(4)) if config.rotate90 else 0
    axes = list(zip(size_HW, shares.tolist(), centre or (None, None), strict=True))
    if zoom == 1.0 and angle == 0.0 and bend_2HW is None:
        top, left = (_corner(side, crop_px, share, wanted) for side, share, wanted in axes)
        return View(top, left, crop_px, crop_px, flips, turns, None)
    middle_2 = np.array([_middle(side, crop_px / zoom, share, wanted) for side, share, wanted in axes])
    if centre is not None and (angle or config.elastic_px):
        middle_2 = _no_further_than((crop_px / 2 - config.elastic_px) / zoom, np.array(centre), middle_2)
    at_2HW = _turn_and_zoom(crop_px, angle, zoom, bend_2HW)
    top, left = (int(first) for first in np.floor(middle_2 + at_2HW.min((1, 2))))
    at_2HW += np.asarray(middle_2 - (top, left), np.float32)[:, None, None]
    height, width = (int(last) + 2 for last in at_2HW.max((1, 2)))  # interpolation reads the next pixel, too
    return View(top, left, height, width, flips, turns, at_2HW)


def augment(
    window_HWC: Image, window_HW: Target, view: View, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Image, Target]:
    """The crop of a pair that `view` has cut, changed in its values as `config` says.

    `window_HWC` is float32, its value range in 0..1. Returns new arrays, float32 HWC in 0..1 and uint8 HW, the target's
    values untouched.
    """
    image_CHW, target_HW = view.sample(window_HWC, window_HW)
    image_CHW = _change_values(np.clip(image_CHW, 0.0, 1.0, out=image_CHW), config, rng)
    image_HWC = np.empty((*target_HW.shape, image_CHW.shape[0]), np.float32)
    np.clip(np.moveaxis(image_CHW, 0, 2), 0.0, 1.0, out=image_HWC)
    return image_HWC, target_HW


class Foreground:
    """Draws pixels of any class but 0, all equally likely, from a target HW that may hold pixels to be ignored."""

    def __init__(self, target_HW: Target) -> None:
        self._target_HW = target_HW
        # Kept instead of the pixels' positions, which in a huge image take more memory than the image.
        self._up_to_row = np.cumsum(np.count_nonzero(_is_foreground(target_HW), axis=1))

    def pixel(self, rng: np.random.Generator) -> tuple[int, int] | None:
        """Row and column of one; None, and nothing drawn, where there is none."""
        if self._up_to_row[-1] == 0:
            return None
        number = int(rng.integers(self._up_to_row[-1]))
        row = int(np.searchsorted(self._up_to_row, number, side="right"))
        columns = np.flatnonzero(_is_foreground(self._target_HW[row]))
        return row, int(columns[number - self._up_to_row[row]])  # counted from the last one of the row, below 0


def log_uniform(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """A factor whose logarithm is uniform: x and 1/x are equally likely where the bounds are reciprocal."""
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def _is_foreground(target: Target) -> NDArray[np.bool_]:
    return (target != 0) & (target != IGNORE)


# ---------------------------------------------------------------------------------------------- geometry


def _pixels(start: int, length: int, side: int) -> slice | NDArray[np.intp]:
    """Pixels of a side that stand for start, start + 1, ... where it goes on as ... 1 0 0 1 2 ... beyond its ends."""
    if start >= 0 and start + length <= side:
        return slice(start, start + length)
    index = np.arange(start, start + length) % (2 * side)
    return np.minimum(index, 2 * side - 1 - index)


def _corner(side: int, crop_px: int, share: float, wanted: int | None) -> int:
    """First pixel of a crop along a side: around the pixel `wanted`, or at a `share` of where it can be."""
    spare = side - crop_px
    if spare < 0:
        return -(-spare // 2)
    return int(share * (spare + 1)) if wanted is None else min(max(wanted - crop_px // 2, 0), spare)


def _middle(side: int, extent_px: float, share: float, wanted: int | None) -> float:
    """The same for the middle of what is `extent_px` long, not in whole pixels; pixel 0 is at 0."""
    spare, margin = side - extent_px, (extent_px - 1) / 2
    if spare < 0:
        return (side - 1) / 2
    return margin + share * spare if wanted is None else min(max(wanted, margin), margin + spare)


def _no_further_than(limit_px: float, wanted_2: Point, middle_2: Point) -> Point:
    """A middle moved towards the pixel `wanted`: a corner of the image must not be turned or bent out of the crop."""
    away_2 = middle_2 - wanted_2
    distance = float(np.hypot(*away_2))
    return wanted_2 + away_2 * (max(0.0, limit_px - 1) / distance) if distance > limit_px - 1 else middle_2


def _turn_and_zoom(crop_px: int, angle: float, zoom: float, bend_2HW: Image | None) -> Image:
    """Row and column that every pixel of the crop reads, from the middle of the crop, in pixels of the image."""
    from_middle = np.arange(crop_px, dtype=np.float32) - np.float32((crop_px - 1) / 2)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    turn = np.array([[cos, sin], [-sin, cos]], np.float32)
    at_2HW = turn[:, :1, None] * from_middle[:, None] + turn[:, 1:, None] * from_middle
    if bend_2HW is not None:
        at_2HW += (turn @ bend_2HW.reshape(2, -1)).reshape(at_2HW.shape)
    return at_2HW


def _elastic_field(crop_px: int, config: AugmentConfig, rng: np.random.Generator) -> Image:
    """Smooth random displacements in pixels of the crop, down and right; the longest is uniform in 0..`elastic_px`.

    White noise on a lattice, interpolated by cubic B-splines: much like white noise blurred by a Gaussian of
    `elastic_sigma_px` (Simard et al. 2003), for two small products of matrices.
    """
    spline_PK = _splines(crop_px, config.elastic_sigma_px)
    num_knots = spline_PK.shape[1]
    noise_2KK = rng.standard_normal((2, num_knots, num_knots), dtype=np.float32)
    field_2HW = np.asarray(spline_PK @ noise_2KK @ spline_PK.T, np.float32)
    longest = float(np.sqrt(np.square(field_2HW).sum(0).max()))
    field_2HW *= np.float32(rng.uniform(0, config.elastic_px) / max(longest, 1e-6))
    return field_2HW


@lru_cache(maxsize=8)
def _splines(crop_px: int, sigma_px: float) -> Image:
    """Cubic B-splines around equidistant knots, (crop_px, knots); every row adds up to 1."""
    spacing_px = np.sqrt(3.0) * sigma_px  # a cubic B-spline's deviation is its spacing / sqrt(3)
    num_knots = int(np.ceil(crop_px / spacing_px)) + 3
    distance = np.abs((np.arange(crop_px) + 0.5)[:, None] / spacing_px - (np.arange(num_knots) - 1))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


# ------------------------------------------------------------------------------------------------ values


def _change_values(image_CHW: Image, config: AugmentConfig, rng: np.random.Generator) -> Image:
    """Values in 0..1 -> values that may lie outside; `image_CHW` is overwritten."""
    num_channels = image_CHW.shape[0]
    if config.stain_jitter > 0 and num_channels == 3:
        _jitter_stains(image_CHW, config.stain_jitter, rng)
    if rng.random() < config.drop_colour:
        image_CHW[:] = image_CHW.mean(0)
    if config.counterstain > 0 and num_channels == 3 and rng.random() < 0.5:
        _counterstain(image_CHW, config.counterstain, rng)
    if rng.random() < config.invert:
        np.subtract(1.0, image_CHW, out=image_CHW)
    gamma = log_uniform(config.gamma, rng)
    if gamma != 1.0:
        np.power(image_CHW, np.float32(gamma), out=image_CHW)
    jitter_C = rng.uniform(1 - config.channel_jitter, 1 + config.channel_jitter, (num_channels, 1, 1))
    gain_C = np.asarray(jitter_C * log_uniform(config.brightness, rng), np.float32)
    contrast = np.float32(log_uniform(config.contrast, rng))
    ground_C = gain_C * image_CHW.mean((1, 2), keepdims=True) if contrast != 1 else None
    image_CHW *= gain_C * contrast
    if ground_C is not None:
        image_CHW += ground_C * (1 - contrast)
    if config.blur_sigma > 0 and rng.random() < 0.25:
        sigma = rng.uniform(0, config.blur_sigma)
        image_CHW = ndimage.gaussian_filter(image_CHW, (0, sigma, sigma))
    if config.noise_std > 0 and rng.random() < 0.5:
        noise_CHW = rng.standard_normal(image_CHW.shape, dtype=np.float32)
        noise_CHW *= np.float32(rng.uniform(0, config.noise_std))
        image_CHW += noise_CHW
    return image_CHW


def _jitter_stains(image_CHW: Image, size: float, rng: np.random.Generator) -> None:
    """More or less of each stain, in place: amount * (1 + gain) + offset, both at most `size`, in optical density.

    Grey has amounts of the stains as well, and would be tinted: a crop that is `GREY` is left as it is.
    """
    gain_S, offset_S = rng.uniform(-size, size, (2, 3))
    if _is_grey(image_CHW):
        return
    density_CS = (STAINS_SC / np.linalg.norm(STAINS_SC, axis=1, keepdims=True)).T
    mix_CC = density_CS @ np.diag(1 + gain_S) @ np.linalg.inv(density_CS)
    density_CN = -np.log10(np.maximum(image_CHW, np.float32(DARKEST))).reshape(3, -1)
    density_CN = mix_CC.astype(np.float32) @ density_CN + (density_CS @ offset_S).astype(np.float32)[:, None]
    np.minimum(_transmitted(density_CN.reshape(image_CHW.shape)), np.float32(1), out=image_CHW)


def _counterstain(image_CHW: Image, size: float, rng: np.random.Generator) -> None:
    """Lay a random pattern of a stain from eosin to red over the crop, in place: of optical density `size` at most.

    It stands for what tissue has beside its nuclei, and other labs' slides show in pink and red: cytoplasm, fibres,
    blood. A crop that is `GREY` is left as it is.
    """
    sigma_px = float(rng.choice(PATTERN_SIGMAS_PX))
    spline_PK = _splines(image_CHW.shape[1], sigma_px)
    noise_KK = rng.standard_normal((spline_PK.shape[1], spline_PK.shape[1]), dtype=np.float32)
    sharpness, level = log_uniform((1.5, 12.0), rng), rng.uniform(-1, 1)
    density_C = np.array([0.07, 0.99, rng.uniform(0.11, 0.7)], np.float32) * np.float32(rng.uniform(0, size))
    if _is_grey(image_CHW):
        return
    field_HW = spline_PK @ noise_KK @ spline_PK.T
    field_HW = (field_HW - field_HW.mean()) / max(float(field_HW.std()), 1e-6)
    pattern_HW = special.expit(np.float32(sharpness) * (field_HW - np.float32(level)))
    image_CHW *= _transmitted(density_C[:, None, None] * pattern_HW)


def _transmitted(density: Image) -> Image:
    """The share of the light that an optical density lets through, by Beer and Lambert."""
    return np.power(np.float32(10), -density)


def _is_grey(image_CHW: Image) -> bool:
    return float((image_CHW.max(0) - image_CHW.min(0)).mean()) < GREY

"""Seeded synthetic microscopy with exact masks, for the demo and the tests.

Two modalities, both drawn so that brightness alone does not tell nuclei apart, while an eye does: *fluorescence*
(nuclei of very different brightness, blurred ones out of focus that do not count, haze, vignette, debris, fibres, shot
noise) and *brightfield* (a dark rim around an inside as light as the textured, unevenly lit ground, dark debris).

Image i depends on (seed, i, size, modality) alone, never on how many images are made.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.random import PCG64, Generator, SeedSequence
from scipy.ndimage import gaussian_filter

Modality = Literal["fluorescence", "brightfield"]
MODALITIES: tuple[Modality, ...] = ("fluorescence", "brightfield")

Plane = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

_NUM_HARMONICS = 4


@dataclass(frozen=True)
class _Nucleus:
    """An ellipse with a wavy outline; lengths in pixels, angles in radians."""

    y: float
    x: float
    radius_y: float
    radius_x: float
    angle: float
    waves: Plane  # amplitude and phase of harmonics 2, 3, ... of the outline

    @property
    def radius(self) -> float:
        """The mean radius."""
        return (self.radius_y + self.radius_x) / 2

    def crowds(self, other: "_Nucleus") -> bool:
        """Whether the two overlap by more than a touch."""
        return bool(np.hypot(self.y - other.y, self.x - other.x) <= 0.9 * (self.radius + other.radius))

    def draw(self, size: int) -> tuple[tuple[slice, slice], Plane]:
        """Where the nucleus may be, and there the distance from its centre as a share of the way to its outline."""
        reach = 1.6 * max(self.radius_y, self.radius_x) + 4
        window = tuple(slice(max(0, int(c - reach)), max(0, min(size, int(c + reach) + 1))) for c in (self.y, self.x))
        rows, columns = np.mgrid[window[0], window[1]]
        dy, dx = rows - self.y, columns - self.x
        along = (np.cos(self.angle) * dx + np.sin(self.angle) * dy) / self.radius_x
        across = (np.cos(self.angle) * dy - np.sin(self.angle) * dx) / self.radius_y
        theta = np.arctan2(across, along)
        outline = 1.0 + sum(a * np.cos(k * theta + p) for k, (a, p) in enumerate(self.waves, start=2))
        return (window[0], window[1]), np.hypot(along, across) / outline


def synthesize(index: int, *, size: int, modality: Modality, seed: int = 0) -> tuple[Bytes, Bytes]:
    """Image number `index` of the set `seed`: image_HWC uint8 with 3 channels, and its mask_HW uint8, 0 or 1.

    `size` is the side of the square image in pixels; nuclei are 10 to 30 px across whatever it is.
    """
    rng = Generator(PCG64(SeedSequence([seed, index])))
    nuclei = _place(rng, size)
    mask = np.zeros((size, size), np.uint8)
    for nucleus in nuclei:
        window, depth = nucleus.draw(size)
        mask[window] |= depth < 1.0
    render = _fluorescence if modality == "fluorescence" else _brightfield
    image = render(rng, size, nuclei)
    return np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8), mask


def _place(rng: Generator, size: int) -> list[_Nucleus]:
    """Nuclei in loose clusters that touch at most slightly, some of them cut by the border. At least one."""
    typical_px = rng.uniform(6.5, 12.0)
    wanted = max(1, round(rng.uniform(0.10, 0.30) * size**2 / (np.pi * typical_px**2)))
    clusters = rng.uniform(0, size, (max(1, wanted // 6), 2))
    cell_px = (
        3.0 * typical_px
    )  # wider than any two nuclei that touch are apart: looking at the neighbouring cells is enough
    placed: dict[tuple[int, int], list[_Nucleus]] = {}
    for _ in range(8 * wanted):
        around = clusters[rng.integers(len(clusters))] + rng.normal(0, 3 * typical_px, 2)
        y, x = around if rng.random() < 0.5 else rng.uniform(0, size, 2)
        nucleus = _nucleus(rng, y, x, typical_px)
        row, column = int(y // cell_px), int(x // cell_px)
        near = [other for r in (-1, 0, 1) for c in (-1, 0, 1) for other in placed.get((row + r, column + c), ())]
        if 0 <= y < size and 0 <= x < size and not any(nucleus.crowds(other) for other in near):
            placed.setdefault((row, column), []).append(nucleus)
            wanted -= 1
        if not wanted:
            break
    return [nucleus for cell in placed.values() for nucleus in cell]


def _nucleus(rng: Generator, y: float, x: float, typical_px: float) -> _Nucleus:
    radius = typical_px * np.exp(np.clip(rng.normal(0, 0.18), -0.4, 0.4))
    stretch = rng.uniform(1.0, 1.35)
    decay = 0.07 / np.arange(1, _NUM_HARMONICS + 1)
    waves = np.stack([rng.normal(0, decay), rng.uniform(0, 2 * np.pi, _NUM_HARMONICS)], axis=1)
    return _Nucleus(y, x, radius / stretch, radius * stretch, rng.uniform(0, np.pi), waves)


# ------------------------------------------------------------------------------------------ fluorescence


def _fluorescence(rng: Generator, size: int, nuclei: list[_Nucleus]) -> Plane:
    """Light on dark: what emits, seen through lens, lamp and camera."""
    emission = np.zeros((size, size))
    chromatin = 1.0 + 0.30 * _noise(rng, size, 1.8)
    for nucleus in nuclei:
        window, depth = nucleus.draw(size)
        brightness = np.clip(np.exp(rng.normal(0.0, 0.45)), 0.45, 2.0)
        profile = brightness * _inside(nucleus, depth) * (1.0 - 0.25 * np.clip(depth, 0, 1) ** 2)
        emission[window] = np.maximum(emission[window], profile * chromatin[window])
    blurred = np.zeros((size, size))
    for nucleus in _place(rng, size)[: max(2, len(nuclei) // 2)]:  # out of focus: seen, but not in the mask
        window, depth = nucleus.draw(size)
        blurred[window] += rng.uniform(0.4, 1.1) * _inside(nucleus, depth)
    scene = gaussian_filter(emission + _debris(rng, size, 3.0) + _fibres(rng, size, 0.8), rng.uniform(0.6, 1.3))
    scene += gaussian_filter(blurred, rng.uniform(4.5, 7.0), mode="constant")
    scene += rng.uniform(0.3, 0.7) * gaussian_filter(emission, 14.0) + rng.uniform(0.05, 0.25)
    scene *= _lamp(rng, size, 0.6)
    scene *= rng.uniform(0.55, 0.95) / np.quantile(scene, 0.99)
    photons = rng.uniform(60, 400)
    seen = rng.poisson(np.maximum(scene, 0) * photons) / photons + rng.normal(0, 0.012, scene.shape)
    return np.repeat(seen[..., None], 3, axis=2)


# ------------------------------------------------------------------------------------------- brightfield


def _brightfield(rng: Generator, size: int, nuclei: list[_Nucleus]) -> Plane:
    """Dark on light: rims and grains absorb, the insides hardly."""
    ground = 0.03 * _noise(rng, size, 1.2) + 0.04 * _noise(rng, size, 4.0) + 0.06 * _noise(rng, size, 16.0)
    absorbed = np.zeros((size, size))
    grain = _noise(rng, size, 1.4)
    for nucleus in nuclei:
        window, depth = nucleus.draw(size)
        inside = _inside(nucleus, depth)
        rim_px = rng.uniform(1.2, 2.2)
        from_outline_px = (depth - 1.0) * nucleus.radius
        rim = np.exp(-0.5 * ((from_outline_px + rim_px) / rim_px) ** 2)
        halo = np.exp(-0.5 * ((from_outline_px - 2.0) / 1.5) ** 2)
        contrast = rng.uniform(0.16, 0.34)
        absorbed[window] += contrast * (rim - 0.25 * halo) + inside * (rng.uniform(-0.02, 0.08) + 0.05 * grain[window])
        absorbed[window] += contrast * _nucleoli(rng, nucleus, window)
    absorbed += _debris(rng, size, 0.45) + _fibres(rng, size, 0.18)
    light = rng.uniform(0.70, 0.90) * _lamp(rng, size, 0.35) * (1.0 + ground)
    seen = gaussian_filter(light * (1.0 - absorbed), rng.uniform(0.5, 1.0)) + rng.normal(0, 0.012, (size, size))
    tint = np.array([1.0, rng.uniform(0.92, 1.0), rng.uniform(0.82, 1.0)])
    return seen[..., None] * tint


def _nucleoli(rng: Generator, nucleus: _Nucleus, window: tuple[slice, slice]) -> Plane:
    """One to three dark dots well inside the nucleus."""
    rows, columns = np.mgrid[window]
    dots = np.zeros(rows.shape)
    for _ in range(rng.integers(1, 4)):
        dy, dx = rng.uniform(-0.45, 0.45, 2) * min(nucleus.radius_y, nucleus.radius_x)
        squared = (rows - nucleus.y - dy) ** 2 + (columns - nucleus.x - dx) ** 2
        dots += rng.uniform(0.5, 1.0) * np.exp(-0.5 * squared / rng.uniform(0.9, 1.6) ** 2)
    return dots


# ------------------------------------------------------------------------------------------ common to both


def _inside(nucleus: _Nucleus, depth: Plane) -> Plane:
    """1 inside the outline, 0 outside, with an edge about one pixel wide."""
    return np.clip((1.0 - depth) * nucleus.radius + 0.5, 0.0, 1.0)


def _noise(rng: Generator, size: int, grain_px: float) -> Plane:
    """Gaussian noise of zero mean and unit deviation whose grains are about `grain_px` wide."""
    # blurring white noise with a Gaussian divides its deviation by 2 sqrt(pi) sigma
    white = rng.normal(0, 1, (size, size))
    return gaussian_filter(white, grain_px, mode="wrap") * (2 * np.sqrt(np.pi) * grain_px)


def _lamp(rng: Generator, size: int, strength: float) -> Plane:
    """Uneven light: a vignette around a point that need not be the middle, and a slope. At most 1."""
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    centre_y, centre_x = rng.uniform(-0.25, 0.25, 2)
    angle = rng.uniform(0, 2 * np.pi)
    vignette = rng.uniform(0.3, 1.0) * ((rows - centre_y) ** 2 + (columns - centre_x) ** 2)
    slope = rng.uniform(0.2, 0.6) * (0.5 + np.cos(angle) * rows + np.sin(angle) * columns)
    return np.maximum(1.0 - strength * (vignette + slope), 0.15)


def _debris(rng: Generator, size: int, height: float) -> Plane:
    """Specks a few pixels wide, up to `height` high."""
    specks = np.zeros((size, size))
    for _ in range(rng.poisson(size**2 / 3500)):
        y, x = rng.uniform(0, size, 2)
        width = rng.uniform(0.8, 2.2)
        window = tuple(slice(max(0, int(c - 8)), min(size, int(c + 9))) for c in (y, x))
        rows, columns = np.mgrid[window[0], window[1]]
        squared = (rows - y) ** 2 + (columns - x) ** 2
        specks[window] += rng.uniform(0.3, 1.0) * height * np.exp(-0.5 * squared / width**2)
    return specks


def _fibres(rng: Generator, size: int, height: float) -> Plane:
    """Up to three winding threads, `height` high at most."""
    threads = np.zeros((size, size))
    for _ in range(rng.integers(0, 4)):
        num_steps = int(rng.uniform(0.3, 1.0) * size * 2)  # half a pixel each
        heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.05, num_steps))
        steps = 0.5 * np.stack([np.sin(heading), np.cos(heading)])
        path = np.rint(rng.uniform(0, size, (2, 1)) + np.cumsum(steps, axis=1)).astype(np.intp)
        y, x = path[:, ((path >= 0) & (path < size)).all(axis=0)]
        thread = np.zeros((size, size))
        thread[y, x] = 1.0
        sigma = rng.uniform(0.8, 1.4)
        threads += rng.uniform(0.4, 1.0) * height * gaussian_filter(thread, sigma) * (np.sqrt(2 * np.pi) * sigma)
    return threads

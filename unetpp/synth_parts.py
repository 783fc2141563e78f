"""Shapes, textures and light that the synthetic images are made of; lengths are pixels, angles radians."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from scipy.ndimage import gaussian_filter

Plane = npt.NDArray[np.float64]
Window = tuple[slice, slice]

_NUM_HARMONICS = 4


@dataclass(frozen=True)
class Shape:
    """A nucleus or a cell: an ellipse with a wavy outline."""

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

    def crowds(self, other: "Shape") -> bool:
        """Whether the two overlap by more than a touch."""
        return bool(np.hypot(self.y - other.y, self.x - other.x) <= 0.9 * (self.radius + other.radius))

    def draw(self, size: int) -> tuple[Window, Plane]:
        """Where the shape may be, and there the distance from its centre as a share of the way to its outline."""
        reach = 1.6 * max(self.radius_y, self.radius_x) + 4
        window = tuple(slice(max(0, int(c - reach)), max(0, min(size, int(c + reach) + 1))) for c in (self.y, self.x))
        rows, columns = np.mgrid[window[0], window[1]]
        dy, dx = rows - self.y, columns - self.x
        along = (np.cos(self.angle) * dx + np.sin(self.angle) * dy) / self.radius_x
        across = (np.cos(self.angle) * dy - np.sin(self.angle) * dx) / self.radius_y
        theta = np.arctan2(across, along)
        outline = 1.0 + sum(a * np.cos(k * theta + p) for k, (a, p) in enumerate(self.waves, start=2))
        return (window[0], window[1]), np.hypot(along, across) / outline


def place(
    rng: Generator,
    size: int,
    radius_px: tuple[float, float] = (6.5, 12.0),
    share: tuple[float, float] = (0.10, 0.30),
) -> list[Shape]:
    """Shapes in loose clusters that touch at most slightly, some of them cut by the border.

    The bounds are of what is drawn once an image: a typical radius, and the share of the image that is covered at most.
    """
    typical_px = rng.uniform(*radius_px)
    wanted = max(1, round(rng.uniform(*share) * size**2 / (np.pi * typical_px**2)))
    clusters = rng.uniform(0, size, (max(1, wanted // 6), 2))
    cell_px = 3.0 * typical_px  # wider than any two shapes that touch are apart: looking at the neighbours is enough
    placed: dict[tuple[int, int], list[Shape]] = {}
    for _ in range(8 * wanted):
        around = clusters[rng.integers(len(clusters))] + rng.normal(0, 3 * typical_px, 2)
        y, x = around if rng.random() < 0.5 else rng.uniform(0, size, 2)
        one = random_shape(rng, y, x, typical_px)
        row, column = int(y // cell_px), int(x // cell_px)
        near = [other for r in (-1, 0, 1) for c in (-1, 0, 1) for other in placed.get((row + r, column + c), ())]
        if 0 <= y < size and 0 <= x < size and not any(one.crowds(other) for other in near):
            placed.setdefault((row, column), []).append(one)
            wanted -= 1
        if not wanted:
            break
    return [one for cell in placed.values() for one in cell]


def random_shape(rng: Generator, y: float, x: float, typical_px: float) -> Shape:
    """A shape at (y, x) whose size, stretch, angle and outline are random."""
    radius = typical_px * np.exp(np.clip(rng.normal(0, 0.18), -0.4, 0.4))
    stretch = rng.uniform(1.0, 1.35)
    decay = 0.07 / np.arange(1, _NUM_HARMONICS + 1)
    waves = np.stack([rng.normal(0, decay), rng.uniform(0, 2 * np.pi, _NUM_HARMONICS)], axis=1)
    return Shape(y, x, radius / stretch, radius * stretch, rng.uniform(0, np.pi), waves)


def coverage(shape: Shape, depth: Plane) -> Plane:
    """1 inside the outline, 0 outside, with an edge about one pixel wide."""
    return np.clip((1.0 - depth) * shape.radius + 0.5, 0.0, 1.0)


def nucleoli(rng: Generator, nucleus: Shape, window: Window) -> Plane:
    """One to three dark dots well inside the nucleus."""
    rows, columns = np.mgrid[window]
    dots = np.zeros(rows.shape)
    for _ in range(rng.integers(1, 4)):
        dy, dx = rng.uniform(-0.45, 0.45, 2) * min(nucleus.radius_y, nucleus.radius_x)
        squared = (rows - nucleus.y - dy) ** 2 + (columns - nucleus.x - dx) ** 2
        dots += rng.uniform(0.5, 1.0) * np.exp(-0.5 * squared / rng.uniform(0.9, 1.6) ** 2)
    return dots


def noise(rng: Generator, size: int, grain_px: float) -> Plane:
    """Gaussian noise of zero mean and unit deviation whose grains are about `grain_px` wide."""
    # blurring white noise with a Gaussian divides its deviation by 2 sqrt(pi) sigma
    white = rng.normal(0, 1, (size, size))
    return gaussian_filter(white, grain_px, mode="wrap") * (2 * np.sqrt(np.pi) * grain_px)


def lamp(rng: Generator, size: int, strength: float) -> Plane:
    """Uneven light: a vignette around a point that need not be the middle, and a slope. At most 1."""
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    centre_y, centre_x = rng.uniform(-0.25, 0.25, 2)
    angle = rng.uniform(0, 2 * np.pi)
    vignette = rng.uniform(0.3, 1.0) * ((rows - centre_y) ** 2 + (columns - centre_x) ** 2)
    slope = rng.uniform(0.2, 0.6) * (0.5 + np.cos(angle) * rows + np.sin(angle) * columns)
    return np.maximum(1.0 - strength * (vignette + slope), 0.15)


def debris(rng: Generator, size: int, height: float) -> Plane:
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


def fibres(rng: Generator, size: int, height: float) -> Plane:
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

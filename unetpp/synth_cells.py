"""Synthetic cells as haematoxylin and eosin show them: pink cytoplasm and blue nuclei on light ground.

No colour tells the classes apart: cytoplasm may be as pale as the ground or as dark as a pale nucleus, ground has
fibres and red blood cells of the cytoplasm's dye, and specks of the nuclei's; some cells are cut where they have no
nucleus.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from scipy.ndimage import gaussian_filter

from unetpp.synth_parts import Plane, Shape, coverage, debris, fibres, lamp, noise, nucleoli, place, random_shape

CYTOPLASM, NUCLEUS = 1, 2

_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])  # optical densities in red, green and blue (Ruifrok and Johnston 2001)
_EOSIN = np.array([0.07, 0.99, 0.11])


@dataclass(frozen=True)
class Cell:
    """The outline of a cell, and that of its nucleus if the section cuts it."""

    body: Shape
    nucleus: Shape | None


def place_cells(rng: Generator, size: int) -> list[Cell]:
    """Cells that touch at most slightly, each with its nucleus somewhere near its middle; a few without."""
    cells = []
    for body in place(rng, size, radius_px=(13.0, 20.0), share=(0.25, 0.60)):
        radius_px = body.radius * rng.uniform(0.38, 0.56)
        y, x = np.array([body.y, body.x]) + rng.uniform(-0.25, 0.25, 2) * body.radius
        nucleus = random_shape(rng, y, x, radius_px)
        cells.append(Cell(body, nucleus if rng.random() < 0.92 else None))
    return cells


def cells_mask(size: int, cells: list[Cell]) -> npt.NDArray[np.uint8]:
    """Class ids HW: 0 ground, 1 cytoplasm, 2 nucleus, which lies above all cytoplasm."""
    mask = np.zeros((size, size), np.uint8)
    for class_id, shapes in ((CYTOPLASM, [cell.body for cell in cells]), (NUCLEUS, [cell.nucleus for cell in cells])):
        for shape in shapes:
            if shape is not None:
                window, depth = shape.draw(size)
                mask[window][depth < 1.0] = class_id
    return mask


def stained(rng: Generator, size: int, cells: list[Cell]) -> Plane:
    """The section in transmitted light, HWC in 0..1 and a little beyond."""
    eosin = _ground(rng, size)
    haematoxylin = 0.02 + debris(rng, size, 0.5)
    grain = 1.0 + 0.16 * noise(rng, size, 1.5) + 0.14 * noise(rng, size, 5.0)
    for cell in cells:
        window, depth = cell.body.draw(size)
        pink = rng.uniform(0.16, 0.55) * (1.0 - rng.uniform(0.0, 0.4) * np.clip(depth, 0, 1) ** 2) * grain[window]
        inside = coverage(cell.body, depth)
        eosin[window] += inside * (pink - eosin[window])
        haematoxylin[window] += inside * rng.uniform(0.0, 0.16)
    chromatin = 1.0 + 0.28 * noise(rng, size, 1.6)
    for cell in cells:
        if cell.nucleus is not None:
            _stain_nucleus(rng, cell.nucleus, haematoxylin, eosin, chromatin)
    amounts = [gaussian_filter(plane, rng.uniform(0.6, 1.1)) for plane in (haematoxylin, eosin)]
    strengths = rng.uniform(0.75, 1.35, 2)
    dyes = [dye * rng.uniform(0.85, 1.15, 3) for dye in (_HAEMATOXYLIN, _EOSIN)]  # no two laboratories stain alike
    density = sum(
        strength * plane[..., None] * dye for strength, plane, dye in zip(strengths, amounts, dyes, strict=True)
    )
    white = rng.uniform(0.84, 0.97) * np.array([1.0, rng.uniform(0.95, 1.0), rng.uniform(0.93, 1.0)])
    light = white * lamp(rng, size, 0.15)[..., None]
    return light * 10.0**-density + rng.normal(0, 0.012, (size, size, 3))


def _ground(rng: Generator, size: int) -> Plane:
    """The eosin between the cells: a pale, uneven matrix with fibres, and red blood cells, which are no cells here."""
    ground = rng.uniform(0.02, 0.14) * np.maximum(1.0 + 0.35 * noise(rng, size, 3.0) + 0.4 * noise(rng, size, 12.0), 0)
    ground += fibres(rng, size, 0.35)
    for _ in range(rng.poisson(size**2 / 6000)):
        y, x = rng.uniform(0, size, 2)
        blood = random_shape(rng, y, x, 5.0)
        window, depth = blood.draw(size)
        pale = 1.0 - 0.5 * np.exp(-3.0 * depth**2)  # thinner in the middle
        ground[window] += coverage(blood, depth) * (rng.uniform(0.3, 0.6) * pale - ground[window])
    return ground


def _stain_nucleus(rng: Generator, nucleus: Shape, haematoxylin: Plane, eosin: Plane, chromatin: Plane) -> None:
    """Chromatin, nucleoli and a darker membrane, in place of the cytoplasm below; about one in four is pale inside."""
    window, depth = nucleus.draw(len(eosin))
    inside = coverage(nucleus, depth)
    membrane = np.exp(-0.5 * ((depth - 1.0) * nucleus.radius + 1.0) ** 2)
    blue = rng.uniform(0.10, 0.25) if rng.random() < 0.25 else rng.uniform(0.35, 0.80)
    amount = blue * chromatin[window] + rng.uniform(0.1, 0.3) * membrane + 0.25 * nucleoli(rng, nucleus, window)
    haematoxylin[window] += inside * (np.maximum(amount, 0.0) - haematoxylin[window])
    eosin[window] *= 1.0 - 0.5 * inside

"""Seeded synthetic microscopy with exact masks, for the demo and the tests.

Three kinds of sets, all drawn so that a threshold does not find what an eye finds:

- `nuclei`, one class, RGB, of two modalities in turn: *fluorescence* (nuclei of very different brightness, blurred ones
  out of focus that do not count, haze, vignette, debris, fibres, shot noise) and *brightfield* (a dark rim around an
  inside as light as the textured, unevenly lit ground, dark debris);
- `cells`, cytoplasm and nuclei in RGB: *stained*, as with haematoxylin and eosin (see `synth_cells`);
- `camera16`, one class, one channel of 16 bits: *camera*, the fluorescence scene in the counts of a 12-bit camera.

Image i depends on (seed, i, size, modality) alone, never on how many images are made.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.random import PCG64, Generator, SeedSequence
from scipy.ndimage import gaussian_filter

from unetpp.config import SynthKind
from unetpp.synth_cells import cells_mask, place_cells, stained
from unetpp.synth_parts import Plane, Shape, coverage, debris, fibres, lamp, noise, nucleoli, place

Modality = Literal["fluorescence", "brightfield", "stained", "camera"]
MODALITIES: dict[SynthKind, tuple[Modality, ...]] = {
    "nuclei": ("fluorescence", "brightfield"),
    "cells": ("stained",),
    "camera16": ("camera",),
}
"""What the images of a set are, in turn."""

NUM_CLASSES: dict[SynthKind, int] = {"nuclei": 1, "cells": 3, "camera16": 1}
"""Classes of the masks, as `ModelConfig.num_classes` counts them: 1 is foreground alone, ids 0 and 1."""

CAMERA_MAX = 4095
"""The largest count of a 12-bit camera."""

# Image i of one kind and that of another share no draw: who was trained on the one has seen no scene of the other.
_STREAM: dict[Modality, tuple[int, ...]] = {"fluorescence": (), "brightfield": (), "stained": (1,), "camera": (2,)}

Image = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Mask = npt.NDArray[np.uint8]


def synthesize(index: int, *, size: int, modality: Modality, seed: int = 0) -> tuple[Image, Mask]:
    """Image number `index` of the set `seed`, HWC, and its mask_HW, uint8 class ids.

    `size` is the side of the square image in pixels; nuclei are 10 to 30 px across whatever it is, cells 20 to 55.
    The image has 3 channels of uint8, camera 1 of uint16 in 0..4095. Ids are 0 and 1, stained 0 ground, 1 cytoplasm and
    2 nucleus.
    """
    rng = Generator(PCG64(SeedSequence([seed, index, *_STREAM[modality]])))
    if modality == "stained":
        cells = place_cells(rng, size)
        return _bytes(stained(rng, size, cells)), cells_mask(size, cells)
    nuclei = place(rng, size)
    mask = np.zeros((size, size), np.uint8)
    for nucleus in nuclei:
        window, depth = nucleus.draw(size)
        mask[window] |= depth < 1.0
    if modality == "camera":
        return _camera(rng, size, nuclei), mask
    render: Callable[[Generator, int, list[Shape]], Plane]
    render = _fluorescence if modality == "fluorescence" else _brightfield
    return _bytes(render(rng, size, nuclei)), mask


def _bytes(image: Plane) -> npt.NDArray[np.uint8]:
    return np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


# ------------------------------------------------------------------------------------------ fluorescence


def _fluorescence(rng: Generator, size: int, nuclei: list[Shape]) -> Plane:
    """Light on dark: the scene, seen by a camera whose counts somebody has stretched to 8 bits."""
    scene = _fluorescent_scene(rng, size, nuclei)
    scene *= rng.uniform(0.55, 0.95) / np.quantile(scene, 0.99)
    photons = rng.uniform(60, 400)
    seen = rng.poisson(np.maximum(scene, 0) * photons) / photons + rng.normal(0, 0.012, scene.shape)
    return np.repeat(seen[..., None], 3, axis=2)


def _camera(rng: Generator, size: int, nuclei: list[Shape]) -> npt.NDArray[np.uint16]:
    """The scene in the counts of a 12-bit camera: offset, a dim or bright exposure, shot and read noise, hot pixels.

    Columns differ in offset and pixels in gain, a little; what is brighter than the camera can count is clipped.
    """
    scene = _fluorescent_scene(rng, size, nuclei)
    counts_per_electron = rng.uniform(0.4, 1.2)
    brightest = 220.0 * (3600.0 / 220.0) ** rng.random()  # counts above the offset, as often dim as bright
    electrons = np.maximum(scene, 0) * (brightest / counts_per_electron / np.quantile(scene, 0.99))
    pixel_gain = 1.0 + 0.01 * rng.normal(0, 1, (size, size))
    seen = counts_per_electron * (rng.poisson(electrons * pixel_gain) + rng.normal(0, rng.uniform(2, 6), (size, size)))
    seen += rng.uniform(90, 110) + rng.normal(0, 0.7, size)
    y, x = rng.integers(0, size, (2, rng.poisson(size**2 / 12000)))
    seen[y, x] += rng.uniform(200, 3000, len(y))
    return np.rint(np.clip(seen, 0, CAMERA_MAX)).astype(np.uint16).reshape(size, size, 1)


def _fluorescent_scene(rng: Generator, size: int, nuclei: list[Shape]) -> Plane:
    """What emits, seen through lens and lamp, in no unit."""
    emission = np.zeros((size, size))
    chromatin = 1.0 + 0.30 * noise(rng, size, 1.8)
    for nucleus in nuclei:
        window, depth = nucleus.draw(size)
        brightness = np.clip(np.exp(rng.normal(0.0, 0.45)), 0.45, 2.0)
        profile = brightness * coverage(nucleus, depth) * (1.0 - 0.25 * np.clip(depth, 0, 1) ** 2)
        emission[window] = np.maximum(emission[window], profile * chromatin[window])
    blurred = np.zeros((size, size))
    for nucleus in place(rng, size)[: max(2, len(nuclei) // 2)]:  # out of focus: seen, but not in the mask
        window, depth = nucleus.draw(size)
        blurred[window] += rng.uniform(0.4, 1.1) * coverage(nucleus, depth)
    scene = gaussian_filter(emission + debris(rng, size, 3.0) + fibres(rng, size, 0.8), rng.uniform(0.6, 1.3))
    scene += gaussian_filter(blurred, rng.uniform(4.5, 7.0), mode="constant")
    scene += rng.uniform(0.3, 0.7) * gaussian_filter(emission, 14.0) + rng.uniform(0.05, 0.25)
    scene *= lamp(rng, size, 0.6)
    return scene


# ------------------------------------------------------------------------------------------- brightfield


def _brightfield(rng: Generator, size: int, nuclei: list[Shape]) -> Plane:
    """Dark on light: rims and grains absorb, the insides hardly."""
    ground = 0.03 * noise(rng, size, 1.2) + 0.04 * noise(rng, size, 4.0) + 0.06 * noise(rng, size, 16.0)
    absorbed = np.zeros((size, size))
    grain = noise(rng, size, 1.4)
    for nucleus in nuclei:
        window, depth = nucleus.draw(size)
        inside = coverage(nucleus, depth)
        rim_px = rng.uniform(1.2, 2.2)
        from_outline_px = (depth - 1.0) * nucleus.radius
        rim = np.exp(-0.5 * ((from_outline_px + rim_px) / rim_px) ** 2)
        halo = np.exp(-0.5 * ((from_outline_px - 2.0) / 1.5) ** 2)
        contrast = rng.uniform(0.16, 0.34)
        absorbed[window] += contrast * (rim - 0.25 * halo) + inside * (rng.uniform(-0.02, 0.08) + 0.05 * grain[window])
        absorbed[window] += contrast * nucleoli(rng, nucleus, window)
    absorbed += debris(rng, size, 0.45) + fibres(rng, size, 0.18)
    light = rng.uniform(0.70, 0.90) * lamp(rng, size, 0.35) * (1.0 + ground)
    seen = gaussian_filter(light * (1.0 - absorbed), rng.uniform(0.5, 1.0)) + rng.normal(0, 0.012, (size, size))
    tint = np.array([1.0, rng.uniform(0.92, 1.0), rng.uniform(0.82, 1.0)])
    return seen[..., None] * tint

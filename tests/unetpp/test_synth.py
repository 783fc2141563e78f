"""Synthetic microscopy: exact masks, the same everywhere, and too hard for a threshold."""

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from unetpp.config import SynthKind
from unetpp.images import decode_image, decode_mask, encode_image, encode_mask
from unetpp.synth import CAMERA_MAX, MODALITIES, NUM_CLASSES, Modality, synthesize

NUM_MEASURED = 30
NUCLEI = MODALITIES["nuclei"]
ALL = [modality for modalities in MODALITIES.values() for modality in modalities]
Found = npt.NDArray[np.bool_]


def otsu_threshold(grey: npt.NDArray[np.integer]) -> int:
    """The grey level that splits the histogram with the largest variance between its halves (Otsu 1979)."""
    share = np.bincount(grey.ravel()) / grey.size
    below, mean_below = np.cumsum(share), np.cumsum(share * np.arange(len(share)))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean_below[-1] * below - mean_below) ** 2 / (below * (1 - below))
    return int(np.nanargmax(between))


def iou(found: Found, truth: Found) -> float:
    return float((found & truth).sum() / (found | truth).sum())


def otsu_iou(modality: Modality, index: int) -> float:
    """Foreground IoU of Otsu's threshold, inverted on light ground."""
    image, mask = synthesize(index, size=192, modality=modality)
    grey = np.rint(image.mean(axis=2)).astype(np.uint16)
    light = grey > otsu_threshold(grey)
    return iou(~light if modality == "brightfield" else light, mask > 0)


@pytest.mark.parametrize(
    ("modality", "low", "high"), [("fluorescence", 0.55, 0.68), ("brightfield", 0.25, 0.45), ("camera", 0.55, 0.70)]
)
def test_a_threshold_is_some_good_but_not_enough(modality: Modality, low: float, high: float) -> None:
    assert low < np.mean([otsu_iou(modality, index) for index in range(NUM_MEASURED)]) < high


@pytest.mark.parametrize("modality", NUCLEI)
def test_masks_are_binary_and_cover_a_sensible_share(modality: Modality) -> None:
    shares = []
    for index in range(NUM_MEASURED):
        image, mask = synthesize(index, size=192, modality=modality)
        assert image.shape == (192, 192, 3)
        assert image.dtype == mask.dtype == np.uint8
        assert mask.shape == (192, 192)
        assert set(np.unique(mask)) == {0, 1}
        shares.append(mask.mean())
    assert 0.08 < min(shares) < max(shares) < 0.40
    assert 0.15 < np.mean(shares) < 0.25


@pytest.mark.parametrize("modality", ALL)
def test_the_mask_lies_where_the_nuclei_are(modality: Modality) -> None:
    """Edges of the picture run along the outlines of the mask, more than along the same outlines moved away."""
    along, elsewhere = [], []
    for index in range(10):
        image, mask = synthesize(index, size=192, modality=modality)
        edges = ndimage.gaussian_gradient_magnitude(image.mean(axis=2), 1.5)
        outline = ndimage.binary_dilation(mask > 0) & ~ndimage.binary_erosion(mask > 0, iterations=2)
        along.append(edges[outline].mean())
        elsewhere.append(edges[np.roll(outline, (61, 83), (0, 1))].mean())
    assert np.mean(along) > 1.5 * np.mean(elsewhere)


@pytest.mark.parametrize("modality", ALL)
def test_an_image_depends_on_its_seed_and_index_alone(modality: Modality) -> None:
    first = synthesize(7, size=64, modality=modality, seed=3)
    synthesize(8, size=64, modality=modality, seed=3)
    again = synthesize(7, size=64, modality=modality, seed=3)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for index, seed in ((8, 3), (7, 4)):
        assert (synthesize(index, size=64, modality=modality, seed=seed)[1] != first[1]).any()


def test_the_first_masks_are_what_they_were() -> None:
    """Numbers measured on the synthetic set, on any machine, are worth comparing only while this holds."""
    expected = {
        "nuclei": "eaa9750ad7189ffe4af0270c0d1359c84a9389cf23d731eea087d10fe44a5476",
        "cells": "2b11c7fc7167926713b37fb0509f2aa6af9fb9697ed86afe6027eddff289b033",
        "camera16": "9da9d2b51460b074c5e7d540eca25481223b06a6744d15b4df47863a6253d56a",
    }
    for kind, modalities in MODALITIES.items():
        masks = [
            synthesize(index, size=64, modality=modalities[index % len(modalities)])[1].tobytes() for index in range(4)
        ]
        assert hashlib.sha256(b"".join(masks)).hexdigest() == expected[kind], kind


@pytest.mark.parametrize("size", [16, 17, 300])
@pytest.mark.parametrize("modality", ALL)
def test_any_size_works(modality: Modality, size: int) -> None:
    image, mask = synthesize(0, size=size, modality=modality)
    assert image.shape == (size, size, 1 if modality == "camera" else 3)
    assert image.dtype == (np.uint16 if modality == "camera" else np.uint8)
    assert mask.shape == (size, size)
    assert mask.dtype == np.uint8


def test_kinds_of_sets_show_different_scenes() -> None:
    masks = [synthesize(0, size=192, modality=modality)[1] > 0 for modality in ("fluorescence", "stained", "camera")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert iou(masks[one], masks[other]) < 0.5


@pytest.mark.parametrize("kind", MODALITIES)
def test_files_keep_what_was_drawn(kind: SynthKind) -> None:
    for index in range(3):
        image, mask = synthesize(index, size=64, modality=MODALITIES[kind][-1])
        np.testing.assert_array_equal(decode_image(encode_image(image)), image)
        num_classes = NUM_CLASSES[kind]
        np.testing.assert_array_equal(decode_mask(encode_mask(mask, num_classes), num_classes), mask)


# ------------------------------------------------------------------------------------------------- cells


def test_cells_have_cytoplasm_around_most_nuclei() -> None:
    shares, bare = [], []
    for index in range(NUM_MEASURED):
        _, mask = synthesize(index, size=192, modality="stained")
        shares.append(np.bincount(mask.ravel(), minlength=3) / mask.size)
        nuclei, count = ndimage.label(mask == 2)
        around = ndimage.grey_dilation(nuclei, size=(3, 3)) * (nuclei == 0)
        touching = [np.mean(mask[around == label] == 1) for label in range(1, count + 1) if (around == label).any()]
        bare.append(np.mean(np.array(touching) < 0.5))
        assert set(np.unique(mask)) == {0, 1, 2}
    assert len(shares[0]) == 3
    ground, cytoplasm, nucleus = np.mean(shares, axis=0)
    assert 0.5 < ground < 0.75
    assert 0.2 < cytoplasm < 0.4
    assert 0.05 < nucleus < 0.12
    assert np.mean(bare) < 0.02


def test_no_colour_tells_cytoplasm_from_ground_or_nuclei() -> None:
    """Thresholds on what red and green light lose to the dyes find something, and not enough."""
    nuclei, cytoplasm = [], []
    for index in range(NUM_MEASURED):
        image, mask = synthesize(index, size=192, modality="stained")
        red_lost, green_lost = 255 - image[..., 0], 255 - image[..., 1]
        blue, dyed = red_lost > otsu_threshold(red_lost), green_lost > otsu_threshold(green_lost)
        nuclei.append(iou(blue, mask == 2))
        cytoplasm.append(iou(dyed & ~blue, mask == 1))
    assert 0.5 < np.mean(nuclei) < 0.75
    assert 0.5 < np.mean(cytoplasm) < 0.75


# ------------------------------------------------------------------------------------------------ camera


def test_camera_images_hold_counts_of_twelve_bits_above_an_offset() -> None:
    bright, clipped = [], []
    for index in range(NUM_MEASURED):
        image, mask = synthesize(index, size=192, modality="camera")
        assert set(np.unique(mask)) == {0, 1}
        assert 60 < image.min() < image.max() <= CAMERA_MAX
        assert len(np.unique(image)) > 100
        bright.append(np.quantile(image, 0.99))
        clipped.append(np.mean(image == CAMERA_MAX))
    assert min(bright) < 500
    assert max(bright) > 3000
    assert 0 < np.mean(clipped) < 0.005


def test_camera_noise_grows_with_the_light() -> None:
    """Shot noise: its variance is proportional to the counts, so that bright nuclei vary more than the dark ground."""
    slopes = []
    for index in range(NUM_MEASURED):
        image = synthesize(index, size=192, modality="camera")[0][..., 0].astype(np.float64)
        level = ndimage.gaussian_filter(image, 2)
        rough = (image - ndimage.gaussian_filter(image, 0.7)) ** 2
        dark, light = level < np.quantile(level, 0.2), level > np.quantile(level, 0.8)
        slopes.append(np.median(rough[light]) / np.median(rough[dark]))
    assert min(slopes) > 1
    assert np.median(slopes) > 2

"""Synthetic microscopy: exact masks, the same everywhere, and too hard for a threshold."""

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from scipy import ndimage

from unetpp.synth import MODALITIES, Modality, synthesize

NUM_MEASURED = 30


def otsu_threshold(grey: npt.NDArray[np.uint8]) -> int:
    """The grey level that splits the histogram with the largest variance between its halves (Otsu 1979)."""
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    below, mean_below = np.cumsum(share), np.cumsum(share * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean_below[-1] * below - mean_below) ** 2 / (below * (1 - below))
    return int(np.nanargmax(between))


def otsu_iou(modality: Modality, index: int) -> float:
    """Foreground IoU of Otsu's threshold, inverted on light ground."""
    image, mask = synthesize(index, size=192, modality=modality)
    grey = np.rint(image.mean(axis=2)).astype(np.uint8)
    light = grey > otsu_threshold(grey)
    found, truth = (~light if modality == "brightfield" else light), mask > 0
    return float((found & truth).sum() / (found | truth).sum())


@pytest.mark.parametrize(("modality", "low", "high"), [("fluorescence", 0.55, 0.68), ("brightfield", 0.25, 0.45)])
def test_a_threshold_is_some_good_but_not_enough(modality: Modality, low: float, high: float) -> None:
    assert low < np.mean([otsu_iou(modality, index) for index in range(NUM_MEASURED)]) < high


@pytest.mark.parametrize("modality", MODALITIES)
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


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_mask_lies_where_the_nuclei_are(modality: Modality) -> None:
    """Edges of the picture run along the outlines of the mask, more than along the same outlines moved away."""
    along, elsewhere = [], []
    for index in range(10):
        image, mask = synthesize(index, size=192, modality=modality)
        edges = ndimage.gaussian_gradient_magnitude(image.mean(axis=2), 1.5)
        outline = ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask, iterations=2)
        along.append(edges[outline].mean())
        elsewhere.append(edges[np.roll(outline, (61, 83), (0, 1))].mean())
    assert np.mean(along) > 1.5 * np.mean(elsewhere)


@pytest.mark.parametrize("modality", MODALITIES)
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
    masks = [synthesize(index, size=64, modality=MODALITIES[index % 2])[1].tobytes() for index in range(4)]
    assert (
        hashlib.sha256(b"".join(masks)).hexdigest()
        == "eaa9750ad7189ffe4af0270c0d1359c84a9389cf23d731eea087d10fe44a5476"
    )


@pytest.mark.parametrize("size", [16, 17, 300])
@pytest.mark.parametrize("modality", MODALITIES)
def test_any_size_works(modality: Modality, size: int) -> None:
    image, mask = synthesize(0, size=size, modality=modality)
    assert image.shape == (size, size, 3)
    assert mask.shape == (size, size)

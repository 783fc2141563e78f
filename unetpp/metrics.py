"""Overlap of masks: counts that add over images and workers, scores made from counts, bootstrap intervals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from unetpp.config import IGNORE

Counts = NDArray[np.int64]
"""Pixels by (true positive, false positive, false negative), shape K, 3: one row a foreground class."""

Values = Sequence[float] | NDArray[np.float64]


def confusion_counts(mask_HW: NDArray[np.uint8], target_HW: NDArray[np.uint8], num_classes: int) -> Counts:
    """Counts of each foreground class: 1 alone for binary masks (num_classes 1), else 1..num_classes-1.

    Pixels whose target is `IGNORE` do not count.
    """
    if (ignored_HW := target_HW == IGNORE).any():
        mask_HW, target_HW = mask_HW[~ignored_HW], target_HW[~ignored_HW]
    classes = range(1, max(num_classes, 2))
    return np.array(
        [
            (
                np.count_nonzero((mask_HW == c) & (target_HW == c)),
                np.count_nonzero((mask_HW == c) & (target_HW != c)),
                np.count_nonzero((mask_HW != c) & (target_HW == c)),
            )
            for c in classes
        ],
        dtype=np.int64,
    )


def iou(counts: Counts) -> float:
    """Intersection over union, mean over the classes that occur in mask or target; 1 where none does."""
    return _mean_of_present(counts[:, 0], counts.sum(1))


def dice(counts: Counts) -> float:
    """Dice coefficient (F1 of pixels), mean over the classes that occur; 1 where none does."""
    return _mean_of_present(2 * counts[:, 0], 2 * counts[:, 0] + counts[:, 1] + counts[:, 2])


def _mean_of_present(numerator_K: Counts, denominator_K: Counts) -> float:
    present_K = denominator_K > 0
    return float((numerator_K[present_K] / denominator_K[present_K]).mean()) if present_K.any() else 1.0


def bootstrap_interval(
    values: Values, *, num_bootstrap: int, seed: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Two-sided percentile bootstrap interval of the mean over images."""
    low, high = _bootstrap_mean(values, num_bootstrap, seed, confidence, "two-sided")
    return low, high


def loss_upper_bound(best: Values, other: Values, *, num_bootstrap: int, seed: int, confidence: float) -> float:
    """Upper bound, at `confidence`, of mean(best - other): the paired bootstrap draws images, both models see the same.

    `best` and `other` are per-image scores in the same order of images.
    """
    difference = np.asarray(best, np.float64) - np.asarray(other, np.float64)
    return _bootstrap_mean(difference, num_bootstrap, seed, confidence, "less")[1]


def _bootstrap_mean(
    values: Values, num_bootstrap: int, seed: int, confidence: float, alternative: str
) -> tuple[float, float]:
    array = np.asarray(values, np.float64)
    if len(array) < 2 or np.ptp(array) == 0:  # nothing to resample
        return float(array.mean()), float(array.mean())
    interval = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=num_bootstrap,
        batch=256,
        confidence_level=confidence,
        alternative=alternative,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)

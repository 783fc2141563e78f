"""Counts, scores and intervals against plain set arithmetic."""

import numpy as np
import pytest

from unetpp.config import IGNORE
from unetpp.metrics import bootstrap_interval, confusion_counts, dice, iou, loss_upper_bound


def test_binary_scores_are_set_overlaps() -> None:
    rng = np.random.default_rng(0)
    mask, target = (rng.random((2, 20, 30)) > 0.5).astype(np.uint8)
    a, b = set(np.flatnonzero(mask)), set(np.flatnonzero(target))
    counts = confusion_counts(mask, target, 1)
    assert counts.tolist() == [[len(a & b), len(a - b), len(b - a)]]
    assert iou(counts) == len(a & b) / len(a | b)
    assert dice(counts) == 2 * len(a & b) / (len(a) + len(b))


def test_counts_add_over_images_and_workers() -> None:
    rng = np.random.default_rng(1)
    masks, targets = rng.integers(0, 4, (2, 6, 8, 8), np.uint8)
    together = confusion_counts(masks.reshape(48, 8), targets.reshape(48, 8), 4)
    assert together.shape == (3, 3)
    assert np.array_equal(sum(confusion_counts(m, t, 4) for m, t in zip(masks, targets, strict=True)), together)


def test_classes_that_do_not_occur_are_left_out_of_the_mean() -> None:
    mask = np.array([[1, 1, 0, 0]], np.uint8)
    assert iou(confusion_counts(mask, mask, 5)) == 1.0
    assert iou(confusion_counts(mask, np.zeros_like(mask), 5)) == 0.0


def test_nothing_found_where_nothing_is_is_perfect() -> None:
    empty = np.zeros((4, 4), np.uint8)
    assert iou(confusion_counts(empty, empty, 1)) == 1.0
    assert dice(confusion_counts(empty, empty, 1)) == 1.0


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = [
        low <= 0.5 <= high
        for low, high in (bootstrap_interval(rng.uniform(size=60), num_bootstrap=400, seed=n) for n in range(200))
    ]
    assert 0.89 <= np.mean(held) <= 0.99


def test_a_paired_bound_is_far_tighter_than_the_spread_of_images() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.uniform(0.2, 1.0, 80)
    best, other = difficulty, difficulty - 0.004 + rng.normal(0, 0.002, 80)
    bound = loss_upper_bound(best, other, num_bootstrap=1000, seed=0, confidence=0.95)
    assert 0.004 < bound < 0.006
    assert loss_upper_bound(best, best, num_bootstrap=1000, seed=0, confidence=0.95) == 0.0


def test_intervals_repeat_with_their_seed() -> None:
    values = np.random.default_rng(4).uniform(size=30)
    first = bootstrap_interval(values, num_bootstrap=300, seed=7)
    assert first == bootstrap_interval(values, num_bootstrap=300, seed=7)
    assert first == pytest.approx(bootstrap_interval(values, num_bootstrap=3000, seed=8), abs=0.03)


def test_pixels_that_are_not_labelled_do_not_count() -> None:
    rng = np.random.default_rng(4)
    mask, target = rng.integers(0, 3, (2, 10, 10), np.uint8)
    half = target.copy()
    half[:, 5:] = IGNORE
    assert np.array_equal(confusion_counts(mask, half, 3), confusion_counts(mask[:, :5], target[:, :5], 3))

"""Temperature scaling: the temperature that logits were spoilt with is found again, and the figures are the papers'."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from unetpp.calibrate import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    draw_pixels,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from unetpp.errors import ConfigError

NUM_PIXELS = 200_000


def honest(num_classes: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Logits, and targets drawn with just the probabilities that these logits state."""
    rng = np.random.default_rng(seed)
    logits_NK = rng.normal(0, 2, (NUM_PIXELS, num_classes)).astype(np.float32)
    if num_classes == 1:
        return logits_NK, (rng.random(NUM_PIXELS) < 1 / (1 + np.exp(-logits_NK[:, 0]))).astype(np.uint8)
    noise = rng.gumbel(size=logits_NK.shape)  # the largest of logits + Gumbel noise is a draw from their softmax
    return logits_NK, (logits_NK + noise).argmax(1).astype(np.uint8)


@pytest.mark.parametrize("num_classes", [1, 4])
@pytest.mark.parametrize("spoilt_by", [0.4, 1.0, 3.0])
def test_the_temperature_that_spoilt_honest_logits_is_found_again(num_classes: int, spoilt_by: float) -> None:
    logits_NK, targets_N = honest(num_classes)
    spoilt_NK = logits_NK * spoilt_by
    found = fit_temperature(spoilt_NK, targets_N)
    assert found == pytest.approx(spoilt_by, rel=0.02)
    assert found == fit_temperature(spoilt_NK, targets_N)
    before, after = (negative_log_likelihood(spoilt_NK / t, targets_N) for t in (1.0, found))
    assert after <= before + 1e-9
    assert expected_calibration_error(spoilt_NK / found, targets_N) < 0.006
    if spoilt_by != 1.0:
        assert expected_calibration_error(spoilt_NK, targets_N) > 0.05
    for other in (0.9 * found, 1.1 * found):
        assert negative_log_likelihood(spoilt_NK / other, targets_N) > after


@pytest.mark.parametrize("num_classes", [1, 4])
def test_the_likelihood_is_torchs(num_classes: int) -> None:
    logits_NK, targets_N = honest(num_classes)
    logits, targets = torch.from_numpy(logits_NK).double(), torch.from_numpy(targets_N)
    if num_classes == 1:
        wanted = F.binary_cross_entropy_with_logits(logits[:, 0], targets.double())
    else:
        wanted = F.cross_entropy(logits, targets.long())
    assert negative_log_likelihood(logits_NK, targets_N) == pytest.approx(wanted.item(), rel=1e-9)
    huge = np.array([[1000.0], [-1000.0]])
    assert negative_log_likelihood(huge, np.array([1, 0])) == 0
    assert negative_log_likelihood(huge, np.array([0, 1])) == 1000


@pytest.mark.parametrize("num_classes", [1, 4])
def test_the_calibration_error_is_that_of_counting_bin_by_bin(num_classes: int) -> None:
    logits_NK, targets_N = honest(num_classes)
    logits_NK, targets_N = 2 * logits_NK[:3000].astype(np.float64), targets_N[:3000]
    if num_classes == 1:
        logits_NK = np.concatenate([np.zeros_like(logits_NK), logits_NK], axis=1)
    probability_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(1, keepdims=True)
    wanted = 0.0
    for number in range(15):
        inside = [
            (row.max(), row.argmax() == target)
            for row, target in zip(probability_NK, targets_N, strict=True)
            if number <= row.max() * 15 < number + 1
        ]
        if inside:
            confidence, accuracy = np.mean(inside, axis=0)
            wanted += len(inside) / 3000 * abs(confidence - accuracy)
    asked_NK = logits_NK[:, 1:] if num_classes == 1 else logits_NK
    assert expected_calibration_error(asked_NK, targets_N) == pytest.approx(wanted, rel=1e-6)


def test_what_is_always_right_or_always_wrong_stays_within_the_bounds() -> None:
    logits_NK, targets_N = np.array([[2.0], [-2.0]] * 50), np.array([1, 0] * 50)
    assert fit_temperature(logits_NK, targets_N) == pytest.approx(MIN_TEMPERATURE, rel=1e-3)
    assert fit_temperature(logits_NK, 1 - targets_N) == pytest.approx(MAX_TEMPERATURE, rel=1e-3)


def test_ignored_pixels_do_not_count() -> None:
    logits_NK, targets_N = honest(4)
    unknown_N = np.arange(NUM_PIXELS) % 3 == 0
    marked_N = np.where(unknown_N, 255, targets_N)
    spoilt_NK = np.where(unknown_N[:, None], 50.0, 2 * logits_NK)
    assert fit_temperature(spoilt_NK, marked_N) == fit_temperature(2 * logits_NK[~unknown_N], targets_N[~unknown_N])
    drawn_NK, drawn_N = draw_pixels(
        spoilt_NK.reshape(400, 500, 4), marked_N.reshape(400, 500), 1000, np.random.default_rng(0)
    )
    assert drawn_NK.shape == (1000, 4)
    assert set(np.unique(drawn_N)) == {0, 1, 2, 3}


def test_drawn_pixels_are_pixels_with_their_targets_each_once_and_the_same_again() -> None:
    places = np.arange(30 * 20, dtype=np.float32).reshape(30, 20, 1)
    targets_HW = (places[..., 0] % 7).astype(np.uint8)
    drawn = [draw_pixels(places, targets_HW, 100, np.random.default_rng(3)) for _ in range(2)]
    (logits_NK, targets_N), again = drawn
    assert len(np.unique(logits_NK)) == 100
    assert np.array_equal(logits_NK[:, 0] % 7, targets_N)
    assert np.array_equal(logits_NK, again[0])
    assert len(draw_pixels(places, targets_HW, 10_000, np.random.default_rng(3))[1]) == 600


def test_nothing_to_fit_on_is_told() -> None:
    with pytest.raises(ConfigError, match="no labelled pixel"):
        fit_temperature(np.zeros((4, 1)), np.full(4, 255))
    with pytest.raises(ConfigError, match="NaN or infinity"):
        fit_temperature(np.array([[np.nan], [1.0]]), np.array([0, 1]))

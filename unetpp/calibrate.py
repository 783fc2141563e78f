"""How sure a model may be: one temperature a head, so that of the pixels it gives 80 %, 80 % are right.

Guo, Pleiss, Sun and Weinberger 2017, *On Calibration of Modern Neural Networks*, arXiv 1706.04599: temperature scaling
is their section 4.2, the expected calibration error their section 2. Logits are NK: N pixels, K as `num_classes` (one
logit for a binary mask); targets are N class ids.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax

from unetpp.config import IGNORE
from unetpp.errors import ConfigError
from unetpp.model import UNetPlusPlus

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0
"""Bounds of a fit: a head that is always right on few pixels would otherwise become sure of everything."""

NUM_BINS = 15

Logits = NDArray[np.floating]
Targets = NDArray[np.integer]


def fit_temperature(logits_NK: Logits, targets_N: Targets) -> float:
    """The temperature, 0.1 to 10, at which the pixels' negative log-likelihood is least; to 4 digits.

    The loss is convex in 1 / temperature, so there is one minimum. ConfigError where no pixel is left beside those
    whose target is `IGNORE`, or where a logit is not finite.
    """
    logits_NK, targets_N = _known(logits_NK, targets_N)
    low, high = np.log([MIN_TEMPERATURE, MAX_TEMPERATURE])
    best = minimize_scalar(
        lambda logarithm: negative_log_likelihood(logits_NK / np.exp(logarithm), targets_N),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.round(np.exp(best.x), 4))


def negative_log_likelihood(logits_NK: Logits, targets_N: Targets) -> float:
    """Mean over the pixels of -log(probability of the true class)."""
    logits_NK = logits_NK.astype(np.float64)
    if logits_NK.shape[1] == 1:  # log(1 + exp(-z)) of the true class's logit z, without overflow
        return float(np.logaddexp(0.0, np.where(targets_N > 0, -logits_NK[:, 0], logits_NK[:, 0])).mean())
    return float(-log_softmax(logits_NK, axis=1)[np.arange(len(targets_N)), targets_N].mean())


def expected_calibration_error(logits_NK: Logits, targets_N: Targets, num_bins: int = NUM_BINS) -> float:
    """Mean distance of confidence and accuracy, 0..1, over bins of equal width weighted by their pixels.

    Confidence is the probability of the class that is predicted, so a binary mask uses the bins above 1/2 only.
    """
    logits_NK = logits_NK.astype(np.float64)
    if logits_NK.shape[1] == 1:
        confidence_N, predicted_N = expit(np.abs(logits_NK[:, 0])), (logits_NK[:, 0] > 0).astype(targets_N.dtype)
        targets_N = (targets_N > 0).astype(targets_N.dtype)
    else:
        confidence_N, predicted_N = np.exp(log_softmax(logits_NK, axis=1).max(1)), logits_NK.argmax(1)
    bins_N = np.minimum((confidence_N * num_bins).astype(np.int64), num_bins - 1)
    surplus_N = confidence_N - (predicted_N == targets_N)
    return float(np.abs(np.bincount(bins_N, surplus_N, num_bins)).sum() / len(targets_N))


def draw_pixels(
    logits_HWK: Logits, target_HW: Targets, number: int, rng: np.random.Generator
) -> tuple[Logits, Targets]:
    """logits_NK and targets_N of at most `number` pixels of an image whose target is not `IGNORE`."""
    known = np.flatnonzero(target_HW.ravel() != IGNORE)
    chosen = rng.choice(known, number, replace=False, shuffle=False) if len(known) > number else known
    return logits_HWK.reshape(target_HW.size, -1)[chosen], target_HW.ravel()[chosen]


def with_temperature(model: UNetPlusPlus, temperature: Mapping[int, float]) -> UNetPlusPlus:
    """The same weights with other temperatures, by level; heads that are not named have 1."""
    calibrated = UNetPlusPlus(model.config.model_copy(update={"temperature": dict(sorted(temperature.items()))}))
    calibrated.load_state_dict(model.state_dict())
    return calibrated.to(next(model.parameters()).device).train(model.training)


def _known(logits_NK: Logits, targets_N: Targets) -> tuple[Logits, Targets]:
    labelled_N = targets_N != IGNORE
    logits_NK, targets_N = logits_NK[labelled_N], targets_N[labelled_N]
    if not len(targets_N):
        raise ConfigError("no labelled pixel is there to calibrate on; take a split with labels")
    if not np.isfinite(logits_NK).all():
        raise ConfigError("the network gives NaN or infinity on the images to calibrate on: its weights are broken")
    return logits_NK, targets_N

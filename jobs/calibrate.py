"""Fit one temperature a head on validation images, so that probabilities mean what they say."""

from collections.abc import Sequence

import numpy as np

from jobs.dataset import LabelledImage
from unetpp.calibrate import (
    draw_pixels,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    with_temperature,
)
from unetpp.checkpoint import Calibration
from unetpp.errors import ConfigError
from unetpp.measuring import logits_by_level, where_fastest
from unetpp.model import UNetPlusPlus

MAX_LOGITS = 1_000_000
"""Values that a temperature is fitted on, classes counted one by one: one number does not need more."""


def calibrate(
    model: UNetPlusPlus, images: Sequence[LabelledImage], *, seed: int = 0
) -> tuple[UNetPlusPlus, dict[int, Calibration]]:
    """The model with a temperature for each head, and by level what that did on the pixels it was fitted on.

    Pixels are drawn by `seed`, at most `MAX_LOGITS` / num_classes of them, the same number of each image where it has
    so many: as in the mean IoU, no image counts for its size. Those that are not labelled are left out. Fast masks
    do not change; accurate mode, and every uncertainty, does.

    ConfigError where there is no image, no labelled pixel, or no finite output.
    """
    if not images:
        raise ConfigError("no image is there to calibrate on; take a split that has some")
    rng = np.random.default_rng(seed)
    number = max(1, MAX_LOGITS // (len(images) * model.config.num_classes))
    levels = model.config.head_levels
    drawn, targets, measured = [], [], where_fastest(model)
    for image in images:
        logits = logits_by_level(measured, image.image_HWC)
        # One draw for all heads: they are compared with each other.
        stacked_HWK = np.concatenate([logits[level] for level in levels], axis=2)
        logits_NK, targets_N = draw_pixels(stacked_HWK, image.target_HW, number, rng)
        drawn.append(logits_NK)
        targets.append(targets_N)
    heads = np.split(np.concatenate(drawn), len(levels), axis=1)
    targets_N = np.concatenate(targets)
    found: dict[int, Calibration] = {}
    for level, logits_NK in zip(levels, heads, strict=True):
        temperature = fit_temperature(logits_NK, targets_N)
        found[level] = Calibration(
            temperature=temperature,
            num_pixels=len(targets_N),
            nll_before=negative_log_likelihood(logits_NK, targets_N),
            nll_after=negative_log_likelihood(logits_NK / temperature, targets_N),
            ece_before=expected_calibration_error(logits_NK, targets_N),
            ece_after=expected_calibration_error(logits_NK / temperature, targets_N),
        )
    return with_temperature(model, {level: fitted.temperature for level, fitted in found.items()}), found

"""Calibration of a model on labelled images: a temperature a head, and nothing else changes."""

import numpy as np
import pytest
import torch

from jobs.calibrate import calibrate
from jobs.contract import SynthConfig
from jobs.dataset import LabelledImage, load, open_labelled_set
from jobs.synth import run as synthesise
from unetpp.calibrate import fit_temperature, negative_log_likelihood
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.measuring import logits_by_level, masks_by_level
from unetpp.model import UNetPlusPlus

CONFIG = ModelConfig(level=2, filters=(4, 6, 8))


@pytest.fixture(scope="module")
def model() -> UNetPlusPlus:
    torch.manual_seed(1)
    return UNetPlusPlus(CONFIG).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledImage]:
    folder = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(folder), num=4, size=64, seed=5))
    return load(open_labelled_set(str(folder)).samples, CONFIG)


def test_every_head_gets_the_temperature_of_all_its_pixels(model: UNetPlusPlus, images: list[LabelledImage]) -> None:
    calibrated, found = calibrate(model, images)
    assert calibrated.config == CONFIG.model_copy(update={"temperature": {n: found[n].temperature for n in (1, 2)}})
    for level, fitted in found.items():
        logits_NK = np.concatenate([logits_by_level(model, each.image_HWC)[level].reshape(-1, 1) for each in images])
        targets_N = np.concatenate([each.target_HW.ravel() for each in images])
        assert fitted.num_pixels == len(targets_N) == 4 * 64 * 64
        assert fitted.temperature == fit_temperature(logits_NK, targets_N)
        assert fitted.nll_before == pytest.approx(negative_log_likelihood(logits_NK, targets_N))
        assert fitted.nll_after < fitted.nll_before


def test_weights_and_fast_masks_stay_and_accurate_masks_change(
    model: UNetPlusPlus, images: list[LabelledImage]
) -> None:
    calibrated, _ = calibrate(model, images)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in calibrated.state_dict().items())
    assert model.config.temperature == {}
    before, after = (masks_by_level(each, images[0].image_HWC) for each in (model, calibrated))
    assert np.array_equal(before["L1"], after["L1"])
    assert np.array_equal(before["L2"], after["L2"])
    assert not np.array_equal(before["accurate"], after["accurate"])


def test_a_calibrated_model_is_calibrated_anew_from_its_logits(
    model: UNetPlusPlus, images: list[LabelledImage]
) -> None:
    once, found = calibrate(model, images)
    twice, again = calibrate(once, images)
    assert again == found
    assert twice.config == once.config


def test_a_sample_of_pixels_serves_as_well(
    model: UNetPlusPlus, images: list[LabelledImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, full = calibrate(model, images)
    monkeypatch.setattr("jobs.calibrate.MAX_LOGITS", 4000)
    _, drawn = calibrate(model, images)
    assert drawn == calibrate(model, images, seed=0)[1]
    assert drawn != calibrate(model, images, seed=1)[1]
    for level, fitted in drawn.items():
        assert fitted.num_pixels == 4000
        assert fitted.temperature == pytest.approx(full[level].temperature, rel=0.25)


def test_unlabelled_pixels_are_left_out(model: UNetPlusPlus, images: list[LabelledImage]) -> None:
    marked = [LabelledImage(each.sample, each.image_HWC, each.target_HW.copy()) for each in images]
    for each in marked:
        each.target_HW[:, :16] = 255
    _, found = calibrate(model, marked)
    assert found[1].num_pixels == 4 * 64 * 48
    with pytest.raises(ConfigError, match="no image"):
        calibrate(model, [])

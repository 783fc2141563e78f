"""Weights as arrays: what a config expects is what torch makes of it, and folding changes no output."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from unetpp.card import WEIGHTS
from unetpp.checkpoint import arrays_of, model_of, save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ModelError
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Predictor
from unetpp.weights import expected, folded, picked, pruned

VARIANTS = list(itertools.product((1, 2, 4), ("batch", "none"), ("deconv", "nearest", "bilinear"), (True, False)))


@pytest.mark.parametrize(("level", "norm", "upsample", "deep_supervision"), VARIANTS)
def test_what_a_config_expects_is_the_state_of_its_network(
    level: int, norm: str, upsample: str, deep_supervision: bool
) -> None:
    config = ModelConfig.model_validate(
        {
            "level": level,
            "norm": norm,
            "upsample": upsample,
            "deep_supervision": deep_supervision,
            "filters": (4, 5, 6, 7, 8),
            "in_channels": 2,
            "num_classes": 3,
        }
    )
    seen = {name: (array.shape, str(array.dtype)) for name, array in arrays_of(UNetPlusPlus(config)).items()}
    assert seen == expected(config)


@pytest.mark.parametrize("norm", ["batch", "none"])
@torch.no_grad()
def test_folding_keeps_the_logits(norm: str) -> None:
    torch.manual_seed(0)
    model = UNetPlusPlus(ModelConfig.model_validate({"filters": (4, 6, 8, 10, 12), "norm": norm}))
    for _ in range(3):
        model.train()(torch.rand(4, 3, 64, 64))
    plain = model_of(*folded(model.config, arrays_of(model)))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    x_BCHW = torch.rand(1, 3, 64, 64)
    for level, logits in model.eval()(x_BCHW).items():
        torch.testing.assert_close(plain(x_BCHW)[level], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nodes.x00.0.weight", np.nan, "nodes.x00.0.weight in .* has NaN or infinity"),
        ("heads.1.bias", np.inf, "heads.1.bias in .* has NaN or infinity"),
        ("nodes.x10.1.running_var", -1.0, "nodes.x10.1.running_var in .* has variances below 0"),
    ],
)
def test_weights_that_no_network_can_have_are_refused(name: str, value: float, message: str, tmp_path: Path) -> None:
    """Engines differ in what they make of them: OpenVINO's ReLU takes NaN for 0."""
    save_pretrained(UNetPlusPlus(ModelConfig(level=1, filters=(4, 6))), tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights[name].flat[0] = value
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=message):
        Predictor.from_pretrained(tmp_path)


def test_a_level_picks_weights_and_edits_none() -> None:
    model = UNetPlusPlus(ModelConfig(filters=(4, 6, 8, 10, 12)))
    arrays = arrays_of(model)
    part = picked(arrays, pruned(model.config, 2))
    assert {name for name in part if name.startswith("heads")} == {"heads.2.weight", "heads.2.bias"}
    assert "nodes.x30.0.weight" not in part
    assert all(np.array_equal(array, arrays[name]) for name, array in part.items())

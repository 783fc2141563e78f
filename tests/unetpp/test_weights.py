"""Weights as arrays: what a config expects is what torch makes of it, and folding changes no output."""

import itertools

import numpy as np
import pytest
import torch

from unetpp.checkpoint import arrays_of, model_of
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus
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


def test_a_level_picks_weights_and_edits_none() -> None:
    model = UNetPlusPlus(ModelConfig(filters=(4, 6, 8, 10, 12)))
    arrays = arrays_of(model)
    part = picked(arrays, pruned(model.config, 2))
    assert {name for name in part if name.startswith("heads")} == {"heads.2.weight", "heads.2.bias"}
    assert "nodes.x30.0.weight" not in part
    assert all(np.array_equal(array, arrays[name]) for name, array in part.items())

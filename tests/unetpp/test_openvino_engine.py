"""The OpenVINO graph against torch: the same masks, margins, probabilities and complaints."""

from typing import Any

import numpy as np
import pytest
import torch

from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.model import UNetPlusPlus
from unetpp.openvino_engine import OpenVINOEngine
from unetpp.predictor import Predictor
from unetpp.torch_engine import TorchEngine

CORE = (slice(8, 60), slice(0, 90))
KINDS: list[dict[str, Any]] = [
    {"level": 1, "num_classes": 3, "gamma": 0.5},
    {"level": 2, "norm": "none", "deep_supervision": False, "mean": (0.1, 0.2, 0.3)},
    {"level": 3, "upsample": "bilinear", "num_classes": 3},
    {"level": 4, "upsample": "nearest", "temperature": {4: 1.7}},
    {"level": 4, "in_channels": 1, "value_range": {"uint16": (0, 4095)}},
]


def network(**kind: Any) -> UNetPlusPlus:
    """A small network with normalisation statistics that are not those of a new one."""
    torch.manual_seed(1)
    model = UNetPlusPlus(ModelConfig.model_validate({"filters": (8, 8, 12, 12, 16), **kind}))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def tiles(pixel_type: str, channels: int = 3) -> Any:
    """Two tiles of noise."""
    values = np.random.default_rng(2).random((2, 64, 96, channels), np.float32)
    return values if pixel_type == "float32" else (values * np.iinfo(pixel_type).max).astype(pixel_type)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"L{kind['level']}")
@pytest.mark.parametrize(("pixel_type", "mode"), [("uint8", "fast"), ("uint16", "fast"), ("float32", "accurate")])
def test_masks_margins_and_probabilities_are_those_of_torch(kind: dict[str, Any], pixel_type: str, mode: Any) -> None:
    model = network(**kind)
    tiles_BHWC = tiles(pixel_type, model.config.in_channels)
    flips = mode == "accurate"
    wanted, wanted_stats = TorchEngine(model, mode, flips=flips, probability=True)(tiles_BHWC, CORE)
    seen, stats = OpenVINOEngine(model, mode, threads=1, flips=flips, probability=True)(tiles_BHWC, CORE)
    assert seen.shape == wanted.shape == (2, 52, 90)
    assert (seen != wanted).mean() <= 1e-3
    for one, other in zip(stats, wanted_stats, strict=True):
        assert one.finite
        assert one.margin == pytest.approx(other.margin, abs=1e-5)
        assert one.probability_HW is not None
        assert other.probability_HW is not None
        assert np.abs(one.probability_HW.astype(int) - other.probability_HW).max() <= 1


def test_a_network_that_gives_nan_says_so() -> None:
    model = network(level=1)
    model.heads["1"].bias.data[:] = torch.nan
    _, stats = OpenVINOEngine(model, "fast", threads=1)(tiles("uint8"), CORE)
    assert [each.finite for each in stats] == [False, False]


def test_other_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match="int32"):
        OpenVINOEngine(network(level=1), "fast", threads=1)(tiles("uint8").astype(np.int32), CORE)


@pytest.mark.parametrize("level", [2, 4])
def test_tiling_is_invisible(level: int, tmp_path: Any) -> None:
    save_pretrained(network(level=level), tmp_path)
    image_HWC = np.random.default_rng(3).integers(0, 256, (301, 417, 3), np.uint8)
    tiled, whole = (
        Predictor.from_pretrained(tmp_path, engine="openvino", threads=1, tile_px=tile_px)([image_HWC])[0]
        for tile_px in (128, 512)
    )
    assert (tiled != whole).mean() <= (0 if level <= 2 else 1e-4)


def test_openvino_is_refused_on_a_gpu(tmp_path: Any) -> None:
    save_pretrained(network(level=1), tmp_path)
    with pytest.raises(ConfigError, match="openvino computes on CPU"):
        Predictor.from_pretrained(tmp_path, engine="openvino", device="cuda")

"""A model as a folder: model.safetensors, config.json, README.md. No pickle; weights and config must agree exactly.

`digest` names what a model computes: equal digests mean equal masks.
"""

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import save

from unetpp import packaged, weights
from unetpp.card import (
    CONFIG,
    WEIGHTS,
    Calibration,
    Choice,
    GroupScore,
    LevelScore,
    Pretrained,
    TrainingData,
    model_card,
    read_pretrained,
)
from unetpp.config import Level, ModelConfig
from unetpp.model import UNetPlusPlus, count_parameters
from unetpp.prune import prune
from unetpp.weights import Weights

__all__ = [
    "Calibration",
    "Choice",
    "GroupScore",
    "LevelScore",
    "Pretrained",
    "TrainingData",
    "arrays_of",
    "digest",
    "from_pretrained",
    "model_of",
    "read_pretrained",
    "save_pretrained",
]

CARD = "README.md"


def save_pretrained(model: UNetPlusPlus, model_dir: Path | str, pretrained: Pretrained | None = None) -> None:
    """Write `model` as a folder; `pretrained` adds classes, scores and history to its config.

    config.json is written last: a folder without it is no model.
    """
    pretrained = (pretrained or Pretrained(model=model.config)).model_copy(update={"model": model.config})
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    # As bytes: safetensors' own writer makes files that nobody else may read.
    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    (model_dir / WEIGHTS).write_bytes(content)
    (model_dir / CARD).write_text(model_card(pretrained, count_parameters(model)), encoding="utf-8")
    (model_dir / CONFIG).write_text(pretrained.model_dump_json(indent=2) + "\n", encoding="utf-8")


def from_pretrained(model_dir: Path | str, level: Level | None = None, *, keep_heads: bool = False) -> UNetPlusPlus:
    """The model of a folder in eval mode on the CPU; with `level`, pruned to it (see `unetpp.prune.prune`).

    One word that is no folder here is the name of a packaged model (see `unetpp.packaged`).

    ModelError where weights are absent, damaged or do not fit the config; ConfigError where `level` has no head.
    """
    model_dir = packaged.resolve(model_dir)
    config = read_pretrained(model_dir).model
    model = model_of(config, weights.read_weights(model_dir, config))
    return model if level is None else prune(model, level, keep_heads=keep_heads)


def model_of(config: ModelConfig, arrays: Weights) -> UNetPlusPlus:
    """The network of these weights in eval mode on the CPU."""
    model = UNetPlusPlus(config)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval()


def digest(model: UNetPlusPlus, **decision: str) -> str:
    """As `unetpp.weights.digest`, of a model in memory."""
    return weights.digest(model.config, arrays_of(model), **decision)


def arrays_of(model: UNetPlusPlus) -> dict[str, NDArray[Any]]:
    """The weights of a model in memory."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}

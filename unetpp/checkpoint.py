"""A model as a folder: model.safetensors, config.json, README.md. No pickle; weights and config must agree exactly.

`digest` names what a model computes: equal digests mean equal masks.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unetpp import packaged
from unetpp.card import Calibration, Choice, GroupScore, LevelScore, Pretrained, TrainingData, model_card
from unetpp.config import Level
from unetpp.errors import ModelError
from unetpp.model import UNetPlusPlus, count_parameters
from unetpp.prune import prune

__all__ = [
    "Calibration",
    "Choice",
    "GroupScore",
    "LevelScore",
    "Pretrained",
    "TrainingData",
    "digest",
    "from_pretrained",
    "read_pretrained",
    "save_pretrained",
]

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(model: UNetPlusPlus, model_dir: Path | str, pretrained: Pretrained | None = None) -> None:
    """Write `model` as a folder; `pretrained` adds classes, scores and history to its config.

    config.json is written last: a folder without it is no model.
    """
    pretrained = (pretrained or Pretrained(model=model.config)).model_copy(update={"model": model.config})
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, model_dir / WEIGHTS)
    (model_dir / CARD).write_text(model_card(pretrained, count_parameters(model)), encoding="utf-8")
    (model_dir / CONFIG).write_text(pretrained.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_pretrained(model_dir: Path | str) -> Pretrained:
    """config.json of a model folder, or of a packaged model by its name.

    ModelError where the folder or the file is absent or not valid.
    """
    path = packaged.resolve(model_dir) / CONFIG
    try:
        return Pretrained.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"there is no model at {model_dir}: wanted a folder with {CONFIG} and {WEIGHTS}") from None
    except (NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; wanted a folder with {CONFIG} and {WEIGHTS}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ModelError(f"{path} is not a model's config: {where}: {first['msg']}") from None


def from_pretrained(model_dir: Path | str, level: Level | None = None, *, keep_heads: bool = False) -> UNetPlusPlus:
    """The model of a folder in eval mode on the CPU; with `level`, pruned to it (see `unetpp.prune.prune`).

    One word that is no folder here is the name of a packaged model (see `unetpp.packaged`).

    ModelError where weights are absent, damaged or do not fit the config; ConfigError where `level` has no head.
    """
    model_dir = packaged.resolve(model_dir)
    model = UNetPlusPlus(read_pretrained(model_dir).model)
    path = model_dir / WEIGHTS
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing beside its {CONFIG}; copy the whole model folder") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}); copy the model folder again") from None
    _refuse_mismatch(path, model.state_dict(), weights)
    model.load_state_dict(weights)
    model.eval()
    return model if level is None else prune(model, level, keep_heads=keep_heads)


def _refuse_mismatch(path: Path, wanted: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    for name in sorted(wanted.keys() | seen.keys()):
        if name not in seen or name not in wanted:
            state = "missing from" if name not in seen else "not part of the config's network but in"
            raise ModelError(f"{name} is {state} {path}; weights and {CONFIG} are of different models")
        if wanted[name].shape != seen[name].shape or wanted[name].dtype != seen[name].dtype:
            raise ModelError(
                f"{name} in {path} is {tuple(seen[name].shape)} {seen[name].dtype}, "
                f"{CONFIG} wants {tuple(wanted[name].shape)} {wanted[name].dtype}; they are of different models"
            )


def digest(model: UNetPlusPlus, **decision: str) -> str:
    """SHA-256 (hex) of the weights, the architecture and scaling, and what else decides a pixel (mode, precision).

    A full model asked for level L and its pruned export have one digest: they compute the same masks.
    """
    sha = hashlib.sha256()
    config = model.config.model_dump(mode="json", exclude={"ignore_index"})  # of the labels: it changes no mask
    if len(model.config.head_levels) == 1:
        config["deep_supervision"] = False
    config["filters"] = config["filters"][: model.config.level + 1]
    config["temperature"] = {level: degree for level, degree in config["temperature"].items() if degree != 1.0}
    if not config["temperature"]:
        del config["temperature"]
    if config["bands"] is None:
        del config["bands"]
    sha.update(json.dumps({"model": config, **decision}, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

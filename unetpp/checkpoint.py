"""A model as a folder: model.safetensors, config.json, README.md. No pickle; weights and config must agree exactly.

`digest` names what a model computes: equal digests mean equal masks.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unetpp import packaged
from unetpp.config import Frozen, Level, ModelConfig
from unetpp.errors import ModelError
from unetpp.model import UNetPlusPlus, count_parameters
from unetpp.prune import prune

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class LevelScore(Frozen):
    """Quality and cost of one level, as measured when the model was evaluated."""

    split: str | None
    num_images: int
    mean_iou: float
    mean_iou_interval: tuple[float, float]
    num_parameters: int
    gmacs_per_megapixel: float
    seconds_per_megapixel: float
    groups: dict[str, float] = Field({}, description="mean IoU by group, where the data set has groups")


class Pretrained(Frozen):
    """config.json: everything about a model but its weights."""

    format_version: int = 1
    model: ModelConfig
    classes: tuple[str, ...] = ("background", "foreground")
    scores: dict[str, LevelScore] = Field(
        {}, description="by level name: L1, L2, ..., accurate; of a pruned model also the levels it was chosen from"
    )
    training: dict[str, object] = Field({}, description="command, seed, data and settings that made the weights")
    licence: str = "unstated"

    @property
    def supervised_levels(self) -> tuple[Level, ...]:
        """Levels whose head was trained: the ones this model can be pruned to."""
        return self.model.head_levels


def save_pretrained(model: UNetPlusPlus, model_dir: Path | str, pretrained: Pretrained | None = None) -> None:
    """Write `model` as a folder; `pretrained` adds classes, scores and history to its config.

    config.json is written last: a folder without it is no model.
    """
    pretrained = (pretrained or Pretrained(model=model.config)).model_copy(update={"model": model.config})
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, model_dir / WEIGHTS)
    (model_dir / CARD).write_text(model_card(model, pretrained), encoding="utf-8")
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
    config = model.config.model_dump(mode="json")
    if len(model.config.head_levels) == 1:
        config["deep_supervision"] = False
    config["filters"] = config["filters"][: model.config.level + 1]
    config["temperature"] = {level: degree for level, degree in config["temperature"].items() if degree != 1.0}
    if not config["temperature"]:
        del config["temperature"]
    sha.update(json.dumps({"model": config, **decision}, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def model_card(model: UNetPlusPlus, pretrained: Pretrained) -> str:
    """README.md of a model folder: what it is, how good and how dear each level is, where it comes from."""
    config = model.config
    lines = [
        f"# UNet++ L{config.level}",
        "",
        f"{count_parameters(model):,} parameters, filters {config.filters[: config.level + 1]}, norm {config.norm}, "
        f"upsampling {config.upsample}, input {config.in_channels} channel(s), "
        f"classes {', '.join(pretrained.classes)}.",
        f"Heads at levels {', '.join(f'L{level}' for level in config.head_levels)}. Licence: {pretrained.licence}.",
        "",
    ]
    if pretrained.scores:
        lines += [
            *_score_table(pretrained.scores),
            "",
            "Mean IoU over images; seconds of the machine that evaluated.",
            "",
        ]
    if pretrained.training:
        lines += ["## Training", "", "```json", json.dumps(pretrained.training, indent=2), "```", ""]
    lines += ["Use: `unetpp predict --model <this folder> --input <images> --output <masks>`", ""]
    return "\n".join(lines)


def _score_table(scores: Mapping[str, LevelScore]) -> list[str]:
    groups = sorted({group for score in scores.values() for group in score.groups})
    columns = ["level", "images", "mean IoU", "95 % interval", *groups, "parameters", "GMAC / MP", "s / MP"]
    lines = [_row(columns), _row(["---:" if column != "level" else "---" for column in columns])]
    for name, score in scores.items():
        low, high = score.mean_iou_interval
        by_group = [f"{score.groups[group]:.4f}" if group in score.groups else "" for group in groups]
        quality = [f"{score.mean_iou:.4f}", f"{low:.4f} to {high:.4f}", *by_group]
        cost = [f"{score.num_parameters:,}", f"{score.gmacs_per_megapixel:.1f}", f"{score.seconds_per_megapixel:.3f}"]
        lines.append(_row([name, f"{score.num_images} ({score.split or 'all'})", *quality, *cost]))
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

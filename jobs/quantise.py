"""Make the int8 form of a model, and keep it only if it is as good: `unetpp quantise --model DIR --data DIR`.

The guard compares it with float32 by the road that masks take: the same images, tiles and engine. Over all images, and
in each group of enough images, int8 may lose what the config says; where it loses more, more convolutions stay in
float32, and where that does not help there is no int8 form.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs import storage
from jobs.contract import ACCURATE, ExitCode, QuantiseConfig, QuantiseResult
from jobs.dataset import load, open_labelled_set
from jobs.evaluate import CHUNK_IMAGES
from jobs.labelled import LabelledSet, Sample, group_column
from jobs.models import fetch_model
from jobs.provenance import data_name
from unetpp import packaged
from unetpp.card import MIN_GUARDED_IMAGES, Int8Output, Int8Score, Quantised
from unetpp.checkpoint import arrays_of, digest, from_pretrained, read_pretrained, save_pretrained
from unetpp.config import Level, ModelConfig
from unetpp.engine_names import EngineName
from unetpp.engines import Mode
from unetpp.errors import ConfigError
from unetpp.int8 import save_int8
from unetpp.metrics import confusion_counts, iou
from unetpp.model import UNetPlusPlus
from unetpp.openvino_graph import network
from unetpp.predictor import Predictor
from unetpp.prune import prune
from unetpp.quantise import calibration_crops, float_layers, quantise, versions

logger = logging.getLogger(__name__)


def run(config: QuantiseConfig) -> QuantiseResult:
    """Quantise, measure, and write the int8 form into the model, or a copy of it at `out`, unless the guard refuses.

    ConfigError for a packaged model without `out`, for a set without images to measure on, and without nncf.
    """
    if config.out is None and packaged.name_of(config.model) is not None:
        raise ConfigError(f"{config.model} comes with the package, which is not written to; name a folder with --out")
    model_dir = fetch_model(config.model)
    model = from_pretrained(model_dir)
    kept = model if config.level is None else prune(model, config.level)
    labelled = open_labelled_set(config.data, config.split_column)
    guard = Guard(model_dir, model.config, kept.config.head_levels, labelled.split(config.split), config)
    crops = _crops(labelled, kept.config, config)
    uri = config.out or config.model
    for layers in float_layers(kept.config):
        with tempfile.TemporaryDirectory() as made:
            shutil.copytree(model_dir, made, dirs_exist_ok=True)
            described = _made(Path(made), model, kept, crops, layers, labelled, config)
            scores = guard.scores(Path(made))
            too_much = excess(scores, config)
            if not too_much:
                _describe(Path(made), model, described.model_copy(update={"scores": scores}))
                storage.upload_folder(made, uri, last="config.json")
                break
        logger.warning("int8 with %s in float32 loses too much: %s", ", ".join(layers) or "nothing", too_much)
    refused = f"int8 loses too much, so there is no int8 form: {too_much}; take engine openvino, or allow more"
    return QuantiseResult(
        model_uri=uri,
        digest=digest(model),
        accepted=not too_much,
        message=refused if too_much else f"in float32 stay {', '.join(layers) or 'no convolutions'}",
        scores=scores,
        exit_code=int(ExitCode.CONFIG if too_much and not config.refusal_ok else ExitCode.DONE),
    )


def _made(
    made_dir: Path,
    model: UNetPlusPlus,
    kept: UNetPlusPlus,
    crops: Sequence[NDArray[np.float32]],
    layers: tuple[str, ...],
    labelled: LabelledSet,
    config: QuantiseConfig,
) -> Quantised:
    """Put the int8 form of the network `kept` of `model` into a copy of its folder, not yet measured."""
    described = Quantised(
        weights_digest=digest(model),
        sha256=save_int8(quantise(network(kept.config, arrays_of(kept)), crops, layers), made_dir),
        levels=kept.config.head_levels,
        float_layers=layers,
        calibration=config.model_dump(include={"num_crops", "crop_px", "seed", "calibration_split"}),
        split=config.split,
        data=data_name(config.data),
        data_fingerprint=labelled.fingerprint,
        max_iou_drop=config.max_iou_drop,
        max_group_drop=config.max_group_drop,
        versions=versions(),
    )
    _describe(made_dir, model, described)
    return described


def _describe(model_dir: Path, model: UNetPlusPlus, quantised: Quantised) -> None:
    pretrained = read_pretrained(model_dir).model_copy(update={"quantised": quantised})
    save_pretrained(model, model_dir, pretrained)


def _crops(labelled: LabelledSet, model: ModelConfig, config: QuantiseConfig) -> list[NDArray[np.float32]]:
    """Crops of images drawn by the seed, every group as often as the others: a small one has ranges of its own, too."""
    samples = labelled.split(config.calibration_split)
    column = group_column(samples, config.group_by)
    by_group: dict[str, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group(column), []).append(sample)
    rng = np.random.default_rng(config.seed)
    groups = [[each[n] for n in rng.permutation(len(each))] for _, each in sorted(by_group.items())]
    drawn = [groups[n % len(groups)][n // len(groups) % len(groups[n % len(groups)])] for n in range(config.num_crops)]
    ids = [sample.id for sample in drawn]
    once = list({sample.id: sample for sample in drawn}.values())
    images = {image.sample.id: image.image_HWC for image in load(once, model)}
    return calibration_crops(
        [images[id_] for id_ in ids], model, config.num_crops, crop_px=config.crop_px, seed=config.seed
    )


class Guard:
    """Compares int8 with float32 on labelled images, by `Predictor`: each of `levels`, and accurate mode of several."""

    def __init__(
        self,
        model_dir: Path,
        model: ModelConfig,
        levels: tuple[Level, ...],
        samples: Sequence[Sample],
        config: QuantiseConfig,
    ) -> None:
        self._model, self._levels, self._samples, self._config = model, levels, samples, config
        self._column = group_column(samples, config.group_by)
        self._float32 = self._ious(model_dir, "openvino")

    def scores(self, made_dir: Path) -> dict[str, Int8Output]:
        """Mean IoU in both by output name, over all images and by group."""
        int8 = self._ious(made_dir, "openvino-int8")
        groups = [sample.group(self._column) for sample in self._samples]
        members = {group: [n for n, each in enumerate(groups) if each == group] for group in sorted(set(groups))}
        every = range(len(self._samples))
        return {
            name: Int8Output(
                **_score(self._float32[name], int8[name], every),
                groups={
                    group: Int8Score(**_score(self._float32[name], int8[name], numbers))
                    for group, numbers in members.items()
                    if self._column
                },
            )
            for name in int8
        }

    def _ious(self, model_dir: Path, engine: EngineName) -> dict[str, list[float]]:
        """Per-image IoU by output name."""
        outputs: dict[str, tuple[Mode, Level]] = {f"L{level}": ("fast", level) for level in self._levels}
        if len(outputs) > 1:
            outputs[ACCURATE] = ("accurate", self._levels[-1])
        config = self._config
        predictors = {
            name: Predictor.from_pretrained(
                model_dir, mode, level, engine, config.tile_px, "cpu", threads=config.threads
            )
            for name, (mode, level) in outputs.items()
        }
        ious: dict[str, list[float]] = {name: [] for name in predictors}
        for start in range(0, len(self._samples), CHUNK_IMAGES):
            for image in load(self._samples[start : start + CHUNK_IMAGES], self._model):
                for name, predictor in predictors.items():
                    mask_HW = predictor([image.image_HWC])[0]
                    ious[name].append(iou(confusion_counts(mask_HW, image.target_HW, self._model.num_classes)))
        return ious


def _score(float32: Sequence[float], int8: Sequence[float], numbers: Sequence[int]) -> dict[str, Any]:
    means = (float(np.mean([each[n] for n in numbers])) for each in (float32, int8))
    return {"num_images": len(numbers), **dict(zip(("float32_iou", "int8_iou"), means, strict=True))}


def excess(scores: Mapping[str, Int8Output], config: QuantiseConfig) -> str:
    """What loses more than it may, as a sentence; nothing where all is well."""
    too_much = []
    for name, output in scores.items():
        judged = {"all images": (output, config.max_iou_drop)} | {
            f"group {group}": (score, config.max_group_drop)
            for group, score in output.groups.items()
            if score.num_images >= MIN_GUARDED_IMAGES
        }
        too_much += [
            f"{name} loses {score.drop:.4f} over {what} ({score.num_images}), at most {limit:g} is allowed"
            for what, (score, limit) in judged.items()
            if not score.drop <= limit
        ]
    return "; ".join(too_much)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("quantise")

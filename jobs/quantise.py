"""Make the int8 form of a model, and keep it only if it is as good: `unetpp quantise --model DIR --data DIR`.

The guard compares it with float32 by the road that masks take: the same images, tiles and engine. Over all images, and
in each group of enough images, int8 may lose what the config says; where it loses more, more convolutions stay in
float32, and where that does not help there is no int8 form.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from jobs import storage
from jobs.contract import ACCURATE, ExitCode, QuantiseConfig, QuantiseResult
from jobs.dataset import LabelledImage, load, open_labelled_set
from jobs.evaluate import group_column
from jobs.labelled import LabelledSet, Sample
from jobs.models import fetch_model
from jobs.provenance import data_name
from unetpp import packaged
from unetpp.card import MIN_GUARDED_IMAGES, Int8Output, Int8Score, Pretrained, Quantised
from unetpp.checkpoint import digest, from_pretrained, read_pretrained, write_description
from unetpp.errors import ConfigError
from unetpp.int8 import save_int8
from unetpp.metrics import confusion_counts, iou
from unetpp.model import UNetPlusPlus
from unetpp.predictor import EngineName, Predictor
from unetpp.prune import prune
from unetpp.quantise import calibration_crops, float_layers, quantise, versions

logger = logging.getLogger(__name__)

Ious = dict[str, list[float]]
"""Per-image IoU by output name."""


def run(config: QuantiseConfig) -> QuantiseResult:
    """Quantise, measure, and write the int8 form into the model or its copy at `out`, unless the guard refuses.

    ConfigError for a packaged model without `out`, and where nncf is not installed.
    """
    if config.out is None and packaged.name_of(config.model) is not None:
        raise ConfigError(f"{config.model} comes with the package, which is not written to; name a folder with --out")
    if config.threads:
        torch.set_num_threads(config.threads)
    model_dir = fetch_model(config.model)
    pretrained, model = read_pretrained(model_dir), from_pretrained(model_dir)
    kept = model if config.level is None else prune(model, config.level)
    labelled = open_labelled_set(config.data, config.split_column)
    guard = _Guard(model_dir, kept, labelled.split(config.split), config)
    crops = _crops(labelled, kept, config)
    uri = config.out or config.model
    for layers in float_layers(kept.config):
        with tempfile.TemporaryDirectory() as work:
            made_dir = Path(work, "model")
            shutil.copytree(model_dir, made_dir)
            described = Quantised(
                weights_digest=digest(model),
                sha256=save_int8(quantise(network_of(kept), crops, layers), made_dir),
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
            write_description(made_dir, pretrained.model_copy(update={"quantised": described}), model)
            scores = guard.scores(made_dir)
            too_much = excess(scores, config)
            if not too_much:
                described = described.model_copy(update={"scores": scores})
                write_description(made_dir, pretrained.model_copy(update={"quantised": described}), model)
                storage.upload_folder(made_dir, uri, last="config.json")
                message = f"in float32 stay {', '.join(layers) or 'no convolutions'}"
                return _result(config, uri, described.weights_digest, scores, message)
        logger.warning("int8 with %d convolutions in float32 loses too much: %s", len(layers), too_much)
    message = f"int8 loses too much, there is no int8 form: {too_much}; take engine openvino, or raise the limit"

"""Export the sub-network of one level: `unetpp prune --model DIR (--level N | --tolerance T --data DIR) --out DIR`.

A tolerance keeps the cheapest level of which the paired bootstrap over images says, at the stated confidence, that it
loses at most that much mean IoU against the best level.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from jobs import models, storage
from jobs.contract import EvaluateConfig, EvaluateResult, PruneConfig, PruneResult
from jobs.evaluate import level_scores
from jobs.evaluate import run as evaluate
from jobs.frontier import frontier_png
from unetpp.card import Choice, LevelChoice
from unetpp.checkpoint import digest, from_pretrained, read_pretrained, save_pretrained
from unetpp.errors import ConfigError
from unetpp.metrics import loss_upper_bound
from unetpp.prune import prune

logger = logging.getLogger(__name__)

PICTURE = "level_choice.png"


def run(config: PruneConfig) -> PruneResult:
    """Choose the level if none is given, and write the pruned model folder to `out`.

    A tolerance's choice goes into its card, with a picture of it in `level_choice.png`. ConfigError where `out` is the
    model itself.
    """
    if models.canonical(config.model) == storage.canonical(config.out):
        raise ConfigError(
            f"out is {config.out}, where the model itself is: its other levels would be lost; name another folder"
        )
    model_dir = models.fetch_model(config.model)
    pretrained, model = read_pretrained(model_dir), from_pretrained(model_dir)
    choices: tuple[LevelChoice, ...] = ()
    level = config.level
    changed: dict[str, object] = {"level_choice": None, "quantised": None}
    picture = b""
    if config.tolerance is not None:
        evaluated = _evaluated(config, digest(model))
        image_iou = {level: evaluated.image_iou[f"L{level}"] for level in pretrained.model.head_levels}
        choices = compare_levels(image_iou, config)
        level = choose_level(choices)
        choice = Choice(
            level=level, tolerance=config.tolerance, confidence=config.confidence, levels=choices, picture=PICTURE
        )
        changed |= {"scores": level_scores(evaluated), "level_choice": choice}
        picture = frontier_png(evaluated.reports, choice)
    assert level is not None, "the config asks for a level or a tolerance"
    pruned = prune(model, level)
    changed["training"] = {**pretrained.training, "pruned_from": pretrained.model.level}
    changed["calibration"] = {kept: fitted for kept, fitted in pretrained.calibration.items() if kept == level}
    with tempfile.TemporaryDirectory() as pruned_dir:
        save_pretrained(pruned, pruned_dir, pretrained.model_copy(update=changed))
        if picture:
            (Path(pruned_dir) / PICTURE).write_bytes(picture)
        storage.upload_folder(pruned_dir, config.out, last="config.json")
    logger.info("kept L%d at %s", level, config.out)
    return PruneResult(model_uri=config.out, digest=digest(pruned), level=level, choices=choices)


def _evaluated(config: PruneConfig, model_digest: str) -> EvaluateResult:
    """The measurements to choose by: those of `metrics`, else made now on `data`."""
    if config.metrics is None:
        assert config.data is not None, "the config asks for data or metrics"
        return evaluate(
            EvaluateConfig(
                model=config.model,
                data=config.data,
                split_column=config.split_column,
                split=config.split,
                num_bootstrap=config.num_bootstrap,
                seed=config.seed,
                threads=config.threads,
            )
        )
    try:
        evaluated = EvaluateResult.model_validate_json(storage.read_bytes(config.metrics))
    except (FileNotFoundError, ValidationError) as error:
        raise ConfigError(f"{config.metrics} is not the metrics.json of an evaluation: {error}") from None
    if evaluated.digest != model_digest:
        raise ConfigError(
            f"{config.metrics} measured model {evaluated.digest[:10]}, not {model_digest[:10]} at {config.model}: "
            "evaluate that one"
        )
    return evaluated


def compare_levels(image_iou: dict[int, tuple[float, ...]], config: PruneConfig) -> tuple[LevelChoice, ...]:
    """Each level's loss of mean IoU against the best level and the upper bound of that loss, from per-image IoU."""
    assert config.tolerance is not None
    means = {level: float(np.mean(values)) for level, values in image_iou.items()}
    best = max(means, key=lambda level: (means[level], -level))
    bounds = {
        level: loss_upper_bound(
            image_iou[best],
            values,
            num_bootstrap=config.num_bootstrap,
            seed=config.seed,
            confidence=config.confidence,
        )
        for level, values in image_iou.items()
    }
    return tuple(
        LevelChoice(
            level=level,
            mean_iou=means[level],
            loss_to_best=means[best] - means[level],
            loss_upper_bound=bounds[level],
            within_tolerance=level == best or bounds[level] <= config.tolerance,
        )
        for level in sorted(image_iou)
    )


def choose_level(choices: tuple[LevelChoice, ...]) -> int:
    """The cheapest level within the tolerance; cost grows with the level, and the best level is always within."""
    return min(choice.level for choice in choices if choice.within_tolerance)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("prune")

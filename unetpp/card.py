"""What a model folder says of its model: config.json as data, and README.md, the card, made from it.

The card begins with the YAML front matter that model hubs read. Imports no torch.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from unetpp import packaged
from unetpp.config import Frozen, Level, ModelConfig
from unetpp.errors import ModelError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
UNSTATED = "unstated"
FEW_IMAGES = 10
"""A group of fewer images is named among the limits: its interval says how little is known, or cannot be made."""

INT8_COLUMNS = ("output", "group", "images", "float32", "int8", "drop")
MIN_GUARDED_IMAGES = 20
"""A group of fewer images is not judged by itself when a network is quantised: its mean says too little."""

METHOD = (
    "UNet++: Zhou, Siddiquee, Tajbakhsh and Liang, DLMIA 2018, arXiv:1807.10165, and IEEE TMI 2020, arXiv:1912.05074. "
    "Its authors state that a patent application covers the method."
)


class GroupScore(Frozen):
    """Mean IoU of one group of images; the interval is a 95 % bootstrap interval over them."""

    num_images: int
    mean_iou: float
    mean_iou_interval: tuple[float, float]


class LevelScore(GroupScore):
    """Quality and cost of one output, L1..L4, accurate or accurate+flips, as measured when the model was evaluated."""

    split: str | None
    num_parameters: int
    gmacs_per_megapixel: float
    seconds_per_megapixel: float
    groups: dict[str, GroupScore] = Field({}, description="by group, where the data set has groups")
    data: str = Field("", description="name of the labelled set")
    data_fingerprint: str = Field("", description="of the labelled set's listing")


class Calibration(Frozen):
    """What one head's temperature did on the validation pixels that it was fitted on."""

    temperature: float
    num_pixels: int
    nll_before: float = Field(description="negative log-likelihood, mean over the pixels, at temperature 1")
    nll_after: float
    ece_before: float = Field(description="expected calibration error, 0..1, at temperature 1")
    ece_after: float


class LevelChoice(Frozen):
    """How one level compares with the best in the paired bootstrap."""

    level: Level
    mean_iou: float
    loss_to_best: float
    loss_upper_bound: float
    within_tolerance: bool


class Choice(Frozen):
    """Why a level was kept: the cheapest whose loss against the best is within the tolerance."""

    level: Level
    tolerance: float
    confidence: float
    levels: tuple[LevelChoice, ...]
    picture: str | None = Field(None, description="name of the file beside the weights that shows it")


class TrainingData(Frozen):
    """The labelled set that the weights were trained on."""

    name: str
    fingerprint: str = Field(description="of its listing")
    splits: dict[str, int] = Field(description="number of images by split that was used: training, validation")
    licence: str = UNSTATED


class Int8Score(Frozen):
    """Mean IoU of one group of images in float32 and in int8, by the same engine."""

    num_images: int
    float32_iou: float
    int8_iou: float

    @property
    def drop(self) -> float:
        """What int8 loses; negative where it gains."""
        return self.float32_iou - self.int8_iou


class Int8Output(Int8Score):
    """Over all images, and by group."""

    groups: dict[str, Int8Score] = Field({})


class Quantised(Frozen):
    """The int8 form beside the weights: of what it was made, and what it costs in quality."""

    weights_digest: str = Field(description="of the model that it was made of")
    sha256: str = Field(description="of its files")
    levels: tuple[Level, ...] = Field(description="whose heads it has")
    float_layers: tuple[str, ...] = Field(description="convolutions that are kept in float32")
    calibration: dict[str, object] = Field({}, description="crops that its ranges were measured on")
    scores: dict[str, Int8Output] = Field({}, description="by output name: L1, L2, ..., accurate")
    split: str | None = None
    data: str = Field("", description="name of the labelled set")
    data_fingerprint: str = ""
    max_iou_drop: float = Field(description="more would have been refused, over all images")
    max_group_drop: float = Field(description="more would have been refused, in a group of enough images")
    versions: dict[str, str] = Field({}, description="of nncf and openvino")


class Pretrained(Frozen):
    """config.json: everything about a model but its weights."""

    format_version: int = 1
    model: ModelConfig
    classes: tuple[str, ...] = ("background", "foreground")
    scores: dict[str, LevelScore] = Field(
        {}, description="by output name: L1, L2, ..., accurate; of a pruned model also the levels it was chosen from"
    )
    calibration: dict[Level, Calibration] = Field({}, description="by level, where temperatures were fitted")
    level_choice: Choice | None = Field(None, description="of a model that was pruned by a tolerance")
    quantised: Quantised | None = Field(None, description="of a model that has an int8 form")
    data: TrainingData | None = None
    training: dict[str, object] = Field({}, description="command, seed, settings and environment that made the weights")
    licence: str = UNSTATED
    intended_use: str = UNSTATED

    @property
    def supervised_levels(self) -> tuple[Level, ...]:
        """Levels whose head was trained: the ones this model can be pruned to."""
        return self.model.head_levels

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the scores that this model can still give."""
        levels = tuple(f"L{level}" for level in self.model.head_levels)
        return (*levels, "accurate", "accurate+flips") if len(levels) > 1 else levels


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


def int8_rows(scores: Mapping[str, Int8Output]) -> list[list[str]]:
    """Rows of INT8_COLUMNS: of each output over all images, then by group."""
    rows = []
    for name, output in scores.items():
        for group, score in [("all images", output), *sorted(output.groups.items())]:
            figures = (score.float32_iou, score.int8_iou, score.drop)
            rows.append([name, group, str(score.num_images), *(f"{figure:.4f}" for figure in figures)])
    return rows


def model_card(pretrained: Pretrained, num_parameters: int) -> str:
    """README.md of a model folder: what it is, how good and how dear each level is, where it comes from."""
    config = pretrained.model
    title = f"UNet++ L{config.level}" + (f", {_line(pretrained.data.name)}" if pretrained.data else "")
    lines = [
        "---",
        *_front_matter(pretrained, title),
        "---",
        "",
        f"# {title}",
        "",
        f"{num_parameters:,} parameters, filters {config.filters[: config.level + 1]}, norm {config.norm}, "
        f"upsampling {config.upsample}, input {config.in_channels} channel(s), "
        f"classes {', '.join(pretrained.classes)}. "
        f"Heads at levels {', '.join(f'L{level}' for level in config.head_levels)}.",
        "",
        "Use: `unetpp predict --model <this folder> --input <images> --output <masks>`",
    ]
    sections = {
        "Intended use and limits": [f"Intended use: {_line(pretrained.intended_use)}", "", *_limits(pretrained)],
        "Quality and cost": _quality(pretrained.scores),
        "Quality by group": _groups(pretrained.scores),
        "Level choice": _choice(pretrained.level_choice),
        "Calibration": _calibration(pretrained.calibration),
        "Int8": _quantised(pretrained.quantised),
        "Data": _data(pretrained),
        "Training": _training(pretrained.training),
        "Licence": [
            f"Weights: {_line(pretrained.licence)}. "
            f"Training data: {_line(pretrained.data.licence if pretrained.data else UNSTATED)}.",
            "",
            METHOD,
        ],
    }
    for heading, content in sections.items():
        if content:
            lines += ["", f"## {heading}", "", *content]
    return "\n".join(lines) + "\n"


def _front_matter(pretrained: Pretrained, title: str) -> list[str]:
    """YAML, each value written as JSON, which YAML holds: no text can break out of it."""
    licence = pretrained.licence
    is_identifier = re.fullmatch(r"[A-Za-z0-9.-]+", licence) is not None
    fields: dict[str, object] = {
        "license": "unknown" if licence == UNSTATED else licence.lower() if is_identifier else "other"
    }
    if not is_identifier:
        fields["license_name"] = licence
    fields |= {
        "library_name": "unetpp",
        "pipeline_tag": "image-segmentation",
        "tags": ["image-segmentation", "semantic-segmentation", "unet++", "pytorch"],
    }
    results = [
        {
            "task": {"type": "image-segmentation"},
            "dataset": {"type": score.data or UNSTATED, "name": score.data or UNSTATED, "split": score.split or "all"},
            "metrics": [{"type": "mean_iou", "name": f"mean IoU, {name}", "value": round(score.mean_iou, 4)}],
        }
        for name, score in pretrained.scores.items()
        if name in pretrained.output_names
    ]
    if results:
        fields |= {"metrics": ["mean_iou"], "model-index": [{"name": title, "results": results}]}
    return [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]


def _limits(pretrained: Pretrained) -> list[str]:
    config = pretrained.model
    ranges = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in config.value_range.model_dump().items())
    lines = [
        "- Gives a class for each pixel: objects that touch are one region.",
        f"- Expects {config.in_channels} channel(s) whose values from dark to bright are {ranges}.",
    ]
    if pretrained.scores:
        lines.append("- How good it is on other images than those measured below is not known.")
    else:
        lines.append("- It was not evaluated: how good it is, is not known.")
    sizes = {group: score.num_images for each in pretrained.scores.values() for group, score in each.groups.items()}
    if few := [f"{_line(group)} ({number})" for group, number in sorted(sizes.items()) if number < FEW_IMAGES]:
        lines.append(f"- Groups measured on fewer than {FEW_IMAGES} images say little: {', '.join(few)}.")
    if not pretrained.calibration:
        lines.append("- Its probabilities were not calibrated: uncertainties only rank images.")
    return lines


def _quality(scores: Mapping[str, LevelScore]) -> list[str]:
    if not scores:
        return []
    columns = ["level", "images", "mean IoU", "95 % interval", "parameters", "GMAC / MP", "s / MP"]
    rows = []
    for name, score in scores.items():
        cost = [f"{score.num_parameters:,}", f"{score.gmacs_per_megapixel:.1f}", f"{score.seconds_per_megapixel:.3f}"]
        images = f"{score.num_images} ({score.split or 'all'})"
        rows.append([name, images, f"{score.mean_iou:.4f}", _interval(score), *cost])
    on = ", ".join(sorted({f"{score.data} ({score.data_fingerprint[:10]})" for score in scores.values() if score.data}))
    where = f"Measured on {_line(on)}. " if on else ""
    return [
        *_table(columns, rows),
        "",
        f"{where}Mean IoU over images, 95 % bootstrap intervals over images; seconds of the machine that evaluated.",
    ]


def _groups(scores: Mapping[str, LevelScore]) -> list[str]:
    sizes = {group: score.num_images for each in scores.values() for group, score in each.groups.items()}
    if not sizes:
        return []
    rows = []
    for group, number in sorted(sizes.items()):
        cells = []
        for score in (each.groups.get(group) for each in scores.values()):
            interval = f" ({_interval(score)})" if score and score.num_images > 1 else ""
            cells.append(f"{score.mean_iou:.4f}{interval}" if score else "")
        rows.append([group, str(number), *cells])
    return _table(["group", "images", *scores], rows)


def _choice(choice: Choice | None) -> list[str]:
    if choice is None:
        return []
    rows = [
        [
            f"**L{each.level}**" if each.level == choice.level else f"L{each.level}",
            f"{each.mean_iou:.4f}",
            f"{each.loss_to_best:.4f}",
            f"{each.loss_upper_bound:.4f}",
            "yes" if each.within_tolerance else "no",
        ]
        for each in choice.levels
    ]
    picture = [f"![Quality against cost, and the level that was kept]({choice.picture})", ""] if choice.picture else []
    return [
        f"L{choice.level} is the cheapest level that loses, at {100 * choice.confidence:g} % confidence, at most "
        f"{choice.tolerance:g} mean IoU against the best.",
        "",
        *picture,
        *_table(["level", "mean IoU", "loss to best", "upper bound", "within tolerance"], rows),
    ]


def _calibration(calibration: Mapping[Level, Calibration]) -> list[str]:
    if not calibration:
        return []
    columns = ["level", "temperature", "NLL before", "NLL after", "ECE before", "ECE after"]
    rows = []
    for level, fitted in calibration.items():
        figures = (fitted.temperature, fitted.nll_before, fitted.nll_after, fitted.ece_before, fitted.ece_after)
        rows.append([f"L{level}", *(f"{figure:.4f}" for figure in figures)])
    number = max(fitted.num_pixels for fitted in calibration.values())
    return [
        *_table(columns, rows),
        "",
        f"Temperature scaling (Guo et al. 2017, arXiv:1706.04599) on {number:,} pixels of the validation images; "
        "negative log-likelihood and expected calibration error (15 bins) of the same pixels.",
    ]


def _quantised(quantised: Quantised | None) -> list[str]:
    if quantised is None:
        return []
    made = json.dumps(quantised.calibration)
    versions = ", ".join(f"{name} {version}" for name, version in quantised.versions.items())
    return [
        "`--engine openvino-int8` computes in 8 bits on CPU. Mean IoU of the same images by OpenVINO in both:",
        "",
        *_table(list(INT8_COLUMNS), int8_rows(quantised.scores), text_columns=2),
        "",
        f"Measured on {_line(quantised.data)} ({quantised.data_fingerprint[:10]}), {quantised.split or 'all'}. A drop "
        f"above {quantised.max_iou_drop:g} over all images, or above {quantised.max_group_drop:g} in a group of "
        f"{MIN_GUARDED_IMAGES} images or more, would have been refused.",
        "",
        f"In float32 are {', '.join(quantised.float_layers) or 'no convolutions'}. Calibration: {made}. {versions}.",
    ]


def _data(pretrained: Pretrained) -> list[str]:
    if pretrained.data is None:
        return []
    data = pretrained.data
    rows = [[data.name, split, data.fingerprint[:10], str(number)] for split, number in data.splits.items()]
    return _table(["set", "split", "fingerprint", "images"], rows, text_columns=3)


def _training(training: Mapping[str, object]) -> list[str]:
    if not training:
        return []
    environment = training.get("environment")
    lines: list[str] = []
    if isinstance(environment, Mapping):
        rows = [[str(name), str(value)] for name, value in environment.items() if value is not None]
        lines = [*_table(["environment", ""], rows, text_columns=2), ""]
    rest = {name: value for name, value in training.items() if name != "environment"}
    return [*lines, "```json", json.dumps(rest, indent=2), "```"]


def _interval(score: GroupScore) -> str:
    return "{:.4f} to {:.4f}".format(*score.mean_iou_interval)


def _table(columns: list[str], rows: Iterable[list[str]], *, text_columns: int = 1) -> list[str]:
    aligned = ["---" if place < text_columns else "---:" for place in range(len(columns))]
    cells = [columns, aligned, *([_line(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _line(text: str) -> str:
    """Free text on one line."""
    return " ".join(text.split())

"""Evaluation and pruning by tolerance: the numbers are those of the masks, and the choice follows from them."""

import csv
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from jobs.calibrate import calibrate
from jobs.contract import EvaluateConfig, PruneConfig, SynthConfig
from jobs.dataset import load, open_labelled_set
from jobs.evaluate import run as evaluate
from jobs.frontier import frontier_png
from jobs.labelled import Sample, group_column
from jobs.prune import choose_level, compare_levels
from jobs.prune import run as prune
from jobs.summary import group_table
from jobs.synth import run as synthesise
from unetpp.card import LevelChoice
from unetpp.checkpoint import Pretrained, from_pretrained, read_pretrained, save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.model import UNetPlusPlus, count_gmacs, count_parameters
from unetpp.predictor import Predictor


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(folder), num=12, size=64, seed=5))
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    save_pretrained(UNetPlusPlus(ModelConfig(level=3, filters=(4, 6, 8, 10))), folder)
    return folder


def test_scores_are_those_of_the_masks(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    result = evaluate(
        EvaluateConfig(model=str(model_dir), data=str(data_dir), split="train", output=str(tmp_path), num_bootstrap=200)
    )
    assert [report.name for report in result.reports] == ["L1", "L2", "L3", "accurate"]
    images = load(open_labelled_set(str(data_dir)).split("train"), from_pretrained(model_dir).config)
    for report in result.reports:
        mode, level = ("accurate", None) if report.name == "accurate" else ("fast", int(report.name[1:]))
        predictor = Predictor.from_pretrained(model_dir, mode=mode, level=level)  # type: ignore[arg-type]
        masks = predictor([image.image_HWC for image in images])  # type: ignore[misc]
        overlaps = [(m > 0, image.target_HW > 0) for m, image in zip(masks, images, strict=True)]
        ious = [(m & t).sum() / max(1, (m | t).sum()) for m, t in overlaps]
        assert report.score.mean_iou == pytest.approx(np.mean(ious), abs=1e-9)
        assert result.image_iou[report.name] == pytest.approx(ious, abs=1e-9)
        pooled = sum((m & t).sum() for m, t in overlaps) / sum((m | t).sum() for m, t in overlaps)
        assert report.score.pooled_iou == pytest.approx(pooled)
        low, high = report.score.mean_iou_interval
        assert low <= report.score.mean_iou <= high
        assert set(report.groups) == {"fluorescence", "brightfield"}
        assert sum(group.num_images for group in report.groups.values()) == len(images)


def test_cost_grows_with_the_level(model_dir: Path, data_dir: Path) -> None:
    result = evaluate(EvaluateConfig(model=str(model_dir), data=str(data_dir), split="val", num_bootstrap=100))
    by_name = {report.name: report for report in result.reports}
    for shallow, deep in itertools.pairwise(["L1", "L2", "L3"]):
        assert by_name[shallow].num_parameters < by_name[deep].num_parameters
        assert by_name[shallow].gmacs_per_megapixel < by_name[deep].gmacs_per_megapixel
    assert by_name["L2"].num_parameters == count_parameters(from_pretrained(model_dir, 2))
    for level in (1, 2, 3):
        for_1000_px = 1000**2 / 1024**2 * count_gmacs(from_pretrained(model_dir, level).config, 1024, 1024)
        assert by_name[f"L{level}"].gmacs_per_megapixel == pytest.approx(for_1000_px)
    assert all(report.seconds_per_megapixel > 0 for report in result.reports)


def test_mirror_images_are_one_output_more_at_four_times_the_cost(model_dir: Path, data_dir: Path) -> None:
    asked = {"model": str(model_dir), "data": str(data_dir), "split": "val", "num_bootstrap": 100}
    plain, result = (evaluate(EvaluateConfig.model_validate({**asked, "flips": flips})) for flips in (False, True))
    assert [report.name for report in result.reports] == ["L1", "L2", "L3", "accurate", "accurate+flips"]
    assert result.image_iou.items() >= plain.image_iou.items()
    images = load(open_labelled_set(str(data_dir)).split("val"), from_pretrained(model_dir).config)
    masks = Predictor.from_pretrained(model_dir, mode="accurate", flips=True)([image.image_HWC for image in images])  # type: ignore[misc]
    overlaps = [(m > 0, image.target_HW > 0) for m, image in zip(masks, images, strict=True)]
    ious = [(m & t).sum() / max(1, (m | t).sum()) for m, t in overlaps]
    assert result.image_iou["accurate+flips"] == pytest.approx(ious, abs=1e-9)
    accurate, flips = result.reports[-2:]
    assert flips.gmacs_per_megapixel == pytest.approx(4 * accurate.gmacs_per_megapixel)
    assert flips.num_parameters == accurate.num_parameters


def test_mirror_images_are_refused_for_a_single_head(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    save_pretrained(from_pretrained(model_dir, 2), tmp_path)
    with pytest.raises(ConfigError, match=r"accurate mode averages .* has \[2\] only"):
        evaluate(EvaluateConfig(model=str(tmp_path), data=str(data_dir), flips=True))


def test_the_table_the_plot_and_the_card_are_written(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    save_pretrained(from_pretrained(model_dir), tmp_path / "model")
    result = evaluate(
        EvaluateConfig(
            model=str(tmp_path / "model"),
            data=str(data_dir),
            split="val",
            output=str(tmp_path / "out"),
            update_card=True,
            num_bootstrap=100,
        )
    )
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    stored = type(result).model_validate_json((tmp_path / "out" / "metrics.json").read_bytes())
    assert stored == result
    rows = list(csv.DictReader((tmp_path / "out" / "levels.csv").open()))
    assert [row["output"] for row in rows if not row["group"]] == ["L1", "L2", "L3", "accurate"]
    scores = read_pretrained(tmp_path / "model").scores
    assert scores["L2"].mean_iou == result.reports[1].score.mean_iou
    assert f"{scores['L2'].mean_iou:.4f}" in (tmp_path / "model" / "README.md").read_text()
    assert scores["L2"].data == data_dir.name
    assert scores["L2"].data_fingerprint == open_labelled_set(str(data_dir)).fingerprint
    for group, score in scores["L2"].groups.items():
        assert score.mean_iou_interval == result.reports[1].groups[group].mean_iou_interval
    assert from_pretrained(tmp_path / "model").state_dict().keys() == from_pretrained(model_dir).state_dict().keys()


def test_quality_is_shown_by_group_with_its_interval_and_without_one_for_a_single_image(
    model_dir: Path, data_dir: Path
) -> None:
    result = evaluate(EvaluateConfig(model=str(model_dir), data=str(data_dir), split="train", num_bootstrap=100))
    score = result.reports[1].groups["fluorescence"]
    assert score.num_images > 1
    lonely = score.model_copy(update={"num_images": 1})
    console = Console(width=100, record=True, file=io.StringIO())
    for groups in ({"fluorescence": score}, {"fluorescence": lonely}):
        reports = [report.model_copy(update={"groups": groups}) for report in result.reports]
        console.print(group_table(reports))
    with_interval, without = console.export_text().split("Mean IoU by group")[1:]
    low, high = score.mean_iou_interval
    assert f"{score.mean_iou:.4f} │ {low:.3f} .. {high:.3f}" in with_interval
    assert f"{score.mean_iou:.4f}" in without
    assert " .. " not in without
    no_groups = [report.model_copy(update={"groups": {}}) for report in result.reports]
    assert group_table(no_groups) is None
    assert frontier_png(reports) == frontier_png(no_groups) != frontier_png(result.reports)


def test_an_unknown_group_column_is_refused(model_dir: Path, data_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"group_by is 'stain'; the set has the columns modality: name"):
        evaluate(EvaluateConfig(model=str(model_dir), data=str(data_dir), group_by="stain"))


def test_an_image_without_a_group_is_in_one_of_its_own(model_dir: Path, tmp_path: Path) -> None:
    grouped = [
        Sample(id=id_, image_uri="", mask_uri="", split="", groups=of)
        for id_, of in (("a", {}), ("b", {"modality": "fluorescence"}))
    ]
    assert group_column(grouped, None) == "modality"
    assert [sample.group("modality") for sample in grouped] == ["none", "fluorescence"]
    data = tmp_path / "data"
    synthesise(SynthConfig(out=str(data), num=4, size=32))
    text = (data / "splits.csv").read_text()
    (data / "splits.csv").write_text(text.replace("brightfield", ""))
    evaluate(EvaluateConfig(model=str(model_dir), data=str(data), output=str(tmp_path / "out"), num_bootstrap=100))
    rows = list(csv.DictReader((tmp_path / "out" / "levels.csv").open()))
    assert [(row["group"], row["images"]) for row in rows[:3]] == [("", "4"), ("fluorescence", "2"), ("none", "2")]


def prune_config(tolerance: float, **fields: object) -> PruneConfig:
    return PruneConfig.model_validate(
        {"model": "m", "out": "o", "tolerance": tolerance, "data": "d", "num_bootstrap": 500, **fields}
    )


def test_the_cheapest_level_within_the_tolerance_is_kept() -> None:
    rng = np.random.default_rng(0)
    deep = rng.uniform(0.5, 0.9, 100)
    image_iou = {
        1: tuple(deep - 0.1),
        2: tuple(deep - 0.008 + rng.normal(0, 0.005, 100)),
        3: tuple(deep - 0.001 + rng.normal(0, 0.005, 100)),
        4: tuple(deep),
    }
    for tolerance, expected in ((0.2, 1), (0.012, 2), (0.004, 3), (0.0, 4)):
        choices = compare_levels(image_iou, prune_config(tolerance))
        assert choose_level(choices) == expected
    assert choices[1].loss_to_best == pytest.approx(0.008, abs=0.002)
    assert choices[1].loss_upper_bound > choices[1].loss_to_best


def test_few_images_make_the_choice_careful() -> None:
    """The same mean loss passes with many images and not with few: the bound, not the mean, decides."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.03, 400)

    def within(number: int) -> bool:
        deep = np.full(number, 0.8)
        shallow = deep - 0.005 - (noise[:number] - noise[:number].mean())
        choices: tuple[LevelChoice, ...] = compare_levels({1: tuple(shallow), 2: tuple(deep)}, prune_config(0.01))
        return choices[0].within_tolerance

    assert within(400)
    assert not within(12)


def test_a_worse_deep_level_is_never_kept() -> None:
    choices = compare_levels({1: (0.8, 0.7), 2: (0.9, 0.8), 3: (0.5, 0.5)}, prune_config(0.01))
    assert choose_level(choices) == 2


@pytest.mark.parametrize("way", [{"level": 2}, {"tolerance": 0.9, "confidence": 0.9}])
def test_the_pruned_model_is_a_model(way: dict[str, float], model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    data = {"data": str(data_dir), "split": "train"} if "tolerance" in way else {}
    result = prune(
        PruneConfig.model_validate(
            {"model": str(model_dir), "out": str(tmp_path / "pruned"), "num_bootstrap": 100, **way, **data}
        )
    )
    pruned = read_pretrained(tmp_path / "pruned")
    assert result.level == (2 if "level" in way else 1)
    assert pruned.model.level == result.level
    assert pruned.supervised_levels == (result.level,)
    assert pruned.training["pruned_from"] == 3
    if "tolerance" in way:
        assert [choice.level for choice in result.choices] == [1, 2, 3]
        assert list(pruned.scores) == ["L1", "L2", "L3", "accurate"]  # what it was chosen from
        assert pruned.level_choice is not None
        assert (pruned.level_choice.level, pruned.level_choice.levels) == (result.level, result.choices)
        assert (tmp_path / "pruned" / "level_choice.png").read_bytes().startswith(b"\x89PNG")
        assert "](level_choice.png)" in (tmp_path / "pruned" / "README.md").read_text()
    else:
        assert pruned.level_choice is None
        assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == [
            "README.md",
            "config.json",
            "model.safetensors",
        ]
    with pytest.raises(ConfigError):
        prune(PruneConfig(model=str(tmp_path / "pruned"), out=str(tmp_path / "again"), level=3))


def test_a_pruned_model_keeps_the_calibration_of_its_head(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).split("val"), from_pretrained(model_dir).config)
    model, found = calibrate(from_pretrained(model_dir), images)
    save_pretrained(model, tmp_path / "full", Pretrained(model=model.config, calibration=found))
    prune(PruneConfig(model=str(tmp_path / "full"), level=2, out=str(tmp_path / "pruned")))
    pruned = read_pretrained(tmp_path / "pruned")
    assert pruned.calibration == {2: found[2]}
    assert pruned.model.temperature == {2: found[2].temperature}


def test_a_model_is_not_pruned_in_its_own_place(model_dir: Path, tmp_path: Path) -> None:
    save_pretrained(from_pretrained(model_dir), tmp_path / "full")
    with pytest.raises(ConfigError, match=r"out is .*full/, where the model itself is: .*; name another folder"):
        prune(PruneConfig(model=str(tmp_path / "full"), level=2, out=f"{tmp_path}/full/"))
    assert from_pretrained(tmp_path / "full").config.level == 3


def test_an_evaluation_serves_the_choice_as_well_as_its_data(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    evaluate(EvaluateConfig(model=str(model_dir), data=str(data_dir), split="train", output=str(tmp_path)))
    asked = {"model": str(model_dir), "tolerance": 0.01, "out": str(tmp_path / "pruned")}
    by_data = prune(PruneConfig.model_validate(asked | {"data": str(data_dir), "split": "train"}))
    assert prune(PruneConfig.model_validate(asked | {"metrics": str(tmp_path / "metrics.json")})) == by_data


def test_an_evaluation_of_another_model_is_refused(
    model_dir: Path, tiny_model: Path, data_dir: Path, tmp_path: Path
) -> None:
    evaluate(EvaluateConfig(model=str(tiny_model), data=str(data_dir), split="train", output=str(tmp_path)))
    metrics = str(tmp_path / "metrics.json")
    with pytest.raises(ConfigError, match=r"measured model .*evaluate that one"):
        prune(PruneConfig(model=str(model_dir), tolerance=0.01, metrics=metrics, out=str(tmp_path / "pruned")))
    with pytest.raises(ConfigError, match="is not the metrics"):
        prune(PruneConfig(model=str(model_dir), tolerance=0.01, metrics=metrics + "x", out=str(tmp_path / "pruned")))

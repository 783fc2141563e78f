"""The card of a model says what is known of it, and cannot be broken by what it is told."""

from pathlib import Path

import pytest
import torch
import yaml

from unetpp.card import Calibration, Choice, GroupScore, LevelChoice, LevelScore, Pretrained, TrainingData, model_card
from unetpp.checkpoint import read_pretrained, save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus
from unetpp.prune import prune

CONFIG = ModelConfig(level=2, filters=(4, 6, 8), temperature={1: 1.5, 2: 0.8})


def score(mean_iou: float, groups: dict[str, int]) -> LevelScore:
    return LevelScore(
        split="test",
        num_images=129,
        mean_iou=mean_iou,
        mean_iou_interval=(mean_iou - 0.02, mean_iou + 0.01),
        num_parameters=1234,
        gmacs_per_megapixel=5.5,
        seconds_per_megapixel=0.25,
        groups={
            group: GroupScore(num_images=number, mean_iou=0.7, mean_iou_interval=(0.6, 0.75))
            for group, number in groups.items()
        },
        data="nuclei-set",
        data_fingerprint="f" * 64,
    )


@pytest.fixture
def pretrained() -> Pretrained:
    groups = {"fluorescence": 102, "bright|field": 3, "lonely": 1}
    fitted = Calibration(
        temperature=1.5, num_pixels=4096, nll_before=0.5, nll_after=0.4, ece_before=0.1, ece_after=0.02
    )
    levels = tuple(
        LevelChoice(
            level=level, mean_iou=0.8, loss_to_best=0.01, loss_upper_bound=0.015, within_tolerance=bool(level == 2)
        )
        for level in (1, 2)
    )
    return Pretrained(
        model=CONFIG,
        scores={name: score(iou, groups) for name, iou in {"L1": 0.8, "L2": 0.8236, "accurate": 0.83}.items()},
        calibration={1: fitted, 2: fitted},
        level_choice=Choice(level=2, tolerance=0.01, confidence=0.95, levels=levels, picture="level_choice.png"),
        data=TrainingData(name="nuclei-set", fingerprint="e" * 64, splits={"train": 467, "val": 68}, licence="CC0-1.0"),
        training={"seed": 2018, "environment": {"commit": "abc-dirty", "torch": "2.13.0", "gpu": None}},
        licence="Apache-2.0",
        intended_use="Nuclei in 2D microscopy.\nNot for diagnosis.",
    )


def front_matter(card: str) -> dict[str, object]:
    _, head, _ = card.split("---\n", 2)
    read: dict[str, object] = yaml.safe_load(head)
    return read


def test_the_card_says_what_is_known(pretrained: Pretrained) -> None:
    card = model_card(pretrained, 1234)
    for line in (
        "Intended use: Nuclei in 2D microscopy. Not for diagnosis.",
        "- Groups measured on fewer than 10 images say little: bright|field (3), lonely (1).",
        "| L2 | 129 (test) | 0.8236 | 0.8036 to 0.8336 | 1,234 | 5.5 | 0.250 |",
        "Measured on nuclei-set (ffffffffff).",
        "| fluorescence | 102 | 0.7000 (0.6000 to 0.7500) | 0.7000 (0.6000 to 0.7500) | 0.7000 (0.6000 to 0.7500) |",
        r"| bright\|field | 3 | 0.7000 (0.6000 to 0.7500) |",
        "| lonely | 1 | 0.7000 | 0.7000 | 0.7000 |",
        "at 95 % confidence, at most 0.01 mean IoU",
        "![Quality against cost, and the level that was kept](level_choice.png)",
        "| **L2** | 0.8000 | 0.0100 | 0.0150 | yes |",
        "| L1 | 1.5000 | 0.5000 | 0.4000 | 0.1000 | 0.0200 |",
        "on 4,096 pixels of the validation images",
        "| nuclei-set | train | eeeeeeeeee | 467 |",
        "| commit | abc-dirty |",
        '"seed": 2018',
        "Weights: Apache-2.0. Training data: CC0-1.0.",
    ):
        assert line in card
    assert "not calibrated" not in card
    assert "gpu" not in card


def test_hubs_read_the_front_matter(pretrained: Pretrained) -> None:
    head = front_matter(model_card(pretrained, 1234))
    assert head["license"] == "apache-2.0"
    assert "image-segmentation" in head["tags"]  # type: ignore[operator]
    (model,) = head["model-index"]  # type: ignore[misc]
    values = [(each["dataset"]["split"], each["metrics"][0]["value"]) for each in model["results"]]
    assert values == [("test", 0.8), ("test", 0.8236), ("test", 0.83)]


def test_a_pruned_models_front_matter_has_what_it_still_gives(pretrained: Pretrained) -> None:
    pruned = pretrained.model_copy(update={"model": CONFIG.model_copy(update={"deep_supervision": False})})
    (model,) = front_matter(model_card(pruned, 1234))["model-index"]  # type: ignore[misc]
    assert [each["metrics"][0]["name"] for each in model["results"]] == ["mean IoU, L2"]


@pytest.mark.parametrize(
    ("licence", "wanted"),
    [
        ("unstated", {"license": "unknown"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ('ours: "ask"\n---\nlicense: mit', {"license": "other", "license_name": 'ours: "ask"\n---\nlicense: mit'}),
    ],
)
def test_no_licence_text_breaks_the_front_matter(pretrained: Pretrained, licence: str, wanted: dict[str, str]) -> None:
    head = front_matter(model_card(pretrained.model_copy(update={"licence": licence}), 1))
    assert {name: head[name] for name in head if name.startswith("license")} == wanted


def test_a_card_of_nothing_but_weights_says_what_is_not_known(tmp_path: Path) -> None:
    save_pretrained(UNetPlusPlus(ModelConfig(level=2, filters=(4, 6, 8))), tmp_path)
    card = (tmp_path / "README.md").read_text()
    for line in (
        "Intended use: unstated",
        "- It was not evaluated: how good it is, is not known.",
        "- Its probabilities were not calibrated",
        "Weights: unstated. Training data: unstated.",
        "arXiv:1807.10165",
    ):
        assert line in card
    assert "## Quality" not in card
    assert "## Data" not in card


def test_what_a_folder_says_is_read_back(pretrained: Pretrained, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNetPlusPlus(CONFIG)
    save_pretrained(model, tmp_path / "full", pretrained)
    assert read_pretrained(tmp_path / "full") == pretrained
    save_pretrained(prune(model, 1), tmp_path / "pruned", pretrained)
    assert read_pretrained(tmp_path / "pruned").model.temperature == {1: 1.5}

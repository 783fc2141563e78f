"""The configs of the flows, and the recipes that are written in them."""

from pathlib import Path

import pytest

from flows.config import ArchiveFlowConfig, NightlyConfig, TrainFlowConfig
from jobs.command_line import new_app, run_app, set_command
from jobs.config_file import load_config, write_yaml
from jobs.contract import PredictConfig, PredictOptions, TrainConfig, TrainOptions
from unetpp.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "infra" / "recipes"
PLACES = ["data=d", "models=m", "work=w", "input=i", "output=o"]


def test_a_night_is_a_training_and_an_archive() -> None:
    assert set(NightlyConfig.model_fields) == set(TrainFlowConfig.model_fields) | set(ArchiveFlowConfig.model_fields)


def test_a_flow_trains_and_predicts_by_the_jobs_own_options() -> None:
    night = load_config(NightlyConfig, None, [*PLACES, "train.epochs=7", "predict.shard_images=5"])
    assert night.train == TrainOptions(epochs=7)
    assert night.predict == PredictOptions(shard_images=5)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/data/run #2", "/data/run #2"),
        ("2026-11-24", "2026-11-24"),
        ("s3://archive/{night}", "s3://archive/{night}"),
        ("[s3://archive/a, s3://archive/b]", ("s3://archive/a", "s3://archive/b")),
    ],
)
def test_an_input_is_taken_as_it_was_typed(word: str, expected: object) -> None:
    found: list[ArchiveFlowConfig] = []
    app = new_app("flows.archive", "")
    set_command(app, ArchiveFlowConfig, lambda config: found.append(config) or 0)
    assert run_app(app, ["--models", "m", "--output", "o", "--input", word]) == 0
    assert found[0].input == expected


def test_a_night_is_other_work_in_another_precision_and_the_same_by_another_engine() -> None:
    def work(**how: object) -> str:
        places = {"model": "m", "input": "i", "output": "o"}
        return PredictConfig.model_validate(places | how).output_fingerprint()

    assert work(engine="openvino") == work(engine="torch", num_workers=2, threads=1)
    assert len({work(engine=engine) for engine in ("openvino", "openvino-bf16", "openvino-int8")}) == 3


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("train.epoch=7", "unknown key epoch in train; did you mean epochs?"),
        ("train.model.level=5", "train.model.level: saw 5, wanted a whole number from 1 to 4"),
        ("train.data=elsewhere", None),
        ("predict.model=mine", None),
        ("tolerance=1.5", "tolerance: saw 1.5, wanted a number of at least 0 and below 1"),
    ],
)
def test_a_wrong_key_of_a_section_is_told_with_its_section(setting: str, sentence: str | None) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(NightlyConfig, None, [*PLACES, setting])
    assert sentence is None or str(refused.value) == sentence


def test_the_demo_recipe_is_a_whole_night(tmp_path: Path) -> None:
    night = load_config(NightlyConfig, RECIPES / "demo.yaml")
    file = tmp_path / "again.yaml"
    file.write_text(write_yaml(night))
    assert load_config(NightlyConfig, file) == night


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("*.yaml") if path.name != "demo.yaml"))
def test_a_training_recipe_needs_only_its_places(recipe: str) -> None:
    load_config(TrainConfig, RECIPES / recipe, ["data=d", "output=o", "init=m"])

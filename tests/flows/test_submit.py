"""A job that is sent elsewhere means the same places there."""

from pathlib import Path

import pytest

from flows.submit import seen_from_elsewhere
from jobs.contract import AssembleConfig, ForgetConfig, PredictConfig, TrainConfig
from unetpp import packaged
from unetpp.errors import ModelError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder `mine`; the package has a model `tiny`."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "package" / "tiny").mkdir(parents=True)
    (tmp_path / "package" / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr(packaged, "ROOT", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "there"),
    [("mine", "{here}/mine"), ("a/b", "{here}/a/b"), ("s3://bucket/m", "s3://bucket/m"), ("tiny", "packaged:tiny")],
)
def test_paths_become_absolute_and_packaged_models_stay_names(here: Path, model: str, there: str) -> None:
    config = PredictConfig(model=model, input="images", output="s3://bucket/out")
    seen = seen_from_elsewhere(config)
    assert seen.model == there.format(here=here)
    assert (seen.input, seen.output, seen.result) == ((f"{here}/images",), "s3://bucket/out", None)
    assert seen_from_elsewhere(seen) == seen


def test_the_archive_that_an_image_is_forgotten_of_is_a_place(here: Path) -> None:
    seen = seen_from_elsewhere(ForgetConfig(output="out", key="a/b.png", source="images"))
    assert (seen.output, seen.key, seen.source) == (f"{here}/out", "a/b.png", f"{here}/images")


def test_what_a_training_starts_from_is_a_model(here: Path) -> None:
    seen = [seen_from_elsewhere(TrainConfig(data="d", output="o", init=init)).init for init in ("mine", "tiny", None)]
    assert seen == [f"{here}/mine", "packaged:tiny", None]


def test_the_digest_of_the_masks_to_assemble_stays_one(here: Path) -> None:
    seen = seen_from_elsewhere(AssembleConfig(output="masks", key="a.tif", out="a.tif", model="0123456789"))
    assert (seen.model, seen.key) == ("0123456789", "a.tif")
    assert (seen.output, seen.out) == (f"{here}/masks", f"{here}/a.tif")


def test_a_model_that_is_nowhere_is_told_before_anything_is_sent(here: Path) -> None:
    with pytest.raises(ModelError, match="the packaged models are tiny"):
        seen_from_elsewhere(PredictConfig(model="small", input="images", output="out"))

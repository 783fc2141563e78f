"""A model of the package is found by its name, wherever a model is asked for."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from unetpp import packaged
from unetpp.checkpoint import digest, from_pretrained, read_pretrained
from unetpp.errors import ModelError
from unetpp.predictor import Predictor


@pytest.fixture
def packaged_dir(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's models are `nuclei` and `cells`; the working directory is an empty one."""
    for name in ("nuclei", "cells"):
        shutil.copytree(tiny_model, tmp_path / "models" / name)
    (tmp_path / "models" / "not a model").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(packaged, "ROOT", tmp_path / "models")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "models"


def test_a_packaged_model_is_loaded_by_its_name(packaged_dir: Path, tiny_model: Path) -> None:
    assert packaged.names() == ("cells", "nuclei")
    for name in ("nuclei", "packaged:nuclei", Path("nuclei")):
        assert digest(from_pretrained(name)) == digest(from_pretrained(tiny_model))
        assert read_pretrained(name) == read_pretrained(tiny_model)
    image = np.zeros((20, 30), np.uint8)
    for mode in ("fast", "accurate"):
        one, other = (Predictor.from_pretrained(place, mode)([image])[0] for place in ("nuclei", tiny_model))  # type: ignore[arg-type]
        assert np.array_equal(one, other)


def test_a_folder_of_that_name_comes_first_and_the_scheme_before_it(packaged_dir: Path) -> None:
    (packaged_dir.parent / "here" / "nuclei").mkdir()
    assert packaged.resolve("nuclei") == Path("nuclei")
    assert packaged.resolve("packaged:nuclei") == packaged_dir / "nuclei"


@pytest.mark.parametrize("place", ["a/b", "./nuclei", "/nuclei", "s3://bucket/nuclei", ".", "..", "here/.."])
def test_a_path_or_uri_names_no_packaged_model(packaged_dir: Path, place: str) -> None:
    assert packaged.name_of(place) is None


@pytest.mark.parametrize("name", ["nucleus", "packaged:nucleus", "packaged:../here", "packaged:", "not a model"])
def test_an_unknown_name_is_answered_with_those_that_there_are(packaged_dir: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no model .* the packaged models are cells, nuclei"):
        from_pretrained(name)


def test_a_package_without_models_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "ROOT", tmp_path / "absent")
    with pytest.raises(ModelError, match="the packaged models are none; give a folder"):
        read_pretrained("nuclei")

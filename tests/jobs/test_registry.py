"""Which model is current, and how it changes."""

from pathlib import Path

import pytest

from jobs import registry
from jobs.registry import CurrentModel
from unetpp.errors import StorageError


def model_named(digest: str) -> CurrentModel:
    return CurrentModel(digest=digest, level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="first")


@pytest.fixture
def exported_dir(tmp_path: Path) -> Path:
    """A folder with the three files of a model."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (folder / name).write_bytes(name.encode())
    return folder


def test_without_a_promotion_there_is_no_current_model(tmp_path: Path) -> None:
    assert registry.current(str(tmp_path / "absent")) == (0, None)


def test_a_promotion_copies_the_model_and_names_it(tmp_path: Path, exported_dir: Path) -> None:
    models = str(tmp_path / "models")
    assert registry.promote(models, 1, model_named("a" * 64), str(exported_dir))
    assert registry.current(models) == (1, model_named("a" * 64))
    copied = tmp_path / "models" / ("a" * 64)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in exported_dir.iterdir()
    }


def test_the_highest_number_is_the_current_model(tmp_path: Path, exported_dir: Path) -> None:
    models = str(tmp_path / "models")
    for number, digest in ((1, "a" * 64), (2, "b" * 64), (10, "a" * 64)):  # 10 is a rollback to the first
        assert registry.promote(models, number, model_named(digest), str(exported_dir))
    assert registry.current(models) == (10, model_named("a" * 64))


def test_a_number_is_given_once(tmp_path: Path, exported_dir: Path) -> None:
    models = str(tmp_path / "models")
    assert registry.promote(models, 1, model_named("a" * 64), str(exported_dir))
    assert not registry.promote(models, 1, model_named("b" * 64), str(exported_dir))
    assert registry.current(models) == (1, model_named("a" * 64))


def test_a_damaged_pointer_is_told_and_not_skipped(tmp_path: Path, exported_dir: Path) -> None:
    models = tmp_path / "models"
    registry.promote(str(models), 1, model_named("a" * 64), str(exported_dir))
    (models / "current-00002.json").write_text("{")
    with pytest.raises(StorageError, match=r"current-00002\.json does not name a model"):
        registry.current(str(models))

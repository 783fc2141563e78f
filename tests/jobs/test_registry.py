"""Which model is current, and how it changes."""

from pathlib import Path

import pytest

from jobs import registry, storage
from jobs.cli import run_command_line
from jobs.registry import CurrentModel
from unetpp.errors import ConfigError, ModelError, StorageError


def model_named(digest: str) -> CurrentModel:
    return CurrentModel(digest=digest, level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="first")


@pytest.fixture
def lost_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every write that is carried out the answer is lost, and the second try finds the name taken."""
    put_if_absent = storage.put_if_absent

    def lose(uri: str, content: bytes) -> bool:
        put_if_absent(uri, content)
        return put_if_absent(uri, content)

    monkeypatch.setattr(storage, "put_if_absent", lose)


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


def test_a_model_that_is_promoted_again_keeps_what_was_made_of_it_since(tmp_path: Path, exported_dir: Path) -> None:
    models = str(tmp_path / "models")
    assert registry.promote(models, 1, model_named("a" * 64), str(exported_dir))
    config = tmp_path / "models" / ("a" * 64) / "config.json"
    config.write_text('{"quantised": {}}')
    assert registry.promote(models, 2, model_named("a" * 64), str(exported_dir))
    assert registry.has_int8(models, "a" * 64)


def test_a_current_model_that_is_gone_is_told(tmp_path: Path, exported_dir: Path) -> None:
    models = str(tmp_path / "models")
    (exported_dir / "config.json").write_text("{}")
    assert registry.promote(models, 1, model_named("a" * 64), str(exported_dir))
    assert not registry.has_int8(models, "a" * 64)
    (tmp_path / "models" / ("a" * 64) / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no model at .*/aaa.*go back: unetpp rollback"):
        registry.has_int8(models, "a" * 64)


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


def test_a_promotion_whose_answer_was_lost_is_known_for_ours(
    tmp_path: Path, exported_dir: Path, lost_answers: None
) -> None:
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


# ---------------------------------------------------------------------------------------------------- rollback


@pytest.fixture
def three_models(tmp_path: Path, exported_dir: Path) -> str:
    """A registry in which a, b and c were current, one after the other."""
    models = str(tmp_path / "models")
    for number, digest in enumerate("abc", 1):
        assert registry.promote(models, number, model_named(digest * 64), str(exported_dir))
    return models


def test_a_rollback_writes_the_next_number_and_rewrites_nothing(three_models: str) -> None:
    before = {path.name: path.read_bytes() for path in Path(three_models).glob("current-*.json")}
    number, model = registry.rollback(three_models)
    assert (number, model.digest) == (4, "b" * 64)
    assert registry.current(three_models) == (4, model)
    assert model.gate == "rolled back from cccccccccc (number 3)"
    after = {path.name: path.read_bytes() for path in Path(three_models).glob("current-*.json")}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"current-00004.json"}


def test_rolling_back_again_goes_further_back_and_not_forth(three_models: str) -> None:
    assert [registry.rollback(three_models)[1].digest[0] for _ in range(2)] == ["b", "a"]
    with pytest.raises(ConfigError, match=r"aaaaaaaaaa is the first model .* there is none to go back to"):
        registry.rollback(three_models)


def test_a_model_that_was_promoted_anew_goes_back_to_the_one_that_it_replaced(
    three_models: str, exported_dir: Path
) -> None:
    assert registry.promote(three_models, 4, model_named("b" * 64), str(exported_dir))
    assert [registry.rollback(three_models)[1].digest[0] for _ in range(3)] == ["c", "b", "a"]
    with pytest.raises(ConfigError, match="aaaaaaaaaa is the first model"):
        registry.rollback(three_models)


def test_a_model_that_was_promoted_after_a_rollback_goes_back_to_what_that_went_to(
    three_models: str, exported_dir: Path
) -> None:
    registry.rollback(three_models)
    for number, digest in ((5, "d"), (6, "c")):
        assert registry.promote(three_models, number, model_named(digest * 64), str(exported_dir))
    assert [registry.rollback(three_models)[1].digest[0] for _ in range(3)] == ["d", "b", "a"]


@pytest.mark.parametrize(("lost", "back_to"), [(1, "b"), (2, "a"), (3, "a"), (4, "b")])
def test_a_number_that_is_missing_leaves_a_way_back(three_models: str, lost: int, back_to: str) -> None:
    if lost != 1:
        registry.rollback(three_models)
    (Path(three_models) / f"current-{lost:05d}.json").unlink()
    assert registry.rollback(three_models)[1].digest[0] == back_to


def test_two_rollbacks_at_once_write_two_numbers(three_models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else takes the number between our look and our write: we look again."""
    put_if_absent, taken = storage.put_if_absent, []

    def late(uri: str, content: bytes) -> bool:
        if not taken:
            taken.append(put_if_absent(uri, model_named("d" * 64).model_dump_json().encode()))
        return put_if_absent(uri, content)

    monkeypatch.setattr(storage, "put_if_absent", late)
    number, model = registry.rollback(three_models)
    assert (number, model.digest) == (5, "c" * 64)  # from d, which had become current


def test_a_rollback_whose_answer_was_lost_goes_back_once(three_models: str, lost_answers: None) -> None:
    number, model = registry.rollback(three_models)
    assert (number, model.digest) == (4, "b" * 64)
    assert registry.current(three_models) == (4, model)


def test_a_model_that_is_gone_cannot_be_gone_back_to(three_models: str) -> None:
    (Path(three_models) / ("b" * 64) / "config.json").unlink()
    with pytest.raises(ConfigError, match="is gone"):
        registry.rollback(three_models)


def test_nothing_can_be_rolled_back_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to go back from"):
        registry.rollback(str(tmp_path))


def test_the_command_says_which_model_is_current_now(three_models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line("rollback", [three_models]) == 0
    said = capsys.readouterr().out
    assert "number 4" in said
    assert "rolled back from cccccccccc" in said

import logging
from pathlib import Path

import pytest

from jobs import train_records
from jobs.train_records import RunLog, followed


def sentences(lines: list[str]) -> list[str]:
    return [line.partition("  ")[2] for line in lines]


def test_a_log_goes_on_from_what_an_earlier_call_wrote(tmp_path: Path) -> None:
    RunLog(str(tmp_path)).write("epoch 1/2  loss 0.5")
    log = RunLog(str(tmp_path))
    log.write("epoch 2/2  loss 0.4")
    assert sentences(log.lines()) == ["epoch 1/2  loss 0.5", "epoch 2/2  loss 0.4"]
    assert (tmp_path / "records" / "log.txt").read_text().startswith("20")


def test_what_is_new_is_logged_to_the_last_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(str(tmp_path))
    log.write("known before")
    with caplog.at_level(logging.INFO, "jobs.train_records"), followed(str(tmp_path)):
        log.write("new")
        log.write("the last")
    assert caplog.messages == ["new", "the last"]


def test_a_place_that_cannot_be_written_ends_nothing_and_loses_no_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(train_records.logger, "warning", lambda text, *values: said.append(text % values))
    (tmp_path / "records").write_text("a file in the way")
    log = RunLog(str(tmp_path))
    log.write("first")
    assert len(said) == 1
    assert said[0].startswith("first (")
    (tmp_path / "records").unlink()
    log.write("second")
    assert sentences(log.lines()) == ["first", "second"]

"""Looking after runs: how far one is, what became of an image, and another try for what failed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import assemble, explain, forget, forgotten, predict, retry, status, storage
from jobs.cli import run_command_line
from jobs.contract import (
    AssembleConfig,
    ExplainConfig,
    ForgetConfig,
    PredictConfig,
    PredictResult,
    RetryConfig,
    StatusConfig,
)
from jobs.table import read_masks
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError, ModelError
from unetpp.model import UNetPlusPlus


@pytest.fixture
def run_uri(archive: Path, tiny_model: Path, tmp_path: Path) -> str:
    """A run in which two images were damaged that are whole again by now, versions unchanged."""
    images = Path(shutil.copytree(archive, tmp_path / "images"))
    for name in ("a.png", "c d.png"):
        path = images / name
        content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.write_bytes(b"x" * len(content))
        os.utime(path, ns=times)
        (tmp_path / name).write_bytes(content)
    settings = {"model": str(tiny_model), "input": str(images), "output": str(tmp_path / "out"), "threads": 1}
    result = predict.run(PredictConfig.model_validate({**settings, "backend": "inline", "shard_images": 5}))
    assert result.failures == {"decode": 2}
    for name in ("a.png", "c d.png"):
        path = images / name
        times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.write_bytes((tmp_path / name).read_bytes())
        os.utime(path, ns=times)
    return str(tmp_path / "out" / "runs" / "r00001")


@pytest.fixture
def again(run_uri: str) -> Callable[..., PredictResult]:
    """Function: retry the run."""

    def run(**fields: Any) -> PredictResult:
        return retry.run(RetryConfig.model_validate({"run": run_uri, "backend": "inline", "threads": 1, **fields}))

    return run


def test_a_retry_is_a_run_of_what_failed(again, tmp_path: Path) -> None:
    result = again()
    assert (result.runs, result.num_listed, result.num_predicted, result.exit_code) == (("r00002",), 2, 2, 0)
    newest = read_masks(str(tmp_path / "out"), result.model_digest, ["key", "error_code", "attempts"]).to_pylist()
    assert {row["key"]: row["attempts"] for row in newest if row["attempts"] > 1} == {"a.png": 2, "c d.png": 2}
    assert len(newest) == 12
    assert all(row["error_code"] is None for row in newest)
    assert (again().status, again().num_listed) == ("unchanged", 0)


def test_only_the_named_causes_are_tried_again(again) -> None:
    assert again(only=("timeout",)).status == "unchanged"
    assert again(only=("decode",)).num_predicted == 2
    with pytest.raises(ValueError, match="no error code nonsense"):
        RetryConfig(run="r", only=("nonsense",))


def test_a_forgotten_image_does_not_come_back(again, tmp_path: Path) -> None:
    for key in ("a.png", "b.PNG"):
        forget.run(ForgetConfig(output=str(tmp_path / "out"), key=key))
    result = again()
    assert result.num_listed == 1
    rows = read_masks(str(tmp_path / "out"), result.model_digest, ["key", "error_code"]).to_pylist()
    assert {row["key"] for row in rows if row["error_code"] == "forgotten"} == {"a.png", "b.PNG"}
    with pytest.raises(ValueError, match="what is forgotten stays so"):
        RetryConfig(run="r", only=("forgotten",))


def test_no_retry_has_an_image_that_a_killed_forget_has_noted(again, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    (row,) = (row for row in read_masks(output).to_pylist() if row["key"] == "a.png")
    forgotten.remember(output, [(row["source_uri"], row["key"], row["etag"])])
    assert again().num_listed == 1


def test_a_retry_works_where_the_run_is_now(again, run_uri: str, tmp_path: Path) -> None:
    shutil.copytree(run_uri, tmp_path / "kept" / "runs" / "first")
    with pytest.raises(ConfigError, match="there is no run r00001 in"):
        again(run=str(tmp_path / "kept" / "runs" / "first"))
    moved = Path(shutil.move(tmp_path / "out", tmp_path / "moved"))
    result = again(run=str(moved / "runs" / "r00001"))
    assert (result.num_predicted, result.table_uri) == (2, str(moved / "table"))
    assert not (tmp_path / "out").exists()


def test_another_model_at_its_place_is_refused(again, tmp_path: Path) -> None:
    save_pretrained(UNetPlusPlus(ModelConfig(level=1, filters=(2, 4))), tmp_path / "retrained")
    with pytest.raises(ModelError, match="put that model back"):
        again(model=str(tmp_path / "retrained"))


def test_a_run_of_the_split_topology_is_retried_inline(again, run_uri: str) -> None:
    record = Path(run_uri, "run.json")
    record.write_text(record.read_text().replace('"topology": "fused"', '"topology": "split"'))
    assert again().num_predicted == 2


def test_status_counts_what_is_committed(run_uri: str, again) -> None:
    seen = status.run(StatusConfig(run=run_uri))
    assert (seen.state, seen.num_images, seen.num_predicted, seen.num_failed) == ("sealed", 12, 10, 2)
    assert (seen.num_shards_done, seen.num_shards, seen.failures) == (3, 3, {"decode": 2})
    again()
    assert status.run(StatusConfig(run=run_uri.replace("r00001", "r00002"))).parent == "r00001"
    with pytest.raises(ConfigError, match="there is no run at"):
        status.run(StatusConfig(run=run_uri + "9"))


def test_explain_tells_the_story_of_an_image(run_uri: str, again) -> None:
    again()
    told = explain.run(ExplainConfig(run=run_uri, key="a.png"))
    assert (told.is_in_manifest, told.is_committed, told.shard) == (True, True, 0)
    assert [(row.run, row.outcome, row.attempts) for row in told.rows] == [
        ("r00002", "predicted", 2),
        ("r00001", "decode", 1),
    ]
    assert Path(told.rows[0].mask_uri or "").is_file()
    unknown = explain.run(ExplainConfig(run=run_uri, key="nothing.png"))
    assert (unknown.is_in_manifest, unknown.is_committed, unknown.rows) == (False, False, ())


def test_a_key_is_shown_as_it_is_written(run_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line("explain", [run_uri, "[b]:smile:.png"]) == 0
    assert "has no [b]:smile:.png:" in capsys.readouterr().out


def test_the_parts_of_a_table_are_read_side_by_side(run_uri: str, again, monkeypatch: pytest.MonkeyPatch) -> None:
    again()
    arrow, opened = storage.arrow, list[str]()
    monkeypatch.setattr(storage, "arrow", lambda uri: opened.append(uri) or arrow(uri))
    assert explain.run(ExplainConfig(run=run_uri, key="a.png")).is_committed
    assert len(opened) == 1  # a client for four parts
    output = run_uri.partition("/runs/")[0]
    with pytest.raises(ConfigError, match="has no image"):
        assemble.run(AssembleConfig(output=output, key="nothing.png", out=f"{output}/mask.tif"))
    assert len(opened) == 2

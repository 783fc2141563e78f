"""Many small parts become few large ones, and nobody who reads sees a difference."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image

from jobs import compact, explain, forget, gc, predict, rebuild, retry, status, storage, table
from jobs.contract import (
    CompactConfig,
    CompactResult,
    ExplainConfig,
    ForgetConfig,
    GcConfig,
    PredictConfig,
    PredictResult,
    RebuildConfig,
    RetryConfig,
    StatusConfig,
)
from jobs.run_records import list_runs, read_record
from jobs.table import newest_view, read_masks
from unetpp.errors import ConfigError

NIGHTS = 3


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder whose images a test changes."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def paint(path: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24 + seed, 40, 3), np.uint8)).save(path)


@pytest.fixture
def segment(tiny_model: Path, images: Path, place: str) -> Callable[..., PredictResult]:
    """Function: a night over the images, a part for each."""

    def run(**changed: Any) -> PredictResult:
        where = {"model": str(tiny_model), "input": str(images), "output": storage.join(place, "out")}
        how = {"backend": "inline", "threads": 1, "shard_images": 1, "max_failed_share": 1}
        return predict.run(PredictConfig.model_validate(where | how | changed))

    return run


@pytest.fixture
def output(segment, images: Path, place: str) -> str:
    """An output after three nights: new images every night, some replaced, one damaged and mended later."""
    for number in range(4):
        paint(images / f"a{number}.png", number)
    (images / "broken.png").write_bytes(b"no image")
    segment()
    for number in range(3):
        paint(images / f"b{number}.png", 10 + number)
    paint(images / "a1.png", 20)
    os.utime(images / "a1.png", ns=(1, 1))
    segment()
    paint(images / "c.png", 30)
    os.utime(images / "broken.png", ns=(2, 2))
    paint(images / "broken.png", 31)
    (images / "d.png").write_bytes(b"nor this")
    segment()
    return storage.join(place, "out")


def seen(output: str) -> list[dict[str, Any]]:
    """The newest row of every image, but for the run that holds it."""
    rows = read_masks(output).drop_columns(["run"]).to_pylist()
    return sorted(rows, key=lambda row: row["key"])


def parts(output: str) -> dict[str, int]:
    """Number of parts by run."""
    return {run: len(found) for run, found in table.parts_by_run(table.list_parts(output, None)).items()}


def squeeze(output: str, **changed: Any) -> CompactResult:
    return compact.run(CompactConfig.model_validate({"output": output, **changed}))


def test_readers_see_the_same_before_and_after(output: str, segment) -> None:
    before = seen(output)
    assert len(before) == 10
    assert parts(output) == {"r00001": 5, "r00002": 4, "r00003": 3}
    (done,) = squeeze(output).compactions
    assert (done.run, done.compacted, done.num_rows, done.num_parts) == (
        "r00004",
        ("r00001", "r00002", "r00003"),
        10,
        1,
    )
    assert seen(output) == before
    assert parts(output) == {"r00001": 5, "r00002": 4, "r00003": 3, "r00004": 1}  # nothing was touched
    assert segment().status == "unchanged"
    assert squeeze(output).compactions == ()


def test_gc_removes_the_old_parts_a_day_later_and_keeps_every_png_that_a_row_names(output: str, segment) -> None:
    squeeze(output)
    before = seen(output)
    assert "part" not in gc.run(GcConfig(output=output, delete=True)).objects  # somebody may be reading them
    assert gc.run(GcConfig(output=output, older_than_hours=0, delete=True)).objects["part"] == 12
    assert parts(output) == {"r00004": 1}
    assert seen(output) == before
    assert segment().status == "unchanged"
    swept = gc.run(GcConfig(output=output, older_than_hours=0, delete=True)).objects
    assert swept["png"] == 1  # of the image that was replaced: no row has it any more
    for row in before:
        if row["mask_png"] is not None:
            assert storage.read_bytes(row["mask_uri"]) == row["mask_png"]
    assert gc.run(GcConfig(output=output, older_than_hours=0)).objects == {}
    assert segment().status == "unchanged"


def test_a_compaction_is_a_run_in_every_respect(output: str, images: Path) -> None:
    squeeze(output)
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    run_uri = storage.join(output, "runs", "r00004")
    told = status.run(StatusConfig(run=run_uri))
    assert (told.state, told.num_images, told.num_predicted, told.failures) == ("sealed", 10, 9, {"decode": 1})
    result = rebuild.run(RebuildConfig(run=run_uri))
    assert result.num_listed == result.num_predicted + result.num_failed
    assert b"<html" in storage.read_bytes(storage.join(run_uri, "report.html"))
    found = explain.run(ExplainConfig(run=run_uri, key="b1.png"))
    assert (found.is_in_manifest, found.is_committed, found.rows[0].outcome) == (True, True, "predicted")
    times = (images / "d.png").stat()
    paint(images / "d.png", 3)
    content = (images / "d.png").read_bytes()
    (images / "d.png").write_bytes(content[: len(b"nor this")].ljust(len(b"nor this")))
    os.utime(images / "d.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    again = retry.run(RetryConfig(run=run_uri, backend="inline", threads=1))
    assert (again.runs, again.num_listed, again.failures) == (("r00005",), 1, {"decode": 1})
    assert next(row for row in seen(output) if row["key"] == "d.png")["attempts"] == 2


def test_a_compacted_run_says_where_its_rows_are(output: str) -> None:
    squeeze(output)
    run_uri = storage.join(output, "runs", "r00002")
    told = status.run(StatusConfig(run=run_uri))
    assert (told.state, told.compacted_into) == ("compacted", "r00004")
    with pytest.raises(ConfigError, match="r00002 was compacted: r00004 holds its rows; retry that one"):
        retry.run(RetryConfig(run=run_uri, backend="inline"))
    with pytest.raises(ConfigError, match="r00002 was compacted: r00004 holds its rows; rebuild that one"):
        rebuild.run(RebuildConfig(run=run_uri))
    assert explain.run(ExplainConfig(run=run_uri, key="b1.png")).is_committed


def test_nights_go_on_and_are_compacted_in_their_turn(output: str, segment, images: Path) -> None:
    squeeze(output)
    paint(images / "a0.png", 40)
    os.utime(images / "a0.png", ns=(9, 9))
    paint(images / "e.png", 41)
    segment()
    assert list_runs(output)["r00005"] == "sealed"
    before = seen(output)
    (done,) = squeeze(output).compactions
    assert (done.run, done.compacted, done.num_rows) == ("r00006", ("r00004", "r00005"), 11)
    assert seen(output) == before
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    assert parts(output) == {"r00006": 1}
    told = status.run(StatusConfig(run=storage.join(output, "runs", "r00001")))
    assert told.compacted_into == "r00006"
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    assert seen(output) == before
    assert segment().status == "unchanged"


def test_a_copy_of_an_older_models_masks_does_not_hide_the_newer_ones(output: str, segment) -> None:
    segment(write=["parquet", "png", "probability"])
    segment(level=1, write=["parquet"])
    before = seen(output)
    done = squeeze(output).compactions
    assert [each.compacted for each in done] == [("r00005",)]  # a copy of r00004 would look newer than r00005
    assert seen(output) == before
    assert segment(write=["parquet", "png", "probability"]).status == "unchanged"
    assert segment(level=1, write=["parquet"]).status == "unchanged"


def test_runs_that_wrote_other_things_stay_apart(segment, images: Path, place: str) -> None:
    """A run that wrote PNGs has one for every row: rows that have none must not get there."""
    output = storage.join(place, "out")
    for number in range(3):
        paint(images / f"a{number}.png", number)
    segment(write=["parquet"])
    for number in range(3):
        paint(images / f"b{number}.png", number)
    segment(include=["b*"])
    before = seen(output)
    done = squeeze(output).compactions
    assert sorted(each.compacted for each in done) == [("r00001",), ("r00002",)]
    assert seen(output) == before
    for each in done:
        old = read_record(storage.join(output, "runs", each.compacted[0]))
        assert read_record(storage.join(output, "runs", each.run)).write == old.write
    assert segment(write=["parquet"]).status == segment(include=["b*"]).status == "unchanged"
    assert segment(include=["a*"]).num_predicted == 3  # they have no PNG yet


# ------------------------------------------------------------------------------------------------ cut off in the middle


def begun(output: str) -> compact._Copying:
    (kind,) = {compact._kind_of(read_record(storage.join(output, "runs", run))) for run in list_runs(output)}
    sizes = [part.size_bytes for part in table.list_parts(output, None)]
    copying = compact._begin(output, kind, int(2.5 * np.mean(sizes)))  # two parts become one, so that it has much to do
    assert copying is not None
    assert len(copying.shards) > 2
    return copying


def test_a_killed_compaction_is_finished_by_the_next(output: str) -> None:
    before = seen(output)
    copying = begun(output)
    compact._copy(copying.archive, copying.record, 1, copying.shards[1])
    assert seen(output) == before
    done = squeeze(output).compactions
    assert (done[0].run, done[0].num_rows) == ("r00004", 10)
    assert seen(output) == before
    assert {run: state for run, state in list_runs(output).items() if state != "compacted"} == {done[-1].run: "sealed"}


def test_a_compaction_that_was_killed_before_it_marked_what_it_copied_is_finished(output: str) -> None:
    squeeze(output)
    storage.delete(storage.join(output, "runs", "r00002", "_COMPACTED.json"))
    assert list_runs(output)["r00002"] == "sealed"
    assert squeeze(output).compactions == ()
    assert list_runs(output)["r00002"] == "compacted"


def test_a_night_gives_up_a_compaction_that_it_meets(output: str, segment, images: Path) -> None:
    copying = begun(output)
    compact._copy(copying.archive, copying.record, 0, copying.shards[0])
    paint(images / "f.png", 50)
    result = segment()
    assert (result.runs, result.num_predicted, result.num_unchanged) == (("r00005",), 1, 10)
    assert list_runs(output)["r00004"] == "abandoned"
    before = seen(output)
    assert gc.run(GcConfig(output=output, older_than_hours=0, delete=True)).objects.get("png") is None
    (done,) = squeeze(output).compactions
    assert done.num_rows == 11
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    assert seen(output) == before
    assert parts(output) == {done.run: 1}
    assert segment().status == "unchanged"


def test_two_compactions_at_once_both_end_well(output: str) -> None:
    before = seen(output)
    one = begun(output)
    other = compact._resume(output, one.record)
    assert [[piece.part for piece in shard] for shard in other.shards] == [
        [piece.part for piece in shard] for shard in one.shards
    ]
    compact._copy(one.archive, one.record, 0, one.shards[0])
    assert compact._finish(other, 0.0).num_rows == compact._finish(one, 0.0).num_rows == 10
    assert seen(output) == before


def test_an_unfinished_run_is_in_the_way(output: str, segment) -> None:
    storage.delete(storage.join(output, "runs", "r00003", "_SUCCESS.json"))
    with pytest.raises(ConfigError, match=r"r00003 of .* is not finished: finish it, or end it.*r00003, then compact"):
        squeeze(output)
    segment()
    assert squeeze(output).compactions


# ------------------------------------------------------------------------------------------------ forgetting


def holds(output: str, content: bytes) -> list[str]:
    return [
        found.key
        for found in storage.list_objects(output)
        if content in storage.read_bytes(storage.join(output, found.key))
    ]


@pytest.mark.parametrize("swept", [False, True])
def test_an_image_is_forgotten_in_copies_and_originals(output: str, swept: bool) -> None:
    mask = next(row for row in seen(output) if row["key"] == "a2.png")["mask_png"]
    squeeze(output)
    if swept:
        gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    forget.run(ForgetConfig(output=output, key="a2.png"))
    assert holds(output, mask) == []
    assert not storage.exists(storage.join(output, "runs", "r00001", "report.html"))  # it may have shown it
    assert storage.exists(storage.join(output, "runs", "r00002", "report.html"))
    assert next(row for row in seen(output) if row["key"] == "a2.png")["error_code"] == "forgotten"


def test_what_was_forgotten_stays_so_in_copies(output: str, segment) -> None:
    forget.run(ForgetConfig(output=output, key="a2.png"))
    squeeze(output)
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    assert next(row for row in seen(output) if row["key"] == "a2.png")["error_code"] == "forgotten"
    assert segment().status == "unchanged"
    other = segment(level=1)
    assert (other.num_listed, other.num_unchanged) == (10, 1)
    assert "a2.png" not in read_masks(output, other.model_digest)["key"].to_pylist()


def test_what_is_forgotten_while_it_is_copied_does_not_come_back(output: str) -> None:
    mask = next(row for row in seen(output) if row["key"] == "a2.png")["mask_png"]
    runs = list_runs(output)  # what `forget` saw before the compaction began
    copying = begun(output)
    for number, pieces in enumerate(copying.shards):
        compact._copy(copying.archive, copying.record, number, pieces)
    forget._forget_in_runs(output, ForgetConfig(output=output, key="a2.png"), runs)
    assert holds(output, mask)
    compact._finish(copying, 0.0)
    assert holds(output, mask) == []
    with pytest.raises(ConfigError, match="nowhere"):
        forget.run(ForgetConfig(output=output, key="nowhere"))


def test_an_image_that_is_being_copied_is_forgotten_after_that(output: str) -> None:
    begun(output)
    with pytest.raises(ConfigError, match=r"r00004, which has 'a2\.png' to do, is not finished.*then forget"):
        forget.run(ForgetConfig(output=output, key="a2.png"))


# ------------------------------------------------------------------------------------------------ other readers


def test_duckdb_sees_the_same_rows(tiny_model: Path, archive: Path, tmp_path: Path) -> None:
    shutil.copytree(archive, tmp_path / "images")
    where = {"model": str(tiny_model), "input": str(tmp_path / "images"), "output": str(tmp_path / "out")}
    predict.run(PredictConfig.model_validate({**where, "backend": "inline", "shard_images": 2, "threads": 1}))

    def rows() -> list[tuple[Any, ...]]:
        with duckdb.connect() as connection:
            connection.sql(newest_view(str(tmp_path / "out")))
            return connection.sql("select key, mask_png, class_pixels from masks order by key").fetchall()

    before = rows()
    assert len(before) == 12
    squeeze(str(tmp_path / "out"))
    assert rows() == before
    gc.run(GcConfig(output=str(tmp_path / "out"), older_than_hours=0, delete=True))
    assert rows() == before

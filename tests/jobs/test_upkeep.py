"""Looking after an output: what is rebuilt, swept away and forgotten, and what never is."""

import io
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from PIL import Image

from jobs import (
    abandon,
    assemble,
    compact,
    explain,
    forget,
    forgotten,
    gc,
    indexes,
    lease,
    predict,
    rebuild,
    runs,
    sink,
    storage,
    table,
)
from jobs.contract import (
    AbandonConfig,
    AssembleConfig,
    CompactConfig,
    ExitCode,
    ExplainConfig,
    ForgetConfig,
    GcConfig,
    PredictConfig,
    PredictResult,
    RebuildConfig,
)
from jobs.members import Member
from jobs.run_records import State, list_runs, read_record
from jobs.runs import Archive, Opening, open_run
from jobs.sink import png_key
from jobs.sources import Source
from jobs.table import newest_view, read_masks
from unetpp.errors import ConfigError, StorageError


@pytest.fixture
def segment(tiny_model: Path, archive: Path, place: str) -> Callable[..., PredictResult]:
    """Function: take the test archive into an output below `place`, inline."""

    def run(**changed: Any) -> PredictResult:
        where = {"model": str(tiny_model), "input": str(archive), "output": storage.join(place, "out")}
        how = {"backend": "inline", "threads": 1, "shard_images": 5}
        return predict.run(PredictConfig.model_validate(where | how | changed))

    return run


@pytest.fixture
def output(place: str) -> str:
    """Where `segment` writes."""
    return storage.join(place, "out")


def _contents(output: str) -> dict[str, str]:
    return {found.key: found.etag for found in storage.list_objects(output)}


# ------------------------------------------------------------------------------------------------ rebuild


def test_what_seals_a_run_is_made_anew_from_its_parts(segment, output: str) -> None:
    first = segment()
    run_uri = storage.join(output, "runs", "r00001")
    table = {key: etag for key, etag in _contents(output).items() if key.startswith(("table/", "png/"))}
    success = storage.read_json(storage.join(run_uri, "_SUCCESS.json"))
    for name in ("report.html", "result.json", "_SUCCESS.json"):
        storage.delete(storage.join(run_uri, name))
    again = rebuild.run(RebuildConfig(run=run_uri))
    assert again.model_copy(update={"seconds": 0.0}) == PredictResult.model_validate(
        storage.read_json(storage.join(run_uri, "result.json"))
    ).model_copy(update={"seconds": 0.0})
    assert (again.num_listed, again.num_predicted, again.runs) == (first.num_listed, first.num_predicted, first.runs)
    assert storage.read_json(storage.join(run_uri, "_SUCCESS.json")) == success
    assert b"<html" in storage.read_bytes(storage.join(run_uri, "report.html"))
    assert {key: etag for key, etag in _contents(output).items() if key.startswith(("table/", "png/"))} == table


@pytest.mark.parametrize("damage", [b"", b"{", b"{}"])
def test_a_damaged_result_is_made_anew_by_the_driver_that_meets_it(segment, output: str, damage: bytes) -> None:
    segment()
    run_uri = storage.join(output, "runs", "r00001")
    storage.write_bytes(storage.join(run_uri, "result.json"), damage)
    assert rebuild.run(RebuildConfig(run=run_uri)).num_predicted == 12
    assert storage.read_json(storage.join(run_uri, "result.json"))["num_predicted"] == 12


def test_an_unfinished_run_is_not_sealed_by_a_rebuild(segment, output: str) -> None:
    result = segment()
    run_uri = storage.join(output, "runs", "r00001")
    storage.delete(storage.join(run_uri, "_SUCCESS.json"))
    part = storage.join(result.table_uri, f"model=m{result.model_digest[:10]}", "run=r00001", "part-00001.parquet")
    storage.delete(part)
    with pytest.raises(ConfigError, match=r"r00001 is not finished: 1 of its 3 shards"):
        rebuild.run(RebuildConfig(run=run_uri))
    assert segment().runs == ("r00001",)


# ------------------------------------------------------------------------------------------------ gc


def test_an_output_in_order_has_no_garbage_but_notes(segment, output: str) -> None:
    segment()
    before = _contents(output)
    found = gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    assert set(found.objects) <= {"note"}
    after = _contents(output)
    assert {key for key in before if key not in after} == {"runs/r00001/hints/lease-1.json"}
    assert segment().status == "unchanged"


def test_a_mask_whose_digest_ends_in_nul_is_no_garbage(segment, output: str, tmp_path: Path) -> None:
    key = next(f"{number}.png" for number in range(9999) if gc._digest(f"{number}.png.png").endswith(b"\0"))
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / key)
    segment(input=str(tmp_path / "one"))
    assert "png" not in gc.run(GcConfig(output=output)).objects


def test_garbage_is_listed_first_and_removed_when_told(segment, output: str, tiny_model: Path, archive: Path) -> None:
    result = segment()
    run = f"png/model=m{result.model_digest[:10]}/run=r00001"
    garbage = {
        f"{run}/{png_key('never-a-row.png')}": "png",
        "runs/r00001/manifest-0123.parquet": "manifest",
        "runs/r00009/manifest-0123.parquet": "manifest",
        ".tmp/probe-1": "leftover",
    }
    for key in garbage:
        storage.write_bytes(storage.join(output, key), b"x")
    before = _contents(output)
    listed = gc.run(GcConfig(output=output, older_than_hours=0))
    assert listed.objects == {"leftover": 1, "manifest": 2, "note": 1, "png": 1}
    assert not listed.deleted
    assert _contents(output) == before
    assert gc.run(GcConfig(output=output, delete=True)).objects == {"png": 1}  # the rest is young yet
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))
    after = _contents(output)
    assert before.keys() - after.keys() == garbage.keys() | {"runs/r00001/hints/lease-1.json"}
    assert gc.run(GcConfig(output=output, older_than_hours=0)).objects == {}


def test_an_open_run_is_left_alone(segment, output: str, archive: Path, tiny_model: Path) -> None:
    digest = segment(output=output + "-elsewhere").model_digest
    config = PredictConfig(model=str(tiny_model), input=str(archive), output=output, shard_images=5)
    open_run(Archive((Source(str(archive)),), output, digest, config))
    storage.write_bytes(storage.join(output, f"png/model=m{digest[:10]}/run=r00001/{png_key('a.png')}"), b"x")
    storage.write_bytes(storage.join(output, "runs/r00001/hints/shard-00000.1"), b"x")
    assert gc.run(GcConfig(output=output, older_than_hours=0, delete=True)).objects == {}
    storage.write_bytes(storage.join(output, "runs/r00001/_ABANDONED.json"), b"{}")  # not yet in any of its shards
    assert gc.run(GcConfig(output=output, older_than_hours=0, delete=True)).objects == {}


def test_a_run_that_is_opened_meanwhile_is_left_alone(segment, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segment()
    before = _contents(output)
    first: dict[str, State] = {}
    answers = iter([first])
    monkeypatch.setattr(gc, "list_runs", lambda where: next(answers, list_runs(where)))
    assert gc.run(GcConfig(output=output, older_than_hours=0, delete=True)).objects == {}
    assert _contents(output) == before


def test_an_index_goes_with_its_archive(segment, output: str, archive: Path, place: str) -> None:
    def tar_of(*names: str) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as file:
            for name in names:
                file.add(archive / name, name)
        return packed.getvalue()

    def garbage() -> dict[str, int]:
        found = gc.run(GcConfig(output=output, older_than_hours=0, delete=True)).objects
        return {kind: number for kind, number in found.items() if kind == "index"}

    for name in ("stays.tar", "replaced.tar", "deleted.tar"):
        storage.write_bytes(f"{place}/in/{name}", tar_of("a.png"))
    segment(input=f"{place}/in")
    assert garbage() == {}
    storage.write_bytes(f"{place}/in/replaced.tar", tar_of("a.png", "b.PNG"))
    storage.delete(f"{place}/in/deleted.tar")
    assert garbage() == {"index": 2}
    segment(input=f"{place}/in")
    assert garbage() == {}
    assert len(list(storage.list_objects(f"{output}/indexes"))) == 2


def test_an_index_is_kept_where_its_archive_cannot_be_asked_for(place: str) -> None:
    uri = f"{place}/out/indexes/0123.parquet"
    indexes.put(uri, [Member("a.png", "crc", 10, 512)], "s3://no-such-profile@archive/a.tar", "1")
    storage.write_bytes(f"{place}/out/indexes/torn.parquet", b"PAR1")
    gc.run(GcConfig(output=f"{place}/out", older_than_hours=0, delete=True))
    assert [found.key for found in storage.list_objects(f"{place}/out/indexes")] == ["0123.parquet"]


# ------------------------------------------------------------------------------------------------ forget


def test_a_forgotten_image_has_no_mask_anywhere_and_is_not_done_again(segment, output: str) -> None:
    shallow, deep = segment(level=1), segment()
    mask = next(row for row in read_masks(output, deep.model_digest).to_pylist() if row["key"] == "a.png")["mask_png"]
    done = forget.run(ForgetConfig(output=output, key="a.png"))
    assert (done.num_rows, done.runs) == (2, ("r00001", "r00002"))
    for digest in (shallow.model_digest, deep.model_digest):
        rows = {row["key"]: row for row in read_masks(output, digest).to_pylist()}
        assert len(rows) == 12
        assert rows["a.png"]["error_code"] == "forgotten"
        assert rows["a.png"]["mask_png"] is rows["a.png"]["mask_uri"] is rows["a.png"]["class_pixels"] is None
        assert sum(row["mask_png"] is not None for row in rows.values()) == 11
    for found in storage.list_objects(output):
        content = storage.read_bytes(storage.join(output, found.key))
        assert mask not in content, found.key
        assert not found.key.endswith("/a.png.png")
    result = PredictResult.model_validate(storage.read_json(storage.join(output, "runs/r00002/result.json")))
    assert (result.num_listed, result.num_predicted, result.failures) == (12, 11, {"forgotten": 1})
    assert segment().status == "unchanged"
    more = segment(write=("parquet", "png", "probability"))
    assert (more.num_listed, more.num_predicted, more.num_unchanged) == (12, 11, 1)
    assert explain.run(ExplainConfig(run=storage.join(output, "runs", "r00002"), key="a.png")).rows[0].outcome == (
        "forgotten"
    )


def test_no_other_model_has_a_forgotten_image_but_any_has_its_new_version(
    segment, output: str, archive: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(archive, images)
    segment(input=str(images), level=1)
    forget.run(ForgetConfig(output=output, key="a.png"))
    whole = segment(input=str(images))
    assert (whole.num_listed, whole.num_predicted, whole.num_unchanged) == (12, 11, 1)
    assert "a.png" not in read_masks(output, whole.model_digest)["key"].to_pylist()
    for how in ({"mode": "accurate"}, {"mode": "accurate", "window_px": 16}, {"on_new_model": "new_only"}):
        other = segment(input=str(images), **how)
        assert "a.png" not in read_masks(output, other.model_digest)["key"].to_pylist()
    Image.new("RGB", (9, 9)).save(images / "a.png")
    assert segment(input=str(images)).num_predicted == 1


def test_an_image_forgotten_while_a_night_is_planned_is_not_of_that_night(
    segment, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment(level=1)
    put_run = runs.put_run

    def put_after_forget(*what: Any) -> bool:
        monkeypatch.setattr(runs, "put_run", put_run)
        forget.run(ForgetConfig(output=output, key="a.png"))
        return put_run(*what)

    monkeypatch.setattr(runs, "put_run", put_after_forget)
    night = segment()
    assert (night.runs, night.num_predicted, night.num_unchanged) == (("r00003",), 11, 1)
    assert list_runs(output)["r00002"] == "abandoned"
    assert "a.png" not in read_masks(output, night.model_digest)["key"].to_pylist()


def test_a_run_that_was_put_before_its_driver_saw_what_was_forgotten_is_not_resumed(
    segment, output: str, archive: Path, tiny_model: Path
) -> None:
    digest = segment(output=output + "-elsewhere").model_digest
    segment(level=1)
    config = PredictConfig(model=str(tiny_model), input=str(archive), output=output, shard_images=5)
    open_run(Archive((Source(str(archive)),), output, digest, config))
    row = next(row for row in read_masks(output).to_pylist() if row["key"] == "a.png")
    forgotten.remember(output, [(row["source_uri"], row["key"], row["etag"])])
    night = segment()
    assert (night.runs, night.num_predicted, night.num_unchanged) == (("r00003",), 11, 1)
    assert list_runs(output)["r00002"] == "abandoned"


def test_an_image_is_forgotten_in_an_output_that_was_moved(segment, output: str, place: str) -> None:
    segment()
    moved = storage.join(place, "moved")
    for key in _contents(output):
        storage.write_bytes(storage.join(moved, key), storage.read_bytes(storage.join(output, key)))
    forget.run(ForgetConfig(output=moved, key="a.png"))
    pngs = {key for key in _contents(output) if key.startswith("png/")}
    assert pngs - _contents(moved).keys() == {key for key in pngs if key.endswith("/a.png.png")} != set()


def test_a_forget_that_is_cut_off_leaves_nothing_that_is_never_found_again(
    segment, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment(level=1)
    segment()

    def out_of_order(*_: object, **__: object) -> None:
        raise StorageError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", out_of_order)
        with pytest.raises(StorageError):
            forget.run(ForgetConfig(output=output, key="a.png"))
    assert not [key for key in _contents(output) if key.endswith("/a.png.png")]
    monkeypatch.setattr(forget, "write_up", out_of_order)  # as where the images are out of reach
    with pytest.raises(StorageError):
        forget.run(ForgetConfig(output=output, key="a.png"))
    assert not [key for key in _contents(output) if key.endswith(("/a.png.png", "report.html"))]


def test_two_that_forget_at_once_see_each_other(segment, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    segment()
    encode_part = sink.encode_part

    def encode_late(rows: Any, footer: Any) -> bytes:
        monkeypatch.setattr(sink, "encode_part", encode_part)
        content = encode_part(rows, footer)
        forget.run(ForgetConfig(output=output, key="a.png"))  # whole, between the other's reading and its writing
        return content

    keys = table.read_rows(table.list_parts(output, None)[:1], ["key"])["key"].to_pylist()
    key = next(name for name in keys if name != "a.png")
    assert "a.png" in keys
    monkeypatch.setattr(sink, "encode_part", encode_late)
    forget.run(ForgetConfig(output=output, key=key))
    rows = {row["key"]: row for row in read_masks(output).to_pylist()}
    assert {rows[name]["error_code"] for name in ("a.png", key)} == {"forgotten"}
    assert rows["a.png"]["mask_png"] is None


def test_an_image_is_not_forgotten_while_a_run_that_has_it_is_being_given_up(
    segment, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment(level=1)
    with monkeypatch.context() as patch:
        patch.setattr("jobs.progress.Progress.advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert segment().exit_code == ExitCode.INTERRUPTED
    run_uri = storage.join(output, "runs", "r00002")
    with monkeypatch.context() as patch:
        patch.setattr(sink, "abandon", lambda *_, **__: (_ for _ in ()).throw(StorageError("out of order")))
        with pytest.raises(StorageError):
            abandon.run(AbandonConfig(run=run_uri))
    with pytest.raises(
        ConfigError, match=r"r00002, which has 'a\.png' to do, is being given up.*unetpp abandon .*r00002.*then forget"
    ):
        forget.run(ForgetConfig(output=output, key="a.png"))
    abandon.run(AbandonConfig(run=run_uri))
    record = read_record(run_uri)
    held = lease.take(Archive.of(run_uri, record), record, 60.0)
    assert held is not None
    with held, pytest.raises(ConfigError, match=r"process \d+ on .* still works on run r00002, .* 60 s if it is dead"):
        forget.run(ForgetConfig(output=output, key="a.png"))
    assert forget.run(ForgetConfig(output=output, key="a.png")).num_rows >= 1


def test_an_image_is_forgotten_where_the_archive_is_gone(segment, output: str, archive: Path, tmp_path: Path) -> None:
    shutil.copytree(archive, tmp_path / "images")
    segment(input=str(tmp_path / "images"))
    shutil.rmtree(tmp_path / "images")
    assert forget.run(ForgetConfig(output=output, key="a.png", source=f"{tmp_path}/images/")).num_rows == 1
    with pytest.raises(ConfigError, match=r"has an image 'a\.png' of /elsewhere"):
        forget.run(ForgetConfig(output=output, key="a.png", source="/elsewhere"))


def test_an_image_that_is_nowhere_or_yet_to_be_done_is_refused(
    segment, output: str, archive: Path, tiny_model: Path
) -> None:
    digest = segment(output=output + "-elsewhere").model_digest
    config = PredictConfig(model=str(tiny_model), input=str(archive), output=output, shard_images=5)
    open_run(Archive((Source(str(archive)),), output, digest, config))
    with pytest.raises(ConfigError, match=r"no run of .* has an image 'nowhere\.png'"):
        forget.run(ForgetConfig(output=output, key="nowhere.png"))
    with pytest.raises(
        ConfigError, match=r"r00001, which has 'a\.png' to do, is not finished.*unetpp abandon .*r00001"
    ):
        forget.run(ForgetConfig(output=output, key="a.png"))


# ------------------------------------------------------------------------------------------------ abandon


def test_a_run_that_nothing_finishes_is_ended_and_holds_nothing_up(
    segment, output: str, archive: Path, tiny_model: Path
) -> None:
    digest = segment(output=output + "-elsewhere").model_digest
    segment(level=1)
    run_uri = storage.join(output, "runs", "r00002")
    config = PredictConfig(model=str(tiny_model), input=str(archive), output=output, shard_images=5)
    opening = open_run(wanted := Archive((Source(str(archive)),), output, digest, config))
    assert isinstance(opening, Opening)
    held = lease.take(wanted, opening.record, 60.0)
    assert held is not None
    with held, pytest.raises(ConfigError, match=r"process \d+ on .* works on run r00002: stop it .* 60 s after"):
        abandon.run(AbandonConfig(run=run_uri))
    with pytest.raises(ConfigError, match=r"r00002 .*is not finished.*unetpp abandon .*r00002"):
        compact.run(CompactConfig(output=output))
    half = storage.join(output, f"png/model=m{digest[:10]}/run=r00002/{png_key('a.png')}")
    storage.write_bytes(half, b"x")
    assert "png" not in gc.run(GcConfig(output=output)).objects
    assert abandon.run(AbandonConfig(run=run_uri)).state == "abandoned"
    before = _contents(output)
    assert abandon.run(AbandonConfig(run=run_uri)).num_shards_done == 0
    assert _contents(output) == before
    assert gc.run(GcConfig(output=output)).objects["png"] == 1
    assert forget.run(ForgetConfig(output=output, key="a.png")).num_rows == 1
    assert not storage.exists(half)
    assert compact.run(CompactConfig(output=output)).compactions
    assert segment().num_predicted == 11


def test_what_an_abandoned_run_committed_stays_and_a_killed_abandon_is_finished(
    segment, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("jobs.progress.Progress.advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert segment().exit_code == ExitCode.INTERRUPTED  # after one shard
    run_uri = storage.join(output, "runs", "r00001")
    kept = read_masks(output).to_pylist()
    assert 0 < len(kept) < 12
    with monkeypatch.context() as patch:
        patch.setattr(sink, "abandon", lambda *_, **__: (_ for _ in ()).throw(StorageError("out of order")))
        with pytest.raises(StorageError):
            abandon.run(AbandonConfig(run=run_uri))
    with pytest.raises(ConfigError, match=r"r00001 .* is being given up.*unetpp abandon .*r00001"):
        compact.run(CompactConfig(output=output))
    assert abandon.run(AbandonConfig(run=run_uri)).num_shards_done == 1
    assert read_masks(output).to_pylist() == kept
    night = segment()
    assert (night.runs, night.num_predicted, night.num_unchanged) == (("r00002",), 12 - len(kept), len(kept))


def test_a_run_that_is_finished_or_all_committed_is_not_abandoned(segment, output: str) -> None:
    segment()
    run_uri = storage.join(output, "runs", "r00001")
    with pytest.raises(ConfigError, match="r00001 is sealed: it is finished"):
        abandon.run(AbandonConfig(run=run_uri))
    storage.delete(storage.join(run_uri, "_SUCCESS.json"))
    with pytest.raises(ConfigError, match="all of run r00001 is committed: finish it with unetpp rebuild"):
        abandon.run(AbandonConfig(run=run_uri))
    rebuild.run(RebuildConfig(run=run_uri))
    assert list_runs(output) == {"r00001": "sealed"}


# ------------------------------------------------------------------------------------------------ the last run


def test_no_run_comes_after_the_last_number_that_sorts_as_text(segment, output: str) -> None:
    segment(level=1)
    for name in ("run.json", "_SUCCESS.json"):
        content = storage.read_bytes(storage.join(output, "runs", "r00001", name))
        storage.write_bytes(storage.join(output, "runs", "r99999", name), content.replace(b"r00001", b"r99999"))
    with pytest.raises(ConfigError, match=r"the output has a run r99999.*name another output"):
        segment()
    assert list_runs(output).keys() == {"r00001", "r99999"}


# ------------------------------------------------------------------------------------------------ nothing there


def test_an_output_that_is_not_there_is_told(output: str, tmp_path: Path) -> None:
    calls: list[Callable[[str], object]] = [
        lambda where: gc.run(GcConfig(output=where, delete=True)),
        lambda where: compact.run(CompactConfig(output=where)),
        lambda where: forget.run(ForgetConfig(output=where, key="a.png")),
        lambda where: assemble.run(AssembleConfig(output=where, key="a.png", out=str(tmp_path / "mask.tif"))),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"nothing below .*/out; wanted an output of unetpp predict: check"):
            call(output)


def test_an_output_that_is_empty_yet_is_in_order(tmp_path: Path) -> None:
    assert gc.run(GcConfig(output=str(tmp_path), delete=True)).objects == {}
    assert compact.run(CompactConfig(output=str(tmp_path))).compactions == ()


# ------------------------------------------------------------------------------------------------ the newest mask


@pytest.mark.parametrize("name", ["o'ut", "masks [v2]", "[a]*?"])
def test_duckdb_sees_the_newest_row_of_every_image(tiny_model: Path, archive: Path, tmp_path: Path, name: str) -> None:
    output = str(tmp_path / name)
    images = tmp_path / "images with 'quotes'"
    images.mkdir()
    for key in ("a.png", "b.png"):
        (images / key).write_bytes((archive / "a.png").read_bytes())
    settings = {"model": str(tiny_model), "input": str(images), "output": output, "backend": "inline"}
    config = PredictConfig.model_validate(settings)
    digest = predict.run(config).model_digest
    time.sleep(0.01)
    (images / "b.png").write_bytes((archive / "g+h.png").read_bytes())
    os.utime(images / "b.png")
    predict.run(config)
    with duckdb.connect() as connection:
        connection.sql(newest_view(output, digest, name="newest"))
        rows = connection.sql("select key, run, class_pixels, mask_png from newest order by key").fetchall()
    assert [row[:2] for row in rows] == [("a.png", "r00001"), ("b.png", "r00002")]
    wanted = {row["key"]: row for row in read_masks(output, digest).to_pylist()}
    assert [(list(row[2]), row[3]) for row in rows] == [
        (wanted[key]["class_pixels"], wanted[key]["mask_png"]) for key in ("a.png", "b.png")
    ]

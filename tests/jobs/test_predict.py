"""A folder of images becomes a table of masks: each image one row, once, whatever happens on the way."""

import csv
import io
import json
import logging
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs import backends, forecast, manifest, predict, rows, storage
from jobs.cli import run_command_line
from jobs.contract import ExitCode, PredictConfig, PredictResult
from jobs.guarded import Child, DecodePool
from jobs.manifest import ManifestRow, Shard
from jobs.run_records import list_runs
from jobs.runs import Archive, Opening, open_run
from jobs.shard import Item, Outcome, Task, load_predictor, predict_shard, read_shard, write_shard
from jobs.sources import resolve
from jobs.storage import io_threads
from jobs.table import list_parts, read_footers, read_masks
from jobs.worker import Worker
from tests.cpu import needs_bf16
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.engines import Engine, TileStats
from unetpp.errors import (
    AbandonedError,
    BreakerError,
    ConfigError,
    DeviceError,
    ImageError,
    ModelError,
    StorageError,
    UnetppError,
)
from unetpp.images import decode_image, decode_mask
from unetpp.model import UNetPlusPlus
from unetpp.openvino_engine import OpenVINOEngine
from unetpp.predictor import Prediction, Predictor
from unetpp.torch_engine import TorchEngine

NUM_IMAGES = 12  # of the archive


@pytest.fixture
def images(archive: Path, tmp_path: Path) -> Path:
    """A copy of the archive that a test may change."""
    return Path(shutil.copytree(archive, tmp_path / "images"))


@pytest.fixture
def segment(tiny_model: Path, images: Path, tmp_path: Path) -> Callable[..., PredictResult]:
    """Function: run predict inline on `images`, with what the test wants otherwise."""

    def run(**changed: Any) -> PredictResult:
        settings: dict[str, Any] = {
            "model": str(tiny_model),
            "input": str(images),
            "output": str(tmp_path / "out"),
            "backend": "inline",
            "threads": 1,
            "shard_images": 5,
        }
        return predict.run(PredictConfig(**(settings | changed)))

    return run


def _rows(result: PredictResult) -> list[dict[str, Any]]:
    output = result.table_uri.removesuffix("/table")
    return sorted(read_masks(output, result.model_digest).to_pylist(), key=lambda row: row["key"])


def _keys(folder: Path) -> list[str]:
    return sorted(found.key for found in storage.list_objects(folder) if found.key != "notes.txt")


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _law_holds(result: PredictResult) -> bool:
    return result.num_listed == result.num_predicted + result.num_failed + result.num_unchanged


# ------------------------------------------------------------------------------------------------ what comes out


def test_one_image_in_one_row_out(segment, images: Path, tiny_model: Path) -> None:
    result = segment()
    assert (result.status, result.exit_code, result.runs) == ("complete", 0, ("r00001",))
    assert (result.num_listed, result.num_predicted, result.num_failed, result.num_unchanged) == (NUM_IMAGES, 12, 0, 0)
    rows = _rows(result)
    assert [row["key"] for row in rows] == _keys(images)
    predictor = Predictor.from_pretrained(tiny_model)
    for row in rows:
        image_HWC = decode_image((images / row["key"]).read_bytes())
        mask_HW = decode_mask(row["mask_png"])
        (wanted_HW,) = predictor([image_HWC])
        np.testing.assert_array_equal(mask_HW, wanted_HW)
        assert (row["height"], row["width"]) == mask_HW.shape == image_HWC.shape[:2]
        assert row["class_pixels"] == np.bincount(mask_HW.ravel(), minlength=2).tolist()
        assert (row["level"], row["model_digest"], row["attempts"]) == (2, predictor.digest, 1)
        assert 0 <= row["uncertainty"] <= 1


def test_every_png_equals_its_row(segment) -> None:
    rows = _rows(segment())
    for row in rows:
        assert Path(row["mask_uri"]).read_bytes() == row["mask_png"]
    assert len({row["mask_uri"] for row in rows}) == NUM_IMAGES


def test_without_png_there_are_none(segment, tmp_path: Path) -> None:
    rows = _rows(segment(write=("parquet",)))
    assert all(row["mask_uri"] is None and row["mask_png"] for row in rows)
    assert not (tmp_path / "out" / "png").exists()


def test_a_folder_and_s3_give_the_same_masks(segment, images: Path, tiny_model: Path, s3_prefix: str) -> None:
    storage.upload_folder(images, f"{s3_prefix}/images")
    storage.upload_folder(tiny_model, f"{s3_prefix}/model", last="config.json")
    here = segment()
    there = segment(model=f"{s3_prefix}/model", input=f"{s3_prefix}/images", output=f"{s3_prefix}/out")
    same = ("key", "mask_png", "class_pixels", "height", "width", "uncertainty", "model_digest")
    assert [[row[name] for name in same] for row in _rows(there)] == [
        [row[name] for name in same] for row in _rows(here)
    ]
    for row in _rows(there):
        assert storage.read_bytes(row["mask_uri"]) == row["mask_png"]
    assert segment(model=f"{s3_prefix}/model", input=f"{s3_prefix}/images", output=f"{s3_prefix}/out").runs == ()


def test_other_programs_read_the_table_as_it_is(segment) -> None:
    result = segment()
    dataset = ds.dataset(result.table_uri, partitioning="hive")
    assert dataset.count_rows() == NUM_IMAGES
    assert set(dataset.to_table(["run", "model"])["run"].to_pylist()) == {"r00001"}
    query = f"select model, run, count(*), count(mask_png) from '{result.table_uri}/**/*.parquet' group by all"
    assert duckdb.sql(query).fetchall() == [(f"m{result.model_digest[:10]}", "r00001", NUM_IMAGES, NUM_IMAGES)]


def test_openvino_gives_the_masks_of_torch(segment, tmp_path: Path) -> None:
    by_torch, by_openvino = (segment(engine=engine, output=str(tmp_path / engine)) for engine in ("torch", "openvino"))
    assert by_openvino.num_predicted == by_torch.num_predicted == NUM_IMAGES
    assert by_openvino.model_digest == by_torch.model_digest
    masks, others = (
        read_masks(str(tmp_path / engine), by_torch.model_digest).to_pylist() for engine in ("torch", "openvino")
    )
    for row, other in zip(masks, others, strict=True):
        mask_HW, other_HW = decode_mask(row["mask_png"], 1), decode_mask(other["mask_png"], 1)
        assert row["key"] == other["key"]
        assert (mask_HW != other_HW).mean() < 1e-3


def test_levels_and_modes_are_models_of_their_own(segment) -> None:
    results = [segment(), segment(level=1), segment(mode="accurate"), segment(mode="accurate", flips=True)]
    assert len({result.model_digest for result in results}) == 4
    assert [result.runs for result in results] == [("r00001",), ("r00002",), ("r00003",), ("r00004",)]
    shallow, flips = results[1], results[3]
    assert {row["level"] for row in _rows(shallow)} == {1}
    assert segment(mode="accurate", flips=True).status == "unchanged"
    assert flips.report_uri is not None
    assert "accurate+flips mode" in Path(flips.report_uri).read_text()
    with pytest.raises(ValueError, match="flips average over mirror images in accurate mode"):
        segment(flips=True)


# ------------------------------------------------------------------------------------------------ again


def test_a_second_run_predicts_nothing_and_writes_nothing(segment, tmp_path: Path) -> None:
    segment()
    before = _files(tmp_path / "out")
    result = segment()
    assert (result.status, result.exit_code, result.runs) == ("unchanged", 0, ())
    assert (result.num_listed, result.num_unchanged) == (NUM_IMAGES, NUM_IMAGES)
    assert _files(tmp_path / "out") == before


def test_only_what_is_new_or_replaced_is_predicted(segment, images: Path) -> None:
    segment()
    shutil.copy(images / "a.png", images / "new.png")
    Image.new("L", (20, 30), 9).save(images / "plate 1" / "w1.png")
    result = segment()
    assert (result.runs, result.num_predicted, result.num_unchanged) == (("r00002",), 2, NUM_IMAGES - 1)
    newest = {row["key"]: row for row in _rows(result)}
    assert [key for key, row in newest.items() if row["run"] == "r00002"] == ["new.png", "plate 1/w1.png"]
    assert (newest["plate 1/w1.png"]["height"], newest["plate 1/w1.png"]["width"]) == (30, 20)


def test_a_file_that_is_put_back_is_predicted_again(segment, images: Path, tmp_path: Path) -> None:
    first = segment()
    before = {row["key"]: row["mask_png"] for row in _rows(first)}
    shutil.copy2(images / "a.png", tmp_path / "kept.png")
    shutil.copy(images / "g+h.png", images / "a.png")
    assert segment().num_predicted == 1
    shutil.copy2(tmp_path / "kept.png", images / "a.png")
    again = segment()
    assert (again.num_predicted, again.num_unchanged) == (1, NUM_IMAGES - 1)
    assert {row["key"]: row["mask_png"] for row in _rows(again)} == before
    assert segment().status == "unchanged"


def test_asking_for_png_later_does_the_images_again(segment) -> None:
    segment(write=("parquet",))
    assert segment().num_predicted == NUM_IMAGES
    assert segment(write=("parquet",)).status == "unchanged"


# ------------------------------------------------------------------------------------------------ bad images


def test_a_corrupt_image_becomes_an_error_row(segment, images: Path) -> None:
    whole = (images / "deep/er/x.png").read_bytes()
    (images / "a.png").write_bytes(whole[: len(whole) // 2])
    (images / "c d.png").write_bytes(b"")
    result = segment()
    assert (result.status, result.exit_code) == ("partial", ExitCode.DONE_WITH_FAILED_IMAGES)
    assert (result.num_predicted, result.failures) == (NUM_IMAGES - 2, {"decode": 2})
    failed = [row for row in _rows(result) if row["error_code"]]
    assert [row["key"] for row in failed] == ["a.png", "c d.png"]
    assert all(row["error"] and row["mask_png"] is None and row["mask_uri"] is None for row in failed)
    assert segment().status == "unchanged"  # bad bytes stay bad


def test_failed_images_may_be_no_failure_of_the_call(segment, images: Path) -> None:
    (images / "a.png").write_bytes(b"no image")
    result = segment(partial_ok=True)
    assert (result.status, result.exit_code, result.num_failed) == ("partial", 0, 1)


def test_an_image_above_the_cap_is_a_row(segment) -> None:
    result = segment(max_pixels=2000)
    assert result.failures == {"too_large": sum(row["error_code"] == "too_large" for row in _rows(result))}
    assert 0 < result.num_failed < NUM_IMAGES


def test_a_network_whose_numbers_overflow_makes_numeric_rows(segment, tiny_model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in weights.items() if name.startswith("heads.")}
    save_file(weights | huge, broken / "model.safetensors")
    assert segment(model=str(broken)).failures == {"numeric": NUM_IMAGES}


def test_images_that_vanish_after_the_listing_are_tried_again_next_time(segment, images: Path, tmp_path: Path) -> None:
    _open_a_run(segment, tmp_path)
    moved = (images / "a.png").rename(tmp_path / "a.png")
    Image.new("L", (20, 30), 9).save(images / "b.PNG")
    first = segment()
    # b.PNG has a new version, which the same call takes once the unfinished run is done; a.png is no longer listed.
    assert (first.runs, first.failures, first.exit_code) == (("r00001", "r00002"), {"changed": 1, "gone": 1}, 3)
    assert (first.num_predicted, _law_holds(first)) == (NUM_IMAGES - 1, True)
    moved.rename(images / "a.png")
    second = segment()
    assert (second.runs, second.num_predicted, second.exit_code) == (("r00003",), 1, 0)
    assert {row["key"]: row["attempts"] for row in _rows(second)}["a.png"] == 2


def test_a_file_that_cannot_be_read_is_tried_again_and_holds_up_nothing(segment, images: Path) -> None:
    (images / "locked.png").symlink_to("/proc/self/mem")
    first = segment()
    assert (first.num_predicted, first.failures, first.exit_code) == (NUM_IMAGES, {"unreadable": 1}, 3)
    shutil.copy(images / "a.png", images / "new.png")
    second = segment()
    assert (second.runs, second.num_predicted, second.failures) == (("r00002",), 1, {"unreadable": 1})


class FailingEngine(Engine):
    """An engine that breaks on images with a certain value, as a driver or an allocator might."""

    batch_tiles = 4

    def __call__(self, tiles_BHWC: Any, core: tuple[slice, slice]) -> tuple[Any, list[TileStats]]:
        if (tiles_BHWC == 13).any():
            raise RuntimeError("the device is out of order")
        masks_BHW = (tiles_BHWC[:, core[0], core[1], 0] > 9).astype(np.uint8)
        return masks_BHW, [TileStats(True, 1.0)] * len(masks_BHW)


def test_what_breaks_on_one_image_does_not_break_its_batch() -> None:
    predictor = Predictor(FailingEngine(), ModelConfig(level=1, in_channels=1), digest="d")
    values = [1, 13, 20, 1]
    items = [
        Item(
            ManifestRow(0, 0, str(value), "e", 1, "", -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, None),
            np.full((8, 8, 1), value, np.uint8),
            None,
            0.0,
        )
        for value in values
    ]
    items.insert(2, Item(items[0].row, None, ImageError("decode", "cut short"), 0.0))
    outcomes = list(predict_shard(predictor, items))
    assert [outcome.error.code if outcome.error else None for outcome in outcomes] == [
        None,
        "crash",
        "decode",
        None,
        None,
    ]
    masks = [outcome.prediction.mask_HW.max() for outcome in outcomes if outcome.prediction]
    assert masks == [0, 1, 0]


def test_what_no_image_did_ends_the_shard() -> None:
    class Misconfigured(FailingEngine):
        def __call__(self, tiles_BHWC: Any, core: tuple[slice, slice]) -> tuple[Any, list[TileStats]]:
            raise ConfigError("nothing can be computed like this")

    predictor = Predictor(Misconfigured(), ModelConfig(level=1, in_channels=1), digest="d")
    row = ManifestRow(0, 0, "a.png", "e", 1, "", -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, None)
    with pytest.raises(ConfigError, match="like this"):
        list(predict_shard(predictor, [Item(row, np.zeros((8, 8, 1), np.uint8), None, 0.0)] * 2))


def test_tiles_that_do_not_fit_the_model_are_refused_before_a_run_is_opened(segment, tmp_path: Path) -> None:
    save_pretrained(UNetPlusPlus(ModelConfig(level=1, filters=(4, 6), pad_multiple=32)), tmp_path / "model")
    with pytest.raises(ConfigError, match="tile_px is 528, but this model pads images to multiples of 32"):
        segment(model=str(tmp_path / "model"), tile_px=528)
    assert not (tmp_path / "out").exists()


def test_every_odd_image_is_a_row_with_a_mask_or_a_reason(segment, shared_dir: Path, tmp_path: Path) -> None:
    folder = shared_dir / "data" / "odd_images"
    with (folder / "index.csv").open() as file:
        named = {line["file"] for line in csv.DictReader(file)}
    chosen = tmp_path / "odd"
    chosen.mkdir()
    for number, name in enumerate(sorted(named)):
        if number % 8 == 0 and (folder / name).stat().st_size < 200_000:
            shutil.copy(folder / name, chosen / name)
    result = segment(input=str(chosen), include=("*",))
    rows = _rows(result)
    assert [row["key"] for row in rows] == _keys(chosen)
    assert all((row["mask_png"] is None) == (row["error_code"] is not None) for row in rows)
    assert result.num_predicted > 10
    assert result.num_failed > 3


# ------------------------------------------------------------------------------------------------ a bad world


def test_behind_the_guard_a_large_image_may_take_longer(segment, monkeypatch: pytest.MonkeyPatch) -> None:
    allow, allowed = Child.allow, []

    def noting(child: Child, seconds: float) -> None:
        allowed.append(seconds)
        allow(child, seconds)

    monkeypatch.setattr(Child, "allow", noting)
    monkeypatch.setattr("jobs.worker.MAX_TRIES", 0)
    monkeypatch.setitem(forecast.MACS_PER_S, "openvino", 5e4)
    assert segment().num_predicted == NUM_IMAGES
    assert min(allowed) == 300 < max(allowed)


def test_a_model_that_finds_no_memory_says_how_many_share_the_gpu(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(TorchEngine, "_prepared", full)
    config = PredictConfig(model=str(tiny_model), input=("images",), output="out", engine="torch")
    with pytest.raises(UnetppError, match=r"\(CUDA error: out of memory\), .* 4 worker\(s\) .* --workers-per-gpu;"):
        load_predictor(config.model, config, 1, gpu_share=0.25)


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_broken_gpu_stops_the_run_and_makes_no_rows(
    segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    def broken(*_: Any) -> Any:
        raise DeviceError("the GPU computes nothing more")

    with monkeypatch.context() as patch:
        patch.setattr(OpenVINOEngine, "__call__", broken)
        patch.setattr(Predictor, "batch_images", at_once)
        with pytest.raises(DeviceError):
            segment(result=str(tmp_path / "result.json"))
    failed = json.loads((tmp_path / "result.json").read_text())
    assert (failed["status"], failed["exit_code"], failed["num_failed"]) == ("failed", ExitCode.OTHER, 0)
    notes = (tmp_path / "out" / "runs" / "r00001" / "hints").glob("shard-*")
    assert len(list(notes)) == 1  # as of a worker that was killed
    result = segment()
    assert (result.runs, result.num_predicted, result.exit_code) == (("r00001",), NUM_IMAGES, 0)


def test_a_store_that_refuses_stops_the_run_and_a_rerun_resumes_it(segment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "png").parent.mkdir()
    (out / "png").write_bytes(b"a file where PNGs want a folder")
    with pytest.raises(StorageError, match="a file is where a folder is wanted"):
        segment(result=str(tmp_path / "result.json"))
    failed = json.loads((tmp_path / "result.json").read_text())
    assert (failed["status"], failed["exit_code"], failed["num_predicted"]) == ("failed", ExitCode.STORAGE, 0)
    assert not (out / "table").exists()
    (out / "png").unlink()
    result = segment()
    assert (result.runs, result.num_predicted, result.exit_code) == (("r00001",), NUM_IMAGES, 0)


def test_a_store_that_refuses_is_noticed_while_the_shard_is_predicted(segment, tmp_path: Path, flaky_server) -> None:
    task, _ = _task(_open_a_run(segment, tmp_path), tmp_path)
    flaky_server.last = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    num_queued, made = 400, []

    def outcomes() -> Iterator[Outcome]:
        for number in range(num_queued + 100):
            if number > num_queued:  # the others are on their way before the first is refused
                time.sleep(0.05)
            made.append(number)
            row = ManifestRow(0, 0, f"{number}.png", "e", 1, "", -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, None)
            yield Outcome(row, Prediction(np.zeros((8, 8), np.uint8), 0.0, True), None, 0.0)

    with ThreadPoolExecutor(1) as threads, pytest.raises(StorageError, match="forbids access"):
        rows.written(replace(task, output_uri="s3://bucket/out"), outcomes(), threads)
    assert len(made) < num_queued + 100
    assert len(flaky_server.requests) < num_queued


def test_a_decoder_that_cannot_start_ends_the_run_and_makes_no_rows(
    segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("jobs.guarded.DECODER", "no_such_codec:decode")
        with pytest.raises(UnetppError, match="cannot start"):
            segment()
    assert not (tmp_path / "out" / "table").exists()
    assert (segment().num_predicted, segment().status) == (NUM_IMAGES, "unchanged")


def test_a_part_is_never_taken_from_another_run(segment, tmp_path: Path) -> None:
    opening = _open_a_run(segment, tmp_path)
    strange = tmp_path / "out" / "table" / f"model=m{opening.record.model_digest[:10]}" / "run=r00001"
    other = segment(output=str(tmp_path / "elsewhere"), include=("*.png",))
    shutil.copytree(Path(other.table_uri) / strange.parent.name / "run=r00001", strange)
    with pytest.raises(ConfigError, match="not of run r00001"):
        segment()


# ------------------------------------------------------------------------------------------------ unfinished runs


def _open_a_run(segment: Callable[..., PredictResult], tmp_path: Path, **changed: Any) -> Opening:
    """Open the run that `segment` would, and leave it there as a driver that died at once does."""
    out = str(tmp_path / "out")
    elsewhere = segment(output=str(tmp_path / "digest only"), **changed)
    record = json.loads((tmp_path / "digest only" / "runs" / "r00001" / "run.json").read_text())
    config = PredictConfig.model_validate(record["config"] | {"output": out})
    opening = open_run(Archive(resolve([record["config"]["input"][0]], out), out, elsewhere.model_digest, config))
    assert isinstance(opening, Opening)
    return opening


def _task(opening: Opening, tmp_path: Path) -> tuple[Task, list[Shard]]:
    """What the workers of an opened run are given."""
    record = opening.record
    task = Task(
        run=record.run,
        sources=record.sources,
        output_uri=f"{tmp_path}/out",
        model_uri=record.config["model"],
        model_digest=record.model_digest,
        network=Predictor.from_pretrained(record.config["model"]).config,
        manifest_uri=f"{tmp_path}/out/runs/{record.run}/{record.manifest}",
        manifest_sha256=record.manifest_sha256,
        config=PredictConfig.model_validate(record.config),
        threads=1,
        hints_uri=f"{tmp_path}/out/runs/{record.run}/hints",
        call="call",
    )
    return task, manifest.shards(task.manifest_uri, task.manifest_sha256)


@needs_bf16
def test_auto_goes_on_in_the_precision_of_the_masks_that_are_there(
    segment, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def on(*flags: str, **changed: Any) -> PredictResult:
        caplog.clear()
        monkeypatch.setattr(backends, "cpu_flags", lambda: flags)
        return segment(**changed)

    caplog.set_level(logging.INFO, logger="jobs")
    plain, amx = ("avx512_bf16",), ("avx512_bf16", "amx_bf16")
    first = on(*plain)
    shutil.copy(images / "a.png", images / "one_more.png")
    second = on(*amx)
    assert (second.num_predicted, second.num_unchanged) == (1, NUM_IMAGES)
    assert second.model_digest == first.model_digest
    assert "engine openvino goes on in the precision of the masks that are there" in caplog.text
    elsewhere = on(*amx, output=str(tmp_path / "elsewhere"))
    assert "goes on" not in caplog.text
    assert elsewhere.model_digest != first.model_digest
    assert on(*plain, output=str(tmp_path / "elsewhere")).status == "unchanged"
    assert "engine openvino-bf16 goes on" in caplog.text
    anew = on(output=str(tmp_path / "elsewhere"))
    assert (anew.num_predicted, anew.model_digest) == (NUM_IMAGES + 1, first.model_digest)
    assert "of precision bf16, for which auto has no engine here: engine openvino makes masks of all" in caplog.text


def test_an_unfinished_run_is_resumed_before_anything_new(segment, images: Path, tmp_path: Path) -> None:
    _open_a_run(segment, tmp_path)
    shutil.copy(images / "a.png", images / "new.png")
    result = segment()
    assert (result.runs, result.num_predicted, result.exit_code) == (("r00001", "r00002"), NUM_IMAGES + 1, 0)
    assert _law_holds(result)
    assert [row["key"] for row in _rows(result) if row["run"] == "r00002"] == ["new.png"]


def test_a_run_that_no_listing_shows_is_told_and_not_looked_for_again_and_again(
    segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment()
    monkeypatch.setattr("jobs.runs.list_runs", lambda output: {})
    with pytest.raises(StorageError, match="r00001 is taken, and no listing shows it"):
        segment(window_px=64)


def test_an_unfinished_run_waits_for_an_input_that_vanished(segment, images: Path, tmp_path: Path) -> None:
    named = images / "chosen.csv"
    named.write_text("uri\na.png\n")
    _open_a_run(segment, tmp_path, input=str(named))
    named.unlink()
    with pytest.raises(ConfigError, match=r"chosen\.csv is not what it was when run r00001 was opened.*put it back"):
        segment(input=str(named))
    assert not (tmp_path / "out" / "table").exists()
    named.write_text("uri\na.png\n")
    assert segment(input=str(named)).num_predicted == 1


def test_an_unfinished_run_with_other_settings_is_abandoned_and_its_work_kept(
    segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = _open_a_run(segment, tmp_path, shard_images=3)
    with monkeypatch.context() as patch:
        patch.setattr("jobs.progress.Progress.advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert segment(shard_images=3).exit_code == ExitCode.INTERRUPTED  # after one shard
    result = segment()
    assert (result.runs, result.status) == (("r00002",), "complete")
    assert (result.num_listed, result.num_predicted, result.num_unchanged) == (NUM_IMAGES, NUM_IMAGES - 3, 3)
    assert len(_rows(result)) == NUM_IMAGES
    parts = list_parts(str(tmp_path / "out"), result.model_digest, "r00001")
    assert sorted(footer.abandoned_by or "" for footer in read_footers(parts)) == ["", "r00002", "r00002", "r00002"]
    marker = json.loads((tmp_path / "out" / "runs" / "r00001" / "_ABANDONED.json").read_text())
    assert marker == {"run": "r00001", "abandoned_by": "r00002", "num_shards_left": 3}
    assert segment(shard_images=3).status == "unchanged"  # a marked run is never resumed
    task, shards = _task(opening, tmp_path)
    with Worker(task) as worker, pytest.raises(AbandonedError, match=r"r00001 was abandoned .*r00002"):
        worker(shards[0])


def _interrupted(segment: Callable[..., PredictResult], monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("jobs.progress.Progress.advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert segment(**changed).exit_code == ExitCode.INTERRUPTED  # after one shard


@pytest.fixture
def two_folders(tmp_path: Path, archive: Path) -> tuple[str, str]:
    """Of two images each."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for number in range(2):
            shutil.copy(archive / "a.png", tmp_path / name / f"{number}.png")
    return str(tmp_path / "x"), str(tmp_path / "y")


@pytest.mark.parametrize("is_more", [False, True], ids=["turned round", "more"])
def test_an_unfinished_run_whose_inputs_this_call_has_is_abandoned(
    segment, two_folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_more: bool
) -> None:
    x, y = two_folders
    _interrupted(segment, monkeypatch, input=(x,) if is_more else (x, y), shard_images=1)
    assert segment(input=(y, x)).runs == ("r00002",)
    assert list_runs(str(tmp_path / "out")) == {"r00001": "abandoned", "r00002": "sealed"}
    assert len(_all_rows(tmp_path / "out")) == 4
    assert segment(input=(x, y)).num_listed == 4


@pytest.mark.parametrize("fewer", ["y", "y/0.png"])
def test_a_call_of_fewer_inputs_leaves_a_run_that_somebody_may_work_on(
    segment, two_folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewer: str
) -> None:
    _interrupted(segment, monkeypatch, input=two_folders, shard_images=1)
    assert segment(input=str(tmp_path / fewer)).runs == ("r00002",)
    assert list_runs(str(tmp_path / "out")) == {"r00001": "open", "r00002": "sealed"}
    assert segment(input=two_folders, shard_images=1).runs[0] == "r00001"


def test_a_committed_run_is_sealed_whatever_order_the_inputs_have(
    segment, two_folders: tuple[str, str], tmp_path: Path
) -> None:
    x, y = two_folders
    segment(input=(x, y))
    run = tmp_path / "out" / "runs" / "r00001"
    report = (run / "report.html").read_text().count("<img")
    (run / "_SUCCESS.json").unlink()
    assert segment(input=(y, x)).runs == ("r00001",)
    assert list_runs(str(tmp_path / "out")) == {"r00001": "sealed"}
    assert (run / "report.html").read_text().count("<img") == report > 0


@pytest.mark.parametrize(
    "changed", [{"max_members": 9}, {"max_member_mb": 9}, {"max_ratio": 9.0}, {"max_pixels": 9}, {"pages": "refuse"}]
)
def test_what_is_read_of_the_inputs_is_among_the_settings_of_a_run(changed: dict[str, Any]) -> None:
    where = {"model": "model", "input": "images", "output": "out"}
    one, other = (
        Archive(resolve(["images"], "out"), "out", "0" * 64, PredictConfig.model_validate(where | how)).fingerprint
        for how in ({}, changed)
    )
    assert one != other


def test_a_worker_of_an_abandoned_run_cannot_commit(segment, tmp_path: Path) -> None:
    """The zombie: it looked before the empty part was there, and comes to put its own."""
    opening = _open_a_run(segment, tmp_path, shard_images=3)
    segment()
    before = _files(tmp_path / "out" / "table")
    task, shards = _task(opening, tmp_path)
    with Worker(task) as worker, io_threads() as threads, DecodePool.of(task.config, None) as decoders:
        outcomes = list(predict_shard(worker.predictor, read_shard(task, shards[1], threads, decoders)))
        with pytest.raises(AbandonedError):
            write_shard(task, shards[1], outcomes, threads)
    assert _files(tmp_path / "out" / "table") == before


def test_a_half_abandoned_run_is_given_up_whole_by_the_next_call(segment, tmp_path: Path) -> None:
    _open_a_run(segment, tmp_path, shard_images=3)
    (tmp_path / "out" / "runs" / "r00001" / "_ABANDONED.json").write_text("{}")
    assert segment(shard_images=3).runs == ("r00002",)
    parts = list_parts(str(tmp_path / "out"), segment().model_digest, "r00001")
    assert [footer.abandoned_by for footer in read_footers(parts)] == ["r00002"] * 4


def test_a_run_whose_parts_are_all_there_is_sealed_whatever_the_settings(segment, tmp_path: Path) -> None:
    segment()
    table = _files(tmp_path / "out" / "table")
    (tmp_path / "out" / "runs" / "r00001" / "_SUCCESS.json").unlink()
    assert segment(shard_images=3).runs == ("r00001",)
    assert _files(tmp_path / "out" / "table") == table
    assert segment(shard_images=3).status == "unchanged"


def test_a_folder_without_run_json_is_no_run(segment, tmp_path: Path) -> None:
    (tmp_path / "out" / "runs" / "r00007").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "r00007" / "manifest-1.parquet").write_bytes(b"")
    assert segment().runs == ("r00001",)


def test_a_sealed_run_says_what_it_holds(segment, tmp_path: Path) -> None:
    result = segment()
    run_dir = tmp_path / "out" / "runs" / "r00001"
    assert PredictResult.model_validate_json((run_dir / "result.json").read_text()).num_predicted == NUM_IMAGES
    success = json.loads((run_dir / "_SUCCESS.json").read_text())
    parts = list(Path(result.table_uri).rglob("*.parquet"))
    assert {part["name"]: part["size_bytes"] for part in success["parts"]} == {p.name: p.stat().st_size for p in parts}
    assert success["num_listed"] == NUM_IMAGES
    assert {path.name.split("-")[0] for path in run_dir.iterdir()} == {
        "_SUCCESS.json",
        "hints",
        "manifest",
        "report.html",
        "result.json",
        "run.json",
    }


# ------------------------------------------------------------------------------------------------ kill, twice, stop


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    """Folder of 60 images: enough shards to be killed between two of them."""
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(60):
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def words(tiny_model: Path, many_images: Path, tmp_path: Path) -> list[str]:
    """The command line that segments `many_images`, three to a shard."""
    places = ["--model", str(tiny_model), "--input", str(many_images), "--output", str(tmp_path / "out")]
    return ["predict", *places, "--backend", "inline", "--threads", "1", "--shard-images", "3"]


def _wait_for_a_part(output: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob("table/*/*/part-*.parquet")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def _all_rows(output: Path) -> list[str]:
    return ds.dataset(output / "table", partitioning="hive").to_table(["key"])["key"].to_pylist()


def test_a_killed_run_resumes_without_loss_or_repeat(words, run_unetpp, kill_tree, tmp_path: Path, many_images) -> None:
    process = run_unetpp(*words)
    _wait_for_a_part(tmp_path / "out", process)
    kill_tree(process)
    committed = _files(tmp_path / "out" / "table")
    assert 1 <= len(committed) < 20, "the kill came too early or too late"
    assert run_command_line(None, words) == ExitCode.DONE
    after = _files(tmp_path / "out" / "table")
    assert len(after) == 20
    assert {name: after[name] for name in committed} == committed
    assert sorted(_all_rows(tmp_path / "out")) == _keys(many_images)
    assert list((tmp_path / "out" / "runs").iterdir()) == [tmp_path / "out" / "runs" / "r00001"]


def test_two_drivers_at_once_make_one_run(words, run_unetpp, tmp_path: Path, many_images: Path) -> None:
    drivers = [run_unetpp(*words, "--result", str(tmp_path / f"{name}.json")) for name in ("one", "two")]
    printed = [driver.communicate(timeout=240) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], printed
    assert sorted(_all_rows(tmp_path / "out")) == _keys(many_images)
    assert [path.name for path in (tmp_path / "out" / "runs").glob("*/run.json")] == ["run.json"]
    for name in ("one", "two"):
        result = PredictResult.model_validate_json((tmp_path / f"{name}.json").read_text())
        assert (result.num_listed, _law_holds(result)) == (60, True)
    for row in read_masks(str(tmp_path / "out"), result.model_digest).to_pylist():
        assert Path(row["mask_uri"]).read_bytes() == row["mask_png"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_goes_on_later(
    words, run_unetpp, tmp_path: Path, number: signal.Signals
) -> None:
    result_file = tmp_path / "result.json"
    process = run_unetpp(*words, "--result", str(result_file))
    _wait_for_a_part(tmp_path / "out", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, err
    assert "interrupted; the same command goes on from here (r00001: " in out
    assert "Traceback" not in err
    result = PredictResult.model_validate_json(result_file.read_text())
    assert (result.status, result.exit_code, _law_holds(result)) == ("interrupted", ExitCode.INTERRUPTED, True)
    assert 0 < result.num_predicted < 60
    assert run_command_line(None, words) == ExitCode.DONE
    assert len(set(_all_rows(tmp_path / "out"))) == len(_all_rows(tmp_path / "out")) == 60


# ------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function: (exit code, words) -> the sentence with which `unetpp predict words` is refused."""

    def run(code: ExitCode, *words: str | Path) -> str:
        assert run_command_line(None, ["predict", "--backend", "inline", *map(str, words)]) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


def test_bad_input_is_one_sentence_and_its_exit_code(
    refused, tiny_model: Path, archive: Path, tmp_path: Path, s3_environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, out = ("--model", tiny_model), ("--input", archive), ("--output", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "there is no model at" in refused(ExitCode.MODEL, "--model", tmp_path / "absent", *images, *out)
    assert "there is no model at" in refused(ExitCode.MODEL, "--model", tmp_path / "empty", *images, *out)
    assert "there is no folder" in refused(ExitCode.CONFIG, *model, "--input", tmp_path / "absent", *out)
    assert "no image below" in refused(ExitCode.CONFIG, *model, "--input", tmp_path / "empty", *out)
    assert "other object(s)" in refused(ExitCode.CONFIG, *model, *images, *out, "--include", "*.nothing")
    assert "level" in refused(ExitCode.CONFIG, *model, *images, *out, "--level", "5")
    assert "level 3 has no supervised head" in refused(ExitCode.CONFIG, *model, *images, *out, "--level", "3")
    assert "lies inside the input" in refused(ExitCode.CONFIG, *model, *images, "--output", archive / "out")
    assert "no image below" in refused(ExitCode.CONFIG, *model, "--input", "s3://archive/nothing-here", *out)
    assert "no bucket" in refused(ExitCode.STORAGE, *model, "--input", "s3://no-such-bucket/a", *out)
    assert "no bucket" in refused(ExitCode.STORAGE, *model, *images, "--output", "s3://no-such-bucket/a")
    assert "doubled slash" in refused(ExitCode.CONFIG, *model, *images, "--output", "s3://output/team//masks")
    results = ("--result", archive)
    assert "is a folder; wanted the name of a file" in refused(ExitCode.CONFIG, *model, *images, *out, *results)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "AWS_SECRET_ACCESS_KEY" in refused(ExitCode.STORAGE, *model, "--input", "s3://archive/a", *out)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_model_that_changes_under_a_run_is_refused(segment, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    opening = _open_a_run(segment, tmp_path, model=str(model))
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, model / "model.safetensors")
    task, _ = _task(opening, tmp_path)
    with Worker(task) as worker, pytest.raises(ModelError, match="put that model back"):
        _ = worker.predictor


def test_a_part_is_plain_parquet(segment) -> None:
    result = segment()
    first = min(Path(result.table_uri).rglob("*.parquet"))
    assert pq.ParquetFile(io.BytesIO(first.read_bytes())).schema_arrow.names[:3] == ["key", "source_uri", "etag"]


# ------------------------------------------------------------------------------------------------ a bad store, bad data


def test_a_store_that_overwrites_is_refused_unless_told(
    segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.storage.refuses_overwrites", lambda root: False)
    with pytest.raises(StorageError, match="ignores If-None-Match"):
        segment()
    assert segment(single_writer=True).num_predicted == NUM_IMAGES
    assert json.loads((tmp_path / "out" / "runs" / "r00001" / "run.json").read_text())["config"]["single_writer"]


@pytest.mark.parametrize("code", ["decode", "unreadable"])
def test_a_run_in_which_most_images_fail_stops(
    segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr("jobs.progress.BREAKER_IMAGES", 10)
    bad = tmp_path / "bad"
    bad.mkdir()
    for number in range(30):
        bad_image = bad / f"{number:02d}.png"
        bad_image.write_bytes(b"<html>") if code == "decode" else bad_image.symlink_to("/proc/self/mem")
    with pytest.raises(BreakerError, match=rf"10 of 10 images failed \({code} 10\), more than max_failed_share 0\.5"):
        segment(input=str(bad), result=str(tmp_path / "result.json"))
    stopped = PredictResult.model_validate_json((tmp_path / "result.json").read_text())
    assert (stopped.status, stopped.exit_code, stopped.num_failed) == ("failed", ExitCode.BREAKER, 10)
    rerun = segment(input=str(bad), max_failed_share=1.0)
    assert (rerun.runs, rerun.num_failed, rerun.exit_code) == (("r00001",), 30, ExitCode.DONE_WITH_FAILED_IMAGES)

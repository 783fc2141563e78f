"""A compaction that is stopped at any storage call: readers never notice, nothing is lost, nothing comes back."""

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import compact, forget, gc, predict, storage
from jobs.contract import CompactConfig, CompactResult, ForgetConfig, GcConfig, PredictConfig, PredictResult
from jobs.run_records import list_runs
from jobs.table import list_parts, read_masks
from tests.faults.stepper import Side, Stepper, Stopped, die, stepped
from unetpp.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_storage_thread")

KEY = "b.png"


@pytest.fixture
def segment(tiny_model: Path, tmp_path: Path) -> Callable[[str], PredictResult]:
    """Function: a night over the images of the test, table only."""

    def run(output: str) -> PredictResult:
        where = {"model": str(tiny_model), "input": str(tmp_path / "images"), "output": output, "write": ["parquet"]}
        return predict.run(
            PredictConfig.model_validate({**where, "backend": "inline", "threads": 1, "shard_images": 1})
        )

    return run


@pytest.fixture
def nights(segment, tmp_path: Path) -> str:
    """An output after two nights of which the second did one image again: five parts, four of them the newest."""
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()

    def paint(*names: str) -> None:
        for name in names:
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(images / name)

    paint("a.png", KEY)
    (images / "broken.png").write_bytes(b"no image")
    segment(str(tmp_path / "nights"))
    paint("a.png", "c.png")
    os.utime(images / "a.png", ns=(1, 1))
    segment(str(tmp_path / "nights"))
    return str(tmp_path / "nights")


@pytest.fixture
def copies(nights: str, tmp_path: Path) -> Callable[[object], str]:
    """Function: a copy of the two nights, to be spoilt."""
    return lambda name: str(shutil.copytree(nights, tmp_path / f"copy-{name}"))


def squeeze(output: str) -> CompactResult:
    return compact.run(CompactConfig(output=output))


def seen(output: str) -> list[dict[str, Any]]:
    rows = read_masks(output).drop_columns(["run"]).to_pylist()
    return sorted(rows, key=lambda row: row["key"])


def num_calls(output: str) -> int:
    with stepped(Stepper()) as stepper:
        assert len(squeeze(output).compactions) == 1
    return stepper.num_calls


def refuses(output: str) -> bool:
    """Forget the image, unless an unfinished run has it to do."""
    try:
        forget.run(ForgetConfig(output=output, key=KEY))
    except ConfigError as error:
        return "which has 'b.png' to do, is not finished" in str(error)
    return False


def sweep(output: str) -> None:
    gc.run(GcConfig(output=output, older_than_hours=0, delete=True))


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_compaction_killed_at_any_storage_call_is_never_seen_and_is_finished(
    nights: str, copies, segment, side: Side
) -> None:
    wanted = seen(nights)
    assert [row["key"] for row in wanted] == ["a.png", "b.png", "broken.png", "c.png"]
    for at in range(1, num_calls(copies("whole")) + 1):
        output = copies(at)
        with stepped(Stepper(at, side, die)), pytest.raises(Stopped):
            squeeze(output)
        assert seen(output) == wanted
        if at % 8 == 0:  # a night comes first: it may give the compaction up
            assert segment(output).num_predicted == 0
        squeeze(output)
        sweep(output)
        assert seen(output) == wanted
        assert {run for run, state in list_runs(output).items() if state == "sealed"} == {
            part.run for part in list_parts(output, None)
        }
        assert len(list_parts(output, None)) == 1
        shutil.rmtree(output)


@pytest.mark.parametrize("side", ["before", "after"])
def test_an_image_forgotten_at_any_moment_of_a_compaction_does_not_come_back(nights: str, copies, side: Side) -> None:
    mask = next(row for row in seen(nights) if row["key"] == KEY)["mask_png"]
    for at in range(1, num_calls(copies("whole")) + 1):
        output = copies(at)
        is_paused, may_go_on = threading.Event(), threading.Event()

        def pause(is_paused: threading.Event = is_paused, may_go_on: threading.Event = may_go_on) -> None:
            is_paused.set()
            may_go_on.wait(60)

        with stepped(Stepper(at, side, pause)), ThreadPoolExecutor(1) as threads:
            going = threads.submit(squeeze, output)
            assert is_paused.wait(60)
            is_refused = refuses(output)
            may_go_on.set()
            assert len(going.result(60).compactions) == 1
        if is_refused:  # as it says: finish it first, then forget
            forget.run(ForgetConfig(output=output, key=KEY))
        for found in storage.list_objects(output):
            assert mask not in storage.read_bytes(storage.join(output, found.key)), (at, found.key)
        rows = {row["key"]: row["error_code"] for row in seen(output)}
        assert rows == {"a.png": None, "b.png": "forgotten", "broken.png": "decode", "c.png": None}
        shutil.rmtree(output)


def test_a_sweep_killed_at_any_storage_call_takes_nothing_that_is_read(nights: str, copies) -> None:
    wanted = seen(nights)
    whole = copies("whole")
    squeeze(whole)
    with stepped(Stepper()) as stepper:
        sweep(shutil.copytree(whole, whole + "-swept"))
    for at in range(1, stepper.num_calls + 1):
        output = str(shutil.copytree(whole, f"{whole}-{at}"))
        with stepped(Stepper(at, "after", die)), pytest.raises(Stopped):
            sweep(output)
        assert seen(output) == wanted
        sweep(output)
        assert seen(output) == wanted
        shutil.rmtree(output)

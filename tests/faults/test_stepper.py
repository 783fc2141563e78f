"""A run that is stopped at any storage call, and started again, ends as if nothing had happened."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import predict, sink, storage
from jobs.contract import PredictConfig, PredictResult
from jobs.table import list_parts, read_rows
from tests.faults.stepper import Side, Stepper, Stopped, die, stepped

pytestmark = pytest.mark.usefixtures("one_storage_thread")

KEYS = ("a.png", "b.png", "broken.png", "c.png", "sub/d.png", "sub/e.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good images and a broken one: three shards of two."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, key in enumerate(KEYS):
        path = folder / key
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16 + number, 20, 3), np.uint8)).save(path)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def segment(tiny_model: Path, images: Path) -> Callable[[str], PredictResult]:
    """Function: take the images into an output, inline."""

    def run(output: str) -> PredictResult:
        where = {"model": str(tiny_model), "input": str(images), "output": output}
        return predict.run(
            PredictConfig.model_validate({**where, "backend": "inline", "threads": 1, "shard_images": 2})
        )

    return run


@pytest.fixture
def undisturbed(segment, tmp_path: Path) -> tuple[int, str, dict[str, Any]]:
    """Of a run that nothing disturbs: its number of storage calls, the model's digest, what it leaves behind."""
    output = str(tmp_path / "undisturbed")
    with stepped(Stepper()) as stepper:
        result = segment(output)
    return stepper.num_calls, result.model_digest, contents(output, result.model_digest)


def contents(output: str, digest: str) -> dict[str, Any]:
    """All that a run leaves for others to read: rows by part, without what may differ, and PNGs by name."""
    columns = [name for name in sink.SCHEMA.names if name not in ("seconds", "attempts")]
    found: dict[str, Any] = {}
    for part in list_parts(output, digest):
        rows = read_rows([part], columns).to_pylist()
        for row in rows:
            row["mask_uri"] = row["mask_uri"] and row["mask_uri"].removeprefix(output)
        found[part.uri.removeprefix(output)] = rows
    for png in storage.list_objects(storage.join(output, "png")):
        found[png.key] = storage.read_bytes(storage.join(output, "png", png.key))
    return found


def check(segment, output: str, undisturbed: tuple[int, str, dict[str, Any]]) -> None:
    """Started again, the run ends; what it leaves is what an undisturbed one leaves."""
    _, digest, wanted = undisturbed
    result = segment(output)
    assert (result.num_listed, result.num_failed) == (len(KEYS), 0 if result.status == "unchanged" else 1)
    assert contents(output, digest) == wanted
    assert storage.exists(storage.join(output, "runs", "r00001", "_SUCCESS.json"))
    roots = {found.key.split("/")[0] for found in storage.list_objects(output)}
    assert roots - {storage.SCRATCH} == {"png", "runs", "table"}


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_run_killed_at_any_storage_call_is_finished_by_the_next(segment, place: str, undisturbed, side: Side) -> None:
    num_calls, *_ = undisturbed
    for at in range(1, num_calls + 1):
        output = storage.join(place, str(at))
        with stepped(Stepper(at, side, die)), pytest.raises(Stopped):
            segment(output)
        check(segment, output, undisturbed)


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_paused_run_harms_nothing_when_it_goes_on(segment, place: str, undisturbed, side: Side) -> None:
    num_calls, *_ = undisturbed
    for at in range(1, num_calls + 1):
        output = storage.join(place, str(at))
        is_paused, may_go_on = threading.Event(), threading.Event()

        def pause(is_paused: threading.Event = is_paused, may_go_on: threading.Event = may_go_on) -> None:
            is_paused.set()
            may_go_on.wait(60)

        with stepped(Stepper(at, side, pause)), ThreadPoolExecutor(1) as threads:
            zombie = threads.submit(segment, output)
            assert is_paused.wait(60)
            assert segment(output).num_listed == len(KEYS)
            may_go_on.set()
            assert zombie.result(60).num_listed == len(KEYS)
        check(segment, output, undisturbed)

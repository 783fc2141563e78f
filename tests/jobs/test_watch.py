"""How far a run is, for those who follow it from outside."""

import json

import pytest

from jobs import storage
from jobs.contract import PredictConfig
from jobs.predict import run
from jobs.watch import RunProgress, Watch


def put(place: str, name: str, content: dict[str, object]) -> None:
    storage.write_bytes(storage.join(place, "runs", name), json.dumps(content).encode())


def test_where_there_is_no_run_there_is_no_progress(place: str) -> None:
    assert Watch(place).look() is None


def test_the_newest_run_and_the_newest_lease_count(place: str) -> None:
    watch = Watch(place)
    put(place, "r00001/run.json", {"run": "r00001", "num_images": 10})
    put(place, "r00001/_SUCCESS.json", {})
    assert watch.look() == RunProgress(run="r00001", num_images=10, num_done=10, is_sealed=True)
    put(place, "r00002/run.json", {"run": "r00002", "num_images": 20})
    assert watch.look() == RunProgress(run="r00002", num_images=20, num_done=0, is_sealed=False)
    put(place, "r00002/hints/lease-9.json", {"num_done": 5})
    put(place, "r00002/hints/lease-10.json", {"num_done": 12})
    assert watch.look() == RunProgress(run="r00002", num_images=20, num_done=12, is_sealed=False)
    assert Watch(place).look() == watch.look()


def test_the_newest_of_many_runs_is_found_by_a_listing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 31):
        put(place, f"r{number:05d}/run.json", {"run": f"r{number:05d}", "num_images": 10})
    asked: list[str] = []
    exists = storage.exists
    monkeypatch.setattr(storage, "exists", lambda uri: asked.append(uri) or exists(uri))
    seen = Watch(place).look()
    assert seen is not None
    assert seen.run == "r00030"
    assert len(asked) <= 3


def test_what_is_damaged_is_no_progress_and_no_error(place: str) -> None:
    storage.write_bytes(storage.join(place, "runs", "r00001", "run.json"), b"{")
    assert Watch(place).look() is None


def test_a_real_run_is_seen_to_its_end(tiny_model, archive, tmp_path) -> None:
    config = PredictConfig(
        model=str(tiny_model), input=str(archive), output=str(tmp_path), backend="inline", threads=1, lease_s=30
    )
    watch = Watch(str(tmp_path))
    assert run(config).exit_code == 0
    seen = watch.look()
    assert seen is not None
    assert (seen.run, seen.num_images, seen.num_done, seen.is_sealed) == ("r00001", 12, 12, True)

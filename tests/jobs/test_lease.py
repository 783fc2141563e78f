"""One driver works, others follow it; a dead one is succeeded. None of it decides what is in the table."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from jobs import lease, predict, storage
from jobs.contract import PredictConfig, PredictResult
from jobs.lease import LeaseRecord, Owner
from jobs.run_records import RunRecord
from jobs.runs import Archive
from jobs.sources import Source
from jobs.table import list_parts

ELSEWHERE = Owner(host="elsewhere", kernel="another", pid=1, started_at=0.0)


@pytest.fixture
def run(place: str) -> tuple[Archive, RunRecord]:
    """An open run with nothing done."""
    config = PredictConfig(model="model", input="images", output=place)
    record = RunRecord(
        run="r00001",
        fingerprint="f",
        sources=("images",),
        model_digest="0" * 64,
        write=("parquet",),
        manifest="manifest.parquet",
        manifest_sha256="",
        num_shards=1,
        num_images=9,
        num_listed=9,
        num_unchanged=0,
        opened_at=datetime.now(UTC),
        config={},
    )
    archive = Archive((Source("images"),), place, "0" * 64, config)
    storage.write_bytes(archive.run_uri("r00001", "run.json"), record.model_dump_json().encode())
    return archive, record


def _hold(run: tuple[Archive, RunRecord], number: int, owner: Owner, ttl_s: float) -> None:
    """A lease as another driver would have written it just now."""
    archive, record = run
    written = LeaseRecord(token="other", owner=owner, ttl_s=ttl_s)
    uri = archive.run_uri(record.run, "hints", f"lease-{number}.json")
    storage.write_bytes(uri, written.model_dump_json().encode())


def test_a_lease_has_one_holder_until_it_is_released(run) -> None:
    first = lease.take(*run, ttl_s=60)
    assert first is not None
    assert lease.take(*run, ttl_s=60) is None
    with first:
        assert lease.take(*run, ttl_s=60) is None
    second = lease.take(*run, ttl_s=60)
    assert second is not None


def test_a_silent_owner_is_succeeded_when_its_time_is_over_and_not_before(run) -> None:
    _hold(run, 4, ELSEWHERE, ttl_s=3)
    assert lease.take(*run, ttl_s=60) is None
    time.sleep(4)
    assert lease.take(*run, ttl_s=60) is not None
    assert storage.exists(run[0].run_uri("r00001", "hints", "lease-5.json"))


def test_a_renewed_lease_does_not_run_out(run) -> None:
    held = lease.take(*run, ttl_s=3)
    assert held is not None
    with held:
        time.sleep(5)
        assert lease.take(*run, ttl_s=60) is None
        assert not held.is_lost


def test_a_dead_process_of_this_host_is_succeeded_at_once(run) -> None:
    with psutil.Popen(["true"]) as process:
        gone = Owner.this_process().model_copy(update={"pid": process.pid, "started_at": process.create_time()})
    assert gone.is_gone
    assert not Owner.this_process().is_gone
    assert not ELSEWHERE.is_gone
    _hold(run, 1, gone, ttl_s=1000)
    assert lease.take(*run, ttl_s=60) is not None


def test_a_damaged_lease_holds_nothing(run) -> None:
    storage.write_bytes(run[0].run_uri("r00001", "hints", "lease-1.json"), b"{")
    assert lease.take(*run, ttl_s=60) is not None


def test_who_was_taken_for_dead_learns_it(run) -> None:
    held = lease.take(*run, ttl_s=0.4)
    assert held is not None
    with held:
        _hold(run, 2, ELSEWHERE, ttl_s=60)
        deadline = time.monotonic() + 20
        while not held.is_lost and time.monotonic() < deadline:
            time.sleep(0.05)
        assert held.is_lost
    newest = json.loads(storage.read_bytes(run[0].run_uri("r00001", "hints", "lease-2.json")))
    assert newest["token"] == "other"


@pytest.mark.parametrize(("name", "state"), [("_SUCCESS.json", "sealed"), ("_ABANDONED.json", "abandoned")])
def test_a_follower_sees_how_the_run_ends(run, name: str, state: str) -> None:
    archive, record = run
    _hold(run, 1, ELSEWHERE, ttl_s=60)
    with ThreadPoolExecutor(1) as threads:
        following = threads.submit(lease.follow, archive, record)
        time.sleep(0.3)
        assert not following.done()
        storage.write_bytes(archive.run_uri(record.run, name), b"{}")
        assert following.result(30) == state


def test_a_follower_goes_on_where_the_holder_gives_up(run) -> None:
    held = lease.take(*run, ttl_s=60)
    assert held is not None
    with ThreadPoolExecutor(1) as threads:
        with held:
            following = threads.submit(lease.follow, *run)
            time.sleep(0.3)
            assert not following.done()
        assert following.result(30) == "open"


@pytest.fixture
def segment(tiny_model: Path, archive: Path, tmp_path: Path) -> Callable[..., PredictResult]:
    """Function: take the test archive into `out`, inline."""

    def run(**changed: object) -> PredictResult:
        where = {"model": str(tiny_model), "input": str(archive), "output": str(tmp_path / "out")}
        how = {"backend": "inline", "threads": 1, "shard_images": 2}
        return predict.run(PredictConfig.model_validate(where | how | changed))

    return run


@pytest.mark.parametrize("lease_s", [0, 60])
def test_three_drivers_at_once_make_one_run(segment, tmp_path: Path, lease_s: float) -> None:
    begin = threading.Barrier(3)

    def drive() -> PredictResult:
        begin.wait()
        return segment(lease_s=lease_s)

    with ThreadPoolExecutor(3) as threads:
        results = [driver.result(120) for driver in [threads.submit(drive) for _ in range(3)]]
    assert {(result.num_listed, result.exit_code) for result in results} == {(12, 0)}
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == ["r00001"]
    assert len(list_parts(str(tmp_path / "out"), results[0].model_digest)) == 6


def test_who_lost_the_lease_ends_as_the_driver_that_went_on(
    segment, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Path(shutil.copytree(archive, tmp_path / "images"))
    (images / "a.png").write_bytes(b"damaged")
    execute = predict._Call._execute

    def lose(call, archive, opening, predictor, _):  # type: ignore[no-untyped-def]
        """The other driver does it all."""
        assert execute(call, archive, opening, predictor, None)
        predict.seal(archive, opening.record, 1.0)
        return False

    monkeypatch.setattr(predict._Call, "_execute", lose)
    result = segment(input=str(images))
    assert (result.runs, result.failures, result.exit_code) == (("r00001",), {"decode": 1}, 3)


def test_with_a_lease_the_second_driver_does_no_work(segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, int]] = []
    read_shard = predict.backends.Worker.__call__

    def noted(worker, shard):  # type: ignore[no-untyped-def]
        begun.append((threading.get_ident(), shard.number))
        time.sleep(0.2)
        return read_shard(worker, shard)

    monkeypatch.setattr(predict.backends.Worker, "__call__", noted)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(segment)
        while not begun:
            time.sleep(0.02)
        second = threads.submit(segment)
        assert first.result(60).runs == second.result(60).runs == ("r00001",)
    assert len({thread for thread, _ in begun}) == 1
    assert sorted(shard for _, shard in begun) == list(range(6))

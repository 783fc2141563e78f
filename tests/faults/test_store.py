"""A store that fails in every way a store can: what may pass is waited out, what is one image's is its row, the rest
stops the run with nothing half done."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import storage
from jobs.contract import PredictResult
from jobs.s3_calls import Calls
from jobs.s3_pace import Pace
from jobs.s3_uri import split
from tests.faults import proxy as faults
from tests.faults.invariants import assert_complete, rows_of
from tests.faults.proxy import FaultProxy, Rule
from unetpp.errors import StorageError

IMAGE = r"/images/plate%201/w1\.png$|/images/plate 1/w1\.png$"
KEY = "plate 1/w1.png"
BOUND_S = 60.0


@pytest.fixture
def place(archive: Path, s3_prefix: str) -> str:
    """A prefix of the test's S3 server with the test archive below images/."""
    storage.upload_folder(archive, f"{s3_prefix}/images")
    return s3_prefix


@pytest.fixture
def run(segment, place: str, fault_proxy: FaultProxy) -> Callable[[], PredictResult]:
    """Function: take the archive in the store into an output in the store, in bounded time."""

    def run() -> PredictResult:
        started = time.monotonic()
        try:
            return segment(input=f"{place}/images", output=f"{place}/out")
        finally:
            assert time.monotonic() - started < BOUND_S

    return run


@pytest.fixture(autouse=True)
def no_secret(place: str, fault_proxy: FaultProxy, caplog: pytest.LogCaptureFixture, no_secret_in):  # type: ignore[no-untyped-def]
    """Whatever happened, nothing that was logged or written holds the store's secret."""
    caplog.set_level(logging.DEBUG)
    yield
    fault_proxy.rules = []
    no_secret_in(caplog.text)
    for found in storage.list_objects(place):
        if not found.key.startswith("images/"):
            no_secret_in(storage.read_bytes(storage.join(place, found.key)).decode("latin-1"))


PASSING = {
    "500 burst": Rule("GET", "", faults.answer(500, "InternalError"), times=4),
    "503 burst": Rule("GET", "", faults.answer(503, "SlowDown"), times=5),
    "503 on put": Rule("PUT", "", faults.answer(503, "SlowDown"), times=5),
    "409 on commit": Rule("PUT", r"part-00001", faults.answer(409, "ConditionalRequestConflict"), times=2),
    "reset": Rule("GET", "/images/", faults.reset, times=3),
    "reset on put": Rule("PUT", "", faults.reset, times=3),
    "truncated": Rule("GET", IMAGE, faults.truncate, times=3),
    "stalled": Rule("GET", IMAGE, faults.stall, times=2),
    "slow": Rule("GET", IMAGE, faults.drip, times=2),
    "flipped once": Rule("GET", IMAGE, faults.flip, times=2),
    "lost answer of run.json": Rule("PUT", r"run\.json", faults.lose_answer, times=1),
    "lost answer of a png": Rule("PUT", r"\.png$", faults.lose_answer, times=2),
    "lost answer of a part": Rule("PUT", r"part-", faults.lose_answer, times=2),
    "lost answer of a lease": Rule("PUT", r"lease-", faults.lose_answer, times=1),
    "lost answer of success": Rule("PUT", r"_SUCCESS", faults.lose_answer, times=1),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_out(
    run: Callable[[], PredictResult], place: str, fault_proxy: FaultProxy, masks: dict[str, bytes], fault: str
) -> None:
    rule = PASSING[fault]
    fault_proxy.rules = [Rule(rule.method, rule.path, rule.fault, rule.times)]
    result = run()
    assert fault_proxy.rules[0].times <= 0, "the fault never happened"
    assert (result.status, result.exit_code, result.num_predicted) == ("complete", 0, len(masks))
    assert_complete(f"{place}/out", result.model_digest, masks, masks=masks)


OF_ONE_IMAGE = {
    "flipped": (Rule("GET", IMAGE, faults.flip), "integrity"),
    "deleted": (Rule("GET", IMAGE, faults.answer(404, "NoSuchKey")), "gone"),
    "swapped": (Rule("GET", IMAGE, faults.answer(412, "PreconditionFailed")), "changed"),
    "in an archive storage class": (Rule("GET", IMAGE, faults.answer(403, "InvalidObjectState")), "unreadable"),
}


@pytest.mark.parametrize("fault", OF_ONE_IMAGE)
def test_what_is_one_images_is_its_row_and_comes_back_by_itself(
    run: Callable[[], PredictResult], place: str, fault_proxy: FaultProxy, masks: dict[str, bytes], fault: str
) -> None:
    rule, code = OF_ONE_IMAGE[fault]
    fault_proxy.rules = [Rule(rule.method, rule.path, rule.fault)]
    result = run()
    assert (result.status, result.exit_code, result.failures) == ("partial", 3, {code: 1})
    assert_complete(f"{place}/out", result.model_digest, masks, masks=masks, failed={KEY: code})
    fault_proxy.rules = []
    again = run()
    assert (again.runs, again.num_predicted, again.exit_code) == (("r00002",), 1, 0)


def test_an_object_that_is_really_swapped_is_never_mixed(
    run: Callable[[], PredictResult],
    place: str,
    fault_proxy: FaultProxy,
    masks: dict[str, bytes],
    archive: Path,
    s3_server: dict[str, str],
) -> None:
    other = (archive / "a.png").read_bytes()
    fault_proxy.rules = [
        Rule("GET", IMAGE, faults.after(lambda: storage.write_bytes(f"{place}/images/{KEY}", other)), times=1)
    ]
    result = run()
    assert_complete(f"{place}/out", result.model_digest, masks, masks=masks, failed={KEY: "changed"})
    again = run()
    (row,) = rows_of(f"{place}/out", again.model_digest, "r00002")
    assert (row["key"], row["mask_png"]) == (KEY, masks["a.png"])


STOPPING = {
    "403 on an image": Rule("GET", IMAGE, faults.answer(403, "AccessDenied")),
    "5xx without end": Rule("GET", IMAGE, faults.answer(500, "InternalError")),
    "throttled without end": Rule("GET", IMAGE, faults.answer(503, "SlowDown")),
    "silence without end": Rule("GET", IMAGE, faults.stall),
    "expired credentials": Rule("GET", IMAGE, faults.answer(400, "ExpiredToken")),
    "clock": Rule("GET", IMAGE, faults.answer(403, "RequestTimeTooSkewed")),
    "full bucket, png": Rule("PUT", r"/png/.*w1", faults.answer(507, "InsufficientStorage")),
    "full bucket, part": Rule("PUT", r"part-00002", faults.answer(403, "QuotaExceeded")),
    "read-only, run.json": Rule("PUT", r"run\.json", faults.answer(403, "AccessDenied")),
    "success": Rule("PUT", r"_SUCCESS", faults.answer(500, "InternalError")),
}


@pytest.mark.parametrize("fault", STOPPING)
def test_a_bad_store_stops_the_run_and_makes_no_rows(
    run: Callable[[], PredictResult], place: str, fault_proxy: FaultProxy, masks: dict[str, bytes], fault: str
) -> None:
    rule = STOPPING[fault]
    fault_proxy.rules = [Rule(rule.method, rule.path, rule.fault)]
    with pytest.raises(StorageError) as stopped:
        run()
    assert "canary" not in str(stopped.value)
    if fault == "clock":
        assert "set the clock" in str(stopped.value)
    fault_proxy.rules = []
    digest = run().model_digest
    rows = assert_complete(f"{place}/out", digest, masks, masks=masks)
    assert {row["attempts"] for row in rows} == {1}


def test_a_throttled_store_gets_fewer_requests_for_a_while() -> None:
    pace = Pace()
    started = time.monotonic()
    for _ in range(1000):
        pace.wait()
    assert time.monotonic() - started < 1
    for _ in range(3):
        pace.throttled()
    started = time.monotonic()
    for _ in range(6):
        pace.wait()
    assert time.monotonic() - started > 5 * 0.04 * 0.9
    for _ in range(200):
        pace.succeeded()
    started = time.monotonic()
    for _ in range(1000):
        pace.wait()
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    "rule",
    [
        Rule("PUT", r"/mask\.tif$", faults.answer(500, "InternalError"), times=2, skip=1),
        Rule("PUT", r"/mask\.tif$", faults.reset, times=1, skip=1),
        Rule("POST", r"/mask\.tif$", faults.lose_answer, times=1, skip=1),  # of the request that completes it
    ],
    ids=["500 on a part", "reset on a part", "lost answer"],
)
def test_a_file_in_parts_arrives_whole_whatever_passes(
    place: str, fault_proxy: FaultProxy, tmp_path: Path, rule: Rule
) -> None:
    content = bytes(range(256)) * (9 << 12)
    (tmp_path / "mask.tif").write_bytes(content)
    fault_proxy.rules = [rule]
    storage.upload_file(tmp_path / "mask.tif", f"{place}/mask.tif")
    assert rule.times <= 0
    assert storage.read_bytes(f"{place}/mask.tif") == content


def test_a_file_in_parts_that_does_not_arrive_leaves_nothing(
    place: str, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "mask.tif").write_bytes(bytes(20 << 20))
    fault_proxy.rules = [Rule("PUT", r"/mask\.tif$", faults.answer(403, "AccessDenied"), skip=1)]
    with pytest.raises(StorageError, match="forbids access"):
        storage.upload_file(tmp_path / "mask.tif", f"{place}/mask.tif")
    fault_proxy.rules = []
    assert storage.find(f"{place}/mask.tif") is None
    calls = Calls()
    bucket, prefix = split(place)
    begun = calls.call(place, "list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    (ours,) = {part[1] for _, path in fault_proxy.requests if (part := re.search(r"[?&]uploadId=([^&]+)", path))}
    assert ours not in {each["UploadId"] for each in begun.get("Uploads", [])}  # one whose start timed out may be there

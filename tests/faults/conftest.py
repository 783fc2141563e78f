"""What the fault tests share: what an undisturbed run of the test archive gives."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import predict, storage
from jobs.contract import PredictConfig, PredictResult

pytest.register_assert_rewrite("tests.faults.invariants")

from tests.faults.invariants import rows_of  # noqa: E402
from tests.faults.proxy import FaultProxy  # noqa: E402


@pytest.fixture
def one_storage_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread a pool, so that the calls of every run are the same ones."""
    monkeypatch.setattr(storage, "NUM_THREADS", 1)


@pytest.fixture
def segment(tiny_model: Path, archive: Path, tmp_path: Path) -> Callable[..., PredictResult]:
    """Function: run predict inline with the tiny model, on the test archive unless told otherwise."""

    def run(**changed: Any) -> PredictResult:
        settings: dict[str, Any] = {
            "model": str(tiny_model),
            "input": str(archive),
            "output": str(tmp_path / "out"),
            "backend": "inline",
            "threads": 1,
            "shard_images": 4,
        }
        return predict.run(PredictConfig.model_validate(settings | changed))

    return run


@pytest.fixture(scope="session")
def masks(tiny_model: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Mask PNG by key of the test archive, from a run that nothing disturbed."""
    output = str(tmp_path_factory.mktemp("undisturbed"))
    config = PredictConfig(model=str(tiny_model), input=str(archive), output=output, backend="inline", threads=1)
    return {row["key"]: row["mask_png"] for row in rows_of(output, predict.run(config).model_digest)}


@pytest.fixture
def fault_proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """AWS_* of this process lead to the test's S3 server through a proxy that spoils what it is told to, fast."""
    for name, value in {
        "s3_calls.STALL_TIMEOUT_S": 1,
        "s3_read.MIN_BYTES_PER_S": 100_000,
        "s3_calls.RETRY_SECONDS": 20.0,
        "s3_calls.MAX_WAIT_S": 0.5,
        "s3_calls.MAX_ATTEMPTS": 6,
    }.items():
        monkeypatch.setattr(f"jobs.{name}", value)
    proxy = FaultProxy(s3_environment["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()

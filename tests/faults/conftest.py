"""What the fault tests share: what an undisturbed run of the test archive gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import predict
from jobs.contract import PredictConfig, PredictResult
from tests.faults.invariants import rows_of


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

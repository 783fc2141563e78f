"""A tiny labelled set, and the config of a night on it that takes seconds."""

from pathlib import Path

import pytest

from flows.config import NightlyConfig
from jobs.contract import SynthConfig
from jobs.synth import run as synthesise


@pytest.fixture(scope="session")
def labelled_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve synthetic images of 64 x 64 with masks and splits."""
    data_dir = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(data_dir), num=12, size=64, seed=3))
    return data_dir


@pytest.fixture(scope="session")
def night_config(labelled_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> NightlyConfig:
    """A night of two training steps on the smallest network there is."""
    root = tmp_path_factory.mktemp("night")
    return NightlyConfig.model_validate(
        {
            "data": str(labelled_dir),
            "models": str(root / "models"),
            "work": str(root / "work"),
            "input": str(labelled_dir / "images"),
            "output": str(root / "output"),
            "train": {
                "model": {"level": 2, "filters": [2, 4, 8]},
                "crop_px": 32,
                "batch_size": 2,
                "epochs": 1,
                "steps_per_epoch": 2,
            },
            "predict": {"backend": "inline", "shard_images": 5},
        }
    )

"""A `forget` stopped at any storage call: what it took is no other model's, and the same command finishes it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import forget, predict, storage
from jobs.contract import ForgetConfig, PredictConfig, PredictResult
from jobs.table import read_masks
from tests.faults.stepper import Side, Stepper, Stopped, die, stepped

pytestmark = pytest.mark.usefixtures("one_storage_thread")

KEY = "b.png"


@pytest.fixture
def segment(tiny_model: Path, tmp_path: Path) -> Callable[..., PredictResult]:
    """Function: a night over the images of the test."""

    def run(output: str, **changed: Any) -> PredictResult:
        where = {"model": str(tiny_model), "input": str(tmp_path / "images"), "output": output}
        return predict.run(PredictConfig.model_validate({**where, "backend": "inline", "threads": 1, **changed}))

    return run


@pytest.fixture
def nights(segment, tmp_path: Path) -> str:
    """An output that has the images from two models."""
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for name in ("a.png", KEY):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(images / name)
    for level in (1, 2):
        segment(str(tmp_path / "nights"), level=level)
    return str(tmp_path / "nights")


def withdraw(output: str) -> None:
    forget.run(ForgetConfig(output=output, key=KEY))


def contents(output: str) -> dict[str, bytes]:
    return {found.key: storage.read_bytes(storage.join(output, found.key)) for found in storage.list_objects(output)}


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_forget_killed_at_any_storage_call_has_its_note_first_and_is_finished(
    nights: str, segment, tmp_path: Path, side: Side
) -> None:
    masks = {row["mask_png"] for row in read_masks(nights).to_pylist() if row["key"] == KEY}
    before = contents(nights)
    with stepped(Stepper()) as stepper:
        withdraw(str(shutil.copytree(nights, tmp_path / "whole")))
    for at in range(1, stepper.num_calls + 1):
        output = str(shutil.copytree(nights, tmp_path / f"copy-{at}"))
        with stepped(Stepper(at, side, die)), pytest.raises(Stopped):
            withdraw(output)
        now = contents(output)
        is_noted = any(key.startswith("forgotten/") for key in now)
        assert is_noted or now.items() >= before.items(), at
        if is_noted and at % 8 == 0:
            other = segment(output, mode="accurate")
            assert (other.num_listed, other.num_predicted, other.num_unchanged) == (2, 1, 1), at
        withdraw(output)
        after = contents(output)
        assert not [key for key, content in after.items() for mask in masks if mask in content], at
        assert {key for key in after if key.startswith("forgotten/")} != set(), at
        shutil.rmtree(output)

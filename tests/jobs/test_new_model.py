"""What a retrained model does to an archive that is done already, counted in rows."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import tifffile
import torch

from jobs import predict
from jobs.contract import PredictConfig, PredictResult
from jobs.table import newest_view, read_masks
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus

NUM_OLD, NUM_NEW = 12, 3


@pytest.fixture
def retrained(tmp_path: Path) -> Path:
    """Another model than `tiny_model`."""
    torch.manual_seed(1)
    save_pretrained(UNetPlusPlus(ModelConfig(level=1, filters=(2, 4))), tmp_path / "retrained")
    return tmp_path / "retrained"


@pytest.fixture
def images(archive: Path, tmp_path: Path) -> Path:
    """Images that a first model has segmented, and then some new ones."""
    return Path(shutil.copytree(archive, tmp_path / "images"))


@pytest.fixture
def again(tiny_model: Path, retrained: Path, images: Path, tmp_path: Path) -> Callable[..., PredictResult]:
    """Function: predict with the retrained model an archive that the first one did, and to which images were added."""

    def run(model: Path, **how: Any) -> PredictResult:
        places = {"model": str(model), "input": str(images), "output": str(tmp_path / "out")}
        return predict.run(PredictConfig(**places, backend="inline", threads=1, shard_images=5, **how))

    first = run(tiny_model)
    assert first.num_predicted == NUM_OLD
    some = sorted(path for path in images.rglob("*.png"))[:NUM_NEW]
    for number, path in enumerate(some):
        shutil.copy(path, images / f"new-{number}.png")

    def with_the_retrained_model(**how: Any) -> PredictResult:
        return run(retrained, **how)

    return with_the_retrained_model


def test_new_only_leaves_what_older_models_did(again, images: Path, tmp_path: Path) -> None:
    result = again(on_new_model="new_only")
    assert (result.num_listed, result.num_predicted, result.num_unchanged) == (NUM_OLD + NUM_NEW, NUM_NEW, NUM_OLD)
    assert again(on_new_model="new_only").status == "unchanged"
    newest = read_masks(str(tmp_path / "out"), columns=["key", "model_digest"]).to_pylist()
    by_model = Counter(row["model_digest"] == result.model_digest for row in newest)
    assert by_model == {True: NUM_NEW, False: NUM_OLD}
    assert {row["key"] for row in newest if row["model_digest"] == result.model_digest} == {
        f"new-{number}.png" for number in range(NUM_NEW)
    }


def test_all_does_everything_again(again, tmp_path: Path) -> None:
    result = again(on_new_model="all")
    assert (result.num_predicted, result.num_unchanged) == (NUM_OLD + NUM_NEW, 0)
    newest = read_masks(str(tmp_path / "out"), columns=["model_digest"])
    assert set(newest["model_digest"].to_pylist()) == {result.model_digest}


def test_a_backfill_does_what_is_new_and_its_budget_every_night_until_all_is_done(again, tmp_path: Path) -> None:
    nights = [again(on_new_model="backfill", backfill_images=5) for _ in range(4)]
    assert [night.num_predicted for night in nights] == [NUM_NEW + 5, 5, 2, 0]
    assert [night.num_unchanged for night in nights] == [NUM_OLD - 5, NUM_NEW + NUM_OLD - 5, NUM_NEW + NUM_OLD - 2, 15]
    assert [night.status for night in nights] == ["complete", "complete", "complete", "unchanged"]
    rows = read_masks(str(tmp_path / "out"), nights[0].model_digest, ["key"])
    assert len(rows) == len(set(rows["key"].to_pylist())) == NUM_OLD + NUM_NEW


def test_the_view_of_every_model_has_each_image_once(again, tmp_path: Path) -> None:
    result = again(on_new_model="new_only")
    with duckdb.connect() as database:
        database.sql(newest_view(str(tmp_path / "out")))
        keys = [key for (key,) in database.sql("select key from masks").fetchall()]
    assert len(keys) == len(set(keys)) == result.num_listed


def test_an_image_that_the_older_model_could_not_read_yet_is_tried_by_the_new_one(again, images: Path) -> None:
    changed = next(path for path in sorted(images.rglob("*.png")) if not path.name.startswith("new-"))
    shutil.copy(images / "new-0.png", changed)
    assert again(on_new_model="new_only").num_predicted == NUM_NEW + 1


@pytest.mark.parametrize("how", [{"on_new_model": "new_only"}, {"on_new_model": "backfill"}])
def test_what_an_older_model_could_not_read_is_tried_by_the_next(
    tiny_model: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    (tmp_path / "in").mkdir()
    five_HWC = np.random.default_rng(0).integers(0, 256, (20, 24, 5), np.uint8)
    tifffile.imwrite(tmp_path / "in" / "five.tif", five_HWC, photometric="minisblack", planarconfig="contig")
    places = {"model": str(tiny_model), "input": str(tmp_path / "in"), "output": str(tmp_path / "out")}

    def run(**more: Any) -> PredictResult:
        return predict.run(PredictConfig(**places, backend="inline", threads=1, max_failed_share=1, **how, **more))

    assert run().failures == {"decode": 1}
    assert run().status == "unchanged"
    assert run(bands=(0, 1, 2)).num_predicted == 1
    assert run(bands=(0, 1, 2)).status == "unchanged"
    assert run().status == "unchanged"  # a mask is there, whoever made it

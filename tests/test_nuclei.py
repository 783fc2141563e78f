"""The nuclei model in the package does what its card says."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest

from jobs import predict
from jobs.contract import PredictConfig
from jobs.dataset import load, open_labelled_set
from tests.cpu import needs_bf16
from unetpp.checkpoint import from_pretrained, read_pretrained
from unetpp.images import decode_mask
from unetpp.metrics import confusion_counts, iou
from unetpp.packaged import resolve


def test_the_model_is_small_and_says_where_it_comes_from() -> None:
    folder = resolve("nuclei")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    pretrained = read_pretrained(folder)
    assert (pretrained.licence, pretrained.training["seed"]) == ("Apache-2.0", 2018)
    card = (folder / "README.md").read_text()
    assert "unetpp train" in card
    assert "/home/" not in card + (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("engine", "within"),
    [("openvino", 5e-4), pytest.param("openvino-bf16", 1e-3, marks=needs_bf16), ("openvino-int8", 2e-3)],
)
def test_masks_are_as_good_as_the_card_says(engine: Any, within: float, shared_dir: Path, tmp_path: Path) -> None:
    samples = open_labelled_set(str(shared_dir / "data" / "dsb2018")).split("test")
    (tmp_path / "images").mkdir()
    for sample in samples:
        shutil.copy(sample.image_uri, tmp_path / "images")
    output = tmp_path / "masks"
    done = predict.run(
        PredictConfig(
            model="nuclei", input=str(tmp_path / "images"), output=str(output), backend="inline", engine=engine
        )
    )
    assert (done.num_predicted, done.num_failed) == (129, 0)
    table = pyarrow.dataset.dataset(output / "table", partitioning="hive").to_table(["key", "mask_png"]).to_pylist()
    masks = {Path(row["key"]).stem: decode_mask(row["mask_png"]) for row in table}
    model = from_pretrained(resolve("nuclei"))
    scores = [
        iou(confusion_counts(masks[image.sample.id], image.target_HW, 1)) for image in load(samples, model.config)
    ]
    said = read_pretrained(resolve("nuclei")).scores[f"L{model.config.level}"]
    assert np.mean(scores) == pytest.approx(said.mean_iou, abs=within)

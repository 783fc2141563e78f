"""`unetpp quantise`: an int8 form that is as good as float32 is kept, another is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
from PIL import Image

from jobs import predict
from jobs.cli import run_command_line
from jobs.contract import EvaluateConfig, ExitCode, PredictConfig, PruneConfig, QuantiseConfig
from jobs.evaluate import run as evaluate
from jobs.prune import run as prune
from jobs.quantise import excess
from jobs.quantise import run as quantise
from unetpp.card import Int8Output, Int8Score
from unetpp.checkpoint import digest, from_pretrained, read_pretrained, save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.images import decode_mask
from unetpp.int8 import BIN, XML
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Predictor

SMALL = {"num_crops": 8, "crop_px": 32, "threads": 1}


def threshold_network(outlier: float = 0.0) -> UNetPlusPlus:
    """A network that finds what is brighter than one half, by node X^{1,0} alone.

    One channel of that node has the value `outlier` everywhere, and no weight.
    """
    model = UNetPlusPlus(
        ModelConfig(level=1, in_channels=1, filters=(4, 4), norm="none", mean=(0.0,), std=(1.0,))
    ).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for node in ("x00", "x10", "x01"):
        for layer in (0, 2):
            source = 4 if (node, layer) == ("x01", 0) else 0  # what comes from below is behind the skip
            model.nodes[node][layer].weight[0, source, 1, 1] = 1.0  # type: ignore[index]
    model.ups["x01"].weight[0, 0] = 1.0  # type: ignore[index]
    model.nodes["x10"][2].bias[1] = outlier  # type: ignore[index]
    model.heads["1"].weight[0, 0] = 20.0
    model.heads["1"].bias[0] = -10.0
    return model.eval()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten grey images with bright squares, six of them to train on, two of them to validate on of each of two kinds."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    rng = np.random.default_rng(8)
    rows = ["id,split,modality"]
    for number in range(10):
        mask_HW = (rng.random((6, 6)) > 0.6).repeat(8, 0).repeat(8, 1)
        values_HW = np.where(mask_HW, rng.uniform(160, 250, (48, 48)), rng.uniform(0, 90, (48, 48)))
        Image.fromarray(values_HW.astype(np.uint8)).save(folder / "images" / f"i{number}.png")
        Image.fromarray(mask_HW.astype(np.uint8)).save(folder / "masks" / f"i{number}.png")
        rows.append(f"i{number},{'train' if number < 6 else 'val'},{'even' if number % 2 == 0 else 'odd'}")
    (folder / "splits.csv").write_text("\n".join(rows) + "\n")
    return folder


def save(model: UNetPlusPlus, folder: Path) -> str:
    save_pretrained(model, folder)
    return str(folder)


def config(model: str, data_dir: Path, **fields: Any) -> QuantiseConfig:
    return QuantiseConfig.model_validate({"model": model, "data": str(data_dir), **SMALL, **fields})


@pytest.fixture(scope="module")
def good_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose int8 form was accepted."""
    folder = tmp_path_factory.mktemp("good")
    result = quantise(config(save(threshold_network(), folder), data_dir))
    assert (result.accepted, result.exit_code) == (True, 0)
    return folder


@pytest.fixture(scope="module")
def bad_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is as good, and has no int8 form: the steps of 8 bits are wider than all that it looks at."""
    folder = tmp_path_factory.mktemp("bad")
    save(threshold_network(outlier=1e4), folder)
    return folder


def test_an_int8_form_that_is_as_good_is_written_with_what_it_costs(good_dir: Path, data_dir: Path) -> None:
    assert {path.name for path in good_dir.iterdir()} >= {XML, BIN, "config.json", "README.md", "model.safetensors"}
    about = read_pretrained(good_dir).quantised
    assert about is not None
    assert about.weights_digest == digest(from_pretrained(good_dir)) == digest(threshold_network())
    assert about.levels == (1,)
    score = about.scores["L1"]
    assert score.num_images == 4
    assert score.float32_iou > 0.9
    assert score.drop <= about.max_iou_drop == 0.002
    assert {group: each.num_images for group, each in score.groups.items()} == {"even": 2, "odd": 2}
    assert about.calibration == {"num_crops": 8, "crop_px": 32, "seed": 0, "calibration_split": "train"}
    assert about.versions.keys() == {"nncf", "openvino"}
    assert (
        f"| L1 | all images | 4 | {score.float32_iou:.4f} | {score.int8_iou:.4f} |"
        in (good_dir / "README.md").read_text()
    )


def test_the_float32_score_is_that_of_evaluate(good_dir: Path, data_dir: Path) -> None:
    report = evaluate(EvaluateConfig(model=str(good_dir), data=str(data_dir), split="val", num_bootstrap=100)).reports[
        0
    ]
    about = read_pretrained(good_dir).quantised
    assert about is not None
    assert about.scores["L1"].float32_iou == pytest.approx(report.score.mean_iou, abs=1e-6)


def test_predict_computes_in_int8(good_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    asked = {"model": str(good_dir), "input": str(data_dir / "images"), "output": str(tmp_path), "backend": "inline"}
    done = [
        predict.run(PredictConfig.model_validate(asked | {"engine": each})) for each in ("openvino-int8", "openvino")
    ]
    assert [(each.status, each.num_predicted) for each in done] == [("complete", 10)] * 2
    assert done[0].model_digest != done[1].model_digest
    assert done[0].model_digest == Predictor.from_pretrained(good_dir, engine="openvino-int8").digest
    table = pyarrow.dataset.dataset(tmp_path / "table", partitioning="hive").to_table(["key", "model", "mask_png"])
    masks = {(row["key"], row["model"]): decode_mask(row["mask_png"]) for row in table.to_pylist()}
    int8, float32 = (f"m{each.model_digest[:10]}" for each in done)
    differing = [np.mean(masks[key, int8] != masks[key, float32]) for key, model in masks if model == int8]
    assert len(differing) == 10
    assert np.mean(differing) < 0.02


def test_an_int8_form_that_is_worse_is_refused(
    bad_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in bad_dir.iterdir()}
    words = ["--model", str(bad_dir), "--data", str(data_dir), "--num-crops", "8", "--crop-px", "32", "--threads", "1"]
    assert run_command_line("quantise", words) == ExitCode.CONFIG
    said = " ".join(capsys.readouterr().out.split())
    assert "int8 loses too much, so there is no int8 form: L1 loses" in said
    assert "at most 0.002 is allowed; take engine openvino, or allow more" in said
    assert {path.name: path.read_bytes() for path in bad_dir.iterdir()} == before


def test_a_refusal_can_be_no_failure(bad_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    result = quantise(config(str(bad_dir), data_dir, refusal_ok=True, out=str(tmp_path / "out")))
    assert (result.accepted, result.exit_code) == (False, 0)
    assert result.scores["L1"].drop > 0.1
    assert not (tmp_path / "out").exists()


def test_a_copy_leaves_the_model_as_it_was(good_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    model = save(threshold_network(), tmp_path / "model")
    result = quantise(config(model, data_dir, out=str(tmp_path / "copy")))
    assert result.model_uri == str(tmp_path / "copy")
    assert read_pretrained(model).quantised is None
    assert not (tmp_path / "model" / XML).exists()
    about, other = (read_pretrained(folder).quantised for folder in (tmp_path / "copy", good_dir))
    assert about == other  # the bytes of the int8 form, too


def test_a_pruned_model_has_no_int8_form(good_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    prune(PruneConfig(model=str(good_dir), level=1, out=str(tmp_path)))
    assert read_pretrained(tmp_path).quantised is None
    assert not (tmp_path / XML).exists()
    chosen = tmp_path / "chosen"
    prune(PruneConfig(model=str(good_dir), tolerance=0.9, data=str(data_dir), split="val", out=str(chosen)))
    assert read_pretrained(chosen).quantised is None


def test_one_level_is_quantised_alone(tiny_model: Path, data_dir: Path, tmp_path: Path) -> None:
    result = quantise(config(str(tiny_model), data_dir, level=1, out=str(tmp_path), max_iou_drop=0.9))
    assert list(result.scores) == ["L1"]
    assert Predictor.from_pretrained(tmp_path, level=1, engine="openvino-int8").level == 1
    with pytest.raises(ConfigError, match=r"has heads at levels \[1\], wanted \[2\]"):
        Predictor.from_pretrained(tmp_path, engine="openvino-int8")


def test_every_output_of_a_model_is_measured(tiny_model: Path, data_dir: Path, tmp_path: Path) -> None:
    result = quantise(config(str(tiny_model), data_dir, out=str(tmp_path), max_iou_drop=0.9))
    assert list(result.scores) == ["L1", "L2", "accurate"]


def test_a_packaged_model_is_not_written_to(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="nuclei comes with the package, which is not written to"):
        quantise(config("nuclei", data_dir))


def score(num_images: int, drop: float, **groups: tuple[int, float]) -> Int8Output:
    return Int8Output(
        num_images=num_images,
        float32_iou=0.8,
        int8_iou=0.8 - drop,
        groups={
            name: Int8Score(num_images=number, float32_iou=0.8, int8_iou=0.8 - lost)
            for name, (number, lost) in groups.items()
        },
    )


def test_all_images_and_every_group_of_twenty_are_judged() -> None:
    asked = config("m", Path("d"))
    assert excess({"L1": score(60, 0.0019, dim=(20, 0.0049), rare=(19, 0.1))}, asked) == ""
    assert excess({"L1": score(60, -0.1)}, asked) == ""
    assert excess({"L1": score(60, 0.0), "L2": score(60, 0.0021)}, asked) == (
        "L2 loses 0.0021 over all images (60), at most 0.002 is allowed"
    )
    assert excess({"L1": score(60, 0.001, dim=(20, 0.0051))}, asked) == (
        "L1 loses 0.0051 over group dim (20), at most 0.005 is allowed"
    )
    assert "nan" in excess({"L1": score(60, 0.0).model_copy(update={"int8_iou": float("nan")})}, asked)

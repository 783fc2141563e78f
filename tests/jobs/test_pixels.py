"""What image files hold besides grey and RGB, through the whole pipe: bands, pages, places; and probabilities out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from jobs import forget, gc, predict, retry, storage
from jobs.contract import ForgetConfig, GcConfig, PredictConfig, PredictResult, RetryConfig
from jobs.guarded import GuardedPredictor
from jobs.table import read_masks
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.images import decode_image, decode_mask
from unetpp.measuring import logits_by_level
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Predictor
from unetpp.torch_engine import eight_bits

STACK = np.random.default_rng(1).integers(0, 256, (4, 40, 56), np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with one image of four channels in two forms, and a plain one of two of them and one more."""
    folder = tmp_path / "images"
    folder.mkdir()
    tifffile.imwrite(folder / "pages.tif", STACK, photometric="minisblack")
    tifffile.imwrite(folder / "planes.tif", STACK, photometric="minisblack", planarconfig="separate")
    Image.fromarray(np.ascontiguousarray(STACK[[3, 0, 2]].transpose(1, 2, 0))).save(folder / "plain.png")
    return folder


@pytest.fixture
def segment(tiny_model: Path, images: Path, tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Function: the newest rows by key, after a run on `images` with what the test wants."""

    def run(**changed: Any) -> dict[str, dict[str, Any]]:
        where = {"model": str(tiny_model), "input": str(images), "output": str(tmp_path / "out")}
        how = {"backend": "inline", "threads": 1, "write": ("parquet",)}
        result: PredictResult = predict.run(PredictConfig.model_validate(where | how | changed))
        return {row["key"]: row for row in read_masks(str(tmp_path / "out"), result.model_digest).to_pylist()}

    return run


# ------------------------------------------------------------------------------------------------ bands and pages


def test_bands_make_one_image_of_every_form(segment, images: Path) -> None:
    Image.fromarray(STACK[0]).save(images / "grey.png")
    plain = segment(include=["plain.png"])["plain.png"]
    rows = segment(bands=(3, 0, 2))
    assert rows["pages.tif"]["mask_png"] == rows["planes.tif"]["mask_png"] == plain["mask_png"]
    assert rows["grey.png"]["error_code"] == "decode"
    assert "has 1 channel(s), 0 to 0, and bands asks for 3" in rows["grey.png"]["error"]
    assert rows["pages.tif"]["model_digest"] != plain["model_digest"]  # other bands are other masks


def test_the_bands_of_a_model_are_read_without_being_asked_for(
    segment, images: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)  # the weights of tiny_model
        save_pretrained(UNetPlusPlus(ModelConfig(level=2, filters=(4, 6, 8), bands=(3, 0, 2))), tmp_path / "model")
    plain = segment(include=["plain.png"])["plain.png"]
    rows = segment(model=str(tmp_path / "model"), include=["p*.tif"])
    assert rows["pages.tif"]["mask_png"] == rows["planes.tif"]["mask_png"] == plain["mask_png"]
    asked = segment(bands=(3, 0, 2), include=["p*.tif"])
    assert asked["pages.tif"]["model_digest"] == rows["pages.tif"]["model_digest"]  # whoever says it, it is the same


def test_bands_that_the_network_cannot_read_are_refused_at_the_door(segment) -> None:
    with pytest.raises(ConfigError, match="bands 0, 1 are 2 channels, the model reads 3"):
        segment(bands=(0, 1))


def test_refused_pages_are_rows_and_a_retry_may_take_their_first(segment, images: Path, tmp_path: Path) -> None:
    rows = segment(pages="refuse", include=["pages.tif", "plain.png"])
    assert rows["plain.png"]["mask_png"]
    assert (rows["pages.tif"]["error_code"], "4 pages" in rows["pages.tif"]["error"]) == ("decode", True)
    again = retry.run(RetryConfig(run=str(tmp_path / "out" / "runs" / "r00001"), pages="first", backend="inline"))
    assert (again.num_predicted, again.num_failed) == (1, 0)


# ------------------------------------------------------------------------------------------------ files from the wild


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained network so small that 131 megapixels take seconds; one channel."""
    folder = tmp_path_factory.mktemp("small") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        save_pretrained(UNetPlusPlus(ModelConfig(level=1, filters=(2, 2), in_channels=1)), folder)
    return folder


def test_every_large_file_gives_a_mask(segment, small_model: Path, shared_dir: Path) -> None:
    rows = segment(model=str(small_model), input=str(shared_dir / "data" / "large"), pages="refuse", window_px=0)
    sizes = {key: (row["height"], row["width"]) for key, row in rows.items() if row["mask_png"]}
    assert sizes == {
        "8k_earth_specular_map.tif": (4096, 8192),
        "CMU-1-Small-Region.svs": (2967, 2220),
        "earth-blue-marble.jpg": (2048, 4096),
        "elev_bump_16k.jpg": (8100, 16200),
    }
    assert len(rows) == 4
    for row in rows.values():
        assert decode_mask(row["mask_png"]).shape == (row["height"], row["width"])


def test_every_odd_file_gives_a_mask_or_a_code(segment, small_model: Path, shared_dir: Path) -> None:
    folder = shared_dir / "data" / "odd_images"
    rows = segment(model=str(small_model), input=str(folder), include=("*",), max_failed_share=1)
    assert rows.keys() == {path.name for path in folder.iterdir()}
    for row in rows.values():
        assert (row["mask_png"] is None) == (row["error_code"] is not None)
        assert row["error_code"] in (None, "decode", "too_large")
        assert row["error_code"] is None or row["error"]
    assert sum(row["mask_png"] is not None for row in rows.values()) > 300


# ------------------------------------------------------------------------------------------------ places


def test_a_place_on_earth_travels_to_the_row(segment, images: Path) -> None:
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (33922, 12, 6, (0.0, 0.0, 0.0, 4e5, 57e5, 0.0), True)]
    keys = (1, 1, 0, 1, 3072, 0, 1, 32633)
    tifffile.imwrite(images / "here.tif", STACK[0], extratags=[*tags, (34735, 3, len(keys), keys, True)])
    rows = segment(include=["here.tif", "plain.png"])
    geo = json.loads(rows["here.tif"]["geo"])
    assert (geo["epsg"], geo["transform"]) == (32633, [10.0, 0.0, 4e5, 0.0, -10.0, 57e5])
    assert rows["plain.png"]["geo"] is None


# ------------------------------------------------------------------------------------------------ probabilities


def test_eight_bits_are_foreground_above_127_exactly_where_the_mask_is() -> None:
    around = np.nextafter(np.float32(0.5), np.float32([0, 1])).tolist()
    values = torch.tensor([0.0, *around, 0.5, 1.0, *np.linspace(0, 1, 100_001).tolist()])
    seen = eight_bits(values.reshape(1, 1, 1, -1))[0, 0]
    np.testing.assert_array_equal(seen > 127, values > 0.5)
    assert np.abs(seen.numpy() / 255 - values.numpy()).max() <= 0.5 / 255 + 1e-6
    classes = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]]).T.reshape(1, 3, 1, 2)
    assert eight_bits(classes).tolist() == [[[76, 255]]]


@pytest.mark.parametrize("tile_px", [16, 512])
def test_probabilities_are_the_networks_and_agree_with_the_mask(
    segment, images: Path, tiny_model: Path, tile_px
) -> None:
    row = segment(write=("parquet", "probability"), include=["plain.png"], tile_px=tile_px)["plain.png"]
    probability_HW = decode_image(row["probability_png"])[..., 0]
    np.testing.assert_array_equal(probability_HW > 127, decode_mask(row["mask_png"]))
    predictor = Predictor.from_pretrained(tiny_model)
    logits_HW = logits_by_level(predictor.engine._model, decode_image((images / "plain.png").read_bytes()))[2][..., 0]
    wanted = 255 / (1 + np.exp(-logits_HW.astype(np.float64)))
    assert np.abs(probability_HW - wanted).max() <= 0.5 + 1e-3
    assert row["mask_uri"] is None


def test_probabilities_are_files_where_masks_are_and_go_when_they_go(segment, images: Path, tmp_path: Path) -> None:
    Image.fromarray(STACK[0]).save(images / "plain.png.probability.png")
    without = segment(include=["plain*"], write=("parquet", "png"))
    assert without["plain.png"]["probability_png"] is None
    rows = segment(include=["plain*"], write=("parquet", "png", "probability"))  # a run that wrote less does not count
    output = tmp_path / "out"
    files = {str(path.relative_to(output)): path for path in (output / "png").rglob("*.png")}
    assert len([name for name in files if "run=r00002" in name]) == 4
    for row in rows.values():
        beside = Path(row["mask_uri"].removesuffix(".png") + ".probability.png")
        assert beside.read_bytes() == row["probability_png"]
        assert Path(row["mask_uri"]).read_bytes() == row["mask_png"]
    assert gc.run(GcConfig(output=str(output), older_than_hours=0)).objects.keys() <= {"note"}
    forget.run(ForgetConfig(output=str(output), key="plain.png"))
    left = {row["key"]: row for row in read_masks(str(output)).to_pylist()}
    assert left["plain.png"]["probability_png"] is None
    for found in storage.list_objects(output):
        assert rows["plain.png"]["probability_png"] not in storage.read_bytes(storage.join(output, found.key))


def test_a_guarded_prediction_has_the_same_probabilities(tiny_model: Path) -> None:
    image = np.ascontiguousarray(STACK[:3].transpose(1, 2, 0))
    (wanted,) = Predictor.from_pretrained(tiny_model, probability=True).predict([image])
    with GuardedPredictor(tiny_model, 2, "fast", 512, probability=True) as predictor:
        (seen,) = predictor.predict([image])
    np.testing.assert_array_equal(seen.mask_HW, wanted.mask_HW)
    assert wanted.probability_HW is not None
    np.testing.assert_array_equal(seen.probability_HW, wanted.probability_HW)

"""Windows, archives, channels, places and probabilities in one run, and compaction over all of them."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import tifffile
from PIL import Image

from jobs import assemble, compact, forget, predict, retry, status
from jobs.contract import (
    AssembleConfig,
    CompactConfig,
    ForgetConfig,
    PredictConfig,
    PredictResult,
    RetryConfig,
    StatusConfig,
)
from jobs.table import newest_view, read_masks
from unetpp.errors import ConfigError
from unetpp.images import decode_image, decode_mask

HEIGHT, WIDTH = 150, 130
SAMPLES_HWS = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
BANDS = (3, 0, 2)
TIE = (0.0, 0.0, 0.0, 4e5, 57e5, 0.0)
GEO_KEYS = (1, 1, 0, 1, 3072, 0, 1, 32633)
GEO_TAGS = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (33922, 12, 6, TIE, True), (34735, 3, 8, GEO_KEYS, True)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An empty folder of images."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def segment(tiny_model: Path, images: Path, tmp_path: Path) -> Callable[..., PredictResult]:
    """Function: (inputs) a run, in windows of 96 unless told otherwise; default: over the folder of images."""

    def run(*inputs: Path, **changed: Any) -> PredictResult:
        where = {
            "model": str(tiny_model),
            "input": tuple(map(str, inputs or [images])),
            "output": str(tmp_path / "out"),
        }
        how = {"backend": "inline", "threads": 1, "window_px": 96, "tile_px": 64, "shard_images": 3}
        return predict.run(PredictConfig.model_validate(where | how | changed))

    return run


def rows_of(output: Path, **wanted: Any) -> list[dict[str, Any]]:
    rows = read_masks(str(output)).to_pylist()
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return sorted(chosen, key=lambda row: (row["source_uri"], row["key"], row["window_y"], row["window_x"]))


def put_together(rows: list[dict[str, Any]], column: str) -> np.ndarray:
    """The windows of one image in their places."""
    whole = np.full((rows[0]["height"], rows[0]["width"]), 7, np.uint8)
    for row in rows:
        y, x, height, width = (row[f"window_{name}"] for name in "yxhw")
        part = decode_mask(row[column]) if column == "mask_png" else decode_image(row[column])[..., 0]
        whole[y : y + height, x : x + width] = part
    return whole


def assembled(output: Path, key: str, **more: Any) -> tifffile.TiffFile:
    out = str(output.parent / "mask.tif")
    assemble.run(AssembleConfig(output=str(output), key=key, out=out, **more))
    return tifffile.TiffFile(out)


# ------------------------------------------------------------------------------ windows of every kind of image


def write_form(path: Path, form: str) -> None:
    """Four channels of 150 x 130, somewhere in UTM zone 33."""
    match form:
        case "interleaved":
            image, options = SAMPLES_HWS, {"planarconfig": "contig", "tile": (32, 48), "compression": "deflate"}
        case "interleaved rows":
            image, options = SAMPLES_HWS, {"planarconfig": "contig", "rowsperstrip": 7}
        case "planes":
            image, options = np.moveaxis(SAMPLES_HWS, -1, 0), {"planarconfig": "separate", "tile": (32, 48)}
        case "plane rows":
            image, options = np.moveaxis(SAMPLES_HWS, -1, 0), {"planarconfig": "separate", "rowsperstrip": 7}
        case "pages":
            image, options = np.moveaxis(SAMPLES_HWS, -1, 0), {"tile": (32, 48), "compression": "lzw"}
        case "white, turned":
            # 0 is white and the file lies on its side: shown, it is the other forms' image.
            stored = 255 - np.rot90(SAMPLES_HWS, 1)
            options = {"planarconfig": "contig", "tile": (32, 48), "photometric": "miniswhite"}
            tags = [(274, 3, 1, 6, True)]
            tifffile.imwrite(path, np.ascontiguousarray(stored), extratags=tags, **options)
            return
    tifffile.imwrite(path, np.ascontiguousarray(image), **({"photometric": "minisblack"} | options), extratags=GEO_TAGS)


@pytest.mark.parametrize("form", ["interleaved", "interleaved rows", "planes", "plane rows", "pages", "white, turned"])
def test_windows_hold_bands_places_and_probabilities(segment, images: Path, tmp_path: Path, form: str) -> None:
    write_form(images / "big.tif", form)
    how: dict[str, Any] = {"bands": BANDS, "write": ("parquet", "png", "probability")}
    segment(**how)
    rows = rows_of(tmp_path / "out")
    assert [row["num_windows"] for row in rows] == [4, 4, 4, 4]
    segment(**how, output=str(tmp_path / "whole"), window_px=0)
    (whole,) = rows_of(tmp_path / "whole")
    mask_HW = decode_mask(whole["mask_png"])
    assert 0 < mask_HW.mean() < 1
    np.testing.assert_array_equal(put_together(rows, "mask_png"), mask_HW)
    np.testing.assert_array_equal(put_together(rows, "probability_png"), decode_image(whole["probability_png"])[..., 0])
    for row in rows:
        mask = Path(row["mask_uri"])
        assert mask.name == f"big.tif.y{row['window_y']}_x{row['window_x']}.png"
        assert mask.read_bytes() == row["mask_png"]
        assert mask.with_name(f"{mask.stem}.probability.png").read_bytes() == row["probability_png"]
        assert row["geo"] == whole["geo"]
    if form != "white, turned":
        with assembled(tmp_path / "out", "big.tif") as file:
            page = file.pages[0]
            np.testing.assert_array_equal(page.asarray(), mask_HW * np.uint8(255))
            assert page.tags["ModelTiepointTag"].value == TIE
            assert page.tags["GeoKeyDirectoryTag"].value == GEO_KEYS


def test_the_plain_image_of_the_same_channels_has_the_same_mask(segment, images: Path, tmp_path: Path) -> None:
    for form in ("planes", "pages", "white, turned"):
        write_form(images / f"{form}.tif", form)
    Image.fromarray(np.ascontiguousarray(SAMPLES_HWS[..., list(BANDS)])).save(images / "plain.png")
    segment(bands=BANDS, include=["*.tif"], write=["parquet"])
    plain = segment(include=["*.png"], output=str(tmp_path / "plain"), write=["parquet"])
    assert plain.num_predicted == 1
    (row,) = rows_of(tmp_path / "plain")
    for form in ("planes", "pages", "white, turned"):
        seen = put_together(rows_of(tmp_path / "out", key=f"{form}.tif"), "mask_png")
        np.testing.assert_array_equal(seen, decode_mask(row["mask_png"]))


def test_pages_that_are_refused_are_no_windows(segment, images: Path, tmp_path: Path) -> None:
    write_form(images / "big.tif", "pages")
    result = segment(pages="refuse")
    (row,) = rows_of(tmp_path / "out")
    assert (result.num_listed, row["num_windows"], row["error_code"]) == (1, 1, "decode")
    assert "4 pages" in row["error"]


# ------------------------------------------------------------------------------------- windows beside members


@pytest.fixture
def two_inputs(images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a huge image and a small one, and a tar with the same huge image and another small one."""
    rgb_HWC = np.ascontiguousarray(SAMPLES_HWS[..., :3])
    tifffile.imwrite(images / "big.tif", rgb_HWC, tile=(32, 48), photometric="rgb")
    Image.fromarray(rgb_HWC[:40, :50]).save(images / "small.png")
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(images / "big.tif", "big.tif")
        tar.add(images / "small.png", "other.png")
    return images, packed


def test_a_member_and_a_windowed_tiff_in_one_run_have_one_mask(
    segment, two_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    result = segment(*two_inputs)
    assert (result.status, result.num_listed, result.num_predicted) == ("complete", 4 + 1 + 2, 7)
    windows = rows_of(tmp_path / "out", key="big.tif")
    (member,) = rows_of(tmp_path / "out", key="packed.tar#big.tif")
    assert [row["num_windows"] for row in windows] == [4] * 4
    assert (member["num_windows"], member["window_px"], member["height"]) == (1, 0, HEIGHT)  # members are left whole
    np.testing.assert_array_equal(put_together(windows, "mask_png"), decode_mask(member["mask_png"]))
    folders = {row["key"]: Path(row["mask_uri"]).relative_to(tmp_path / "out" / "png").parts[2] for row in windows}
    assert folders == {"big.tif": "source-0"}
    assert "/source-1/" in member["mask_uri"]
    assert segment(*two_inputs).status == "unchanged"
    assert segment(*two_inputs[::-1]).status == "unchanged"


def test_one_key_of_two_inputs_is_two_images(segment, two_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    images, other = two_inputs[0], tmp_path / "other"
    other.mkdir()
    tifffile.imwrite(
        other / "big.tif", np.ascontiguousarray(SAMPLES_HWS[::-1, :, :3]), tile=(32, 48), photometric="rgb"
    )
    assert segment(images, other).num_predicted == 4 + 1 + 4
    with pytest.raises(ConfigError, match="in several archives"):
        assembled(tmp_path / "out", "big.tif")
    for source in (images, other):
        with assembled(tmp_path / "out", "big.tif", source=f"{source}/") as file:
            wanted = put_together(rows_of(tmp_path / "out", key="big.tif", source_uri=str(source)), "mask_png")
            np.testing.assert_array_equal(file.asarray(), wanted * np.uint8(255))
    gone = forget.run(ForgetConfig(output=str(tmp_path / "out"), key="big.tif", source=str(other)))
    assert gone.num_rows == 4
    left = rows_of(tmp_path / "out", key="big.tif")
    assert {row["source_uri"] for row in left if row["mask_png"]} == {str(images)}
    assert segment(images, other).status == "unchanged"


# ---------------------------------------------------------------------------------------------- compaction


def in_the_view(output: Path) -> set[tuple[Any, ...]]:
    view = f"{newest_view(str(output))}; select source_uri, key, etag, window_y, window_x, num_windows from masks"
    return set(duckdb.sql(view).fetchall())


def test_compaction_keeps_windows_and_members(segment, two_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    images, packed = two_inputs
    output = tmp_path / "out"
    segment(images, packed, shard_images=1)
    # A newer version of the huge image is smaller: its windows stand where some of the old ones stood.
    smaller_HWC = np.ascontiguousarray(SAMPLES_HWS[:100, :, 1:])
    tifffile.imwrite(images / "big.tif", smaller_HWC, tile=(32, 48), photometric="rgb")
    with tarfile.open(packed, "a") as tar:
        content = io.BytesIO()
        Image.fromarray(smaller_HWC[:30]).save(content, "PNG")
        info = tarfile.TarInfo("late.png")
        info.size = len(content.getvalue())
        tar.addfile(info, io.BytesIO(content.getvalue()))
        damaged = tarfile.TarInfo("damaged.png")
        tar.addfile(damaged)
    second = segment(images, packed, shard_images=1)
    assert (second.num_predicted, second.failures) == (4 + 1, {"decode": 1})
    before, view = rows_of(output), in_the_view(output)
    assert {row["window_h"] for row in before if row["key"] == "big.tif"} == {96, 4}
    (done,) = compact.run(CompactConfig(output=str(output))).compactions
    assert (done.sources, done.num_rows) == ((str(images), str(tmp_path)), len(before))
    after = rows_of(output)
    assert {row.pop("run") for row in after} == {"r00003"}
    assert after == [{name: value for name, value in row.items() if name != "run"} for row in before]
    assert in_the_view(output) == view
    with assembled(output, "big.tif") as file:
        wanted = put_together(rows_of(output, key="big.tif"), "mask_png")
        np.testing.assert_array_equal(file.asarray(), wanted * np.uint8(255))
    assert segment(images, packed).status == "unchanged"
    copied = status.run(StatusConfig(run=str(output / "runs" / "r00003")))
    assert (copied.state, copied.sources, copied.num_failed) == ("sealed", (str(images), str(tmp_path)), 1)
    again = retry.run(RetryConfig(run=str(output / "runs" / "r00003"), backend="inline", threads=1))
    assert (again.num_listed, again.failures) == (1, {"decode": 1})
    (row,) = rows_of(output, key="packed.tar#damaged.png")
    assert (row["run"], row["attempts"]) == ("r00004", 2)

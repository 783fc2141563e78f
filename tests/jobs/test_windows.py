"""Huge images: windows whose masks together are the whole image's mask, read for the bytes that they need."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import psutil
import pytest
import tifffile
import torch
from PIL import Image

from jobs import assemble, predict, retry, storage, windows
from jobs.cli import run_command_line
from jobs.contract import AssembleConfig, PredictConfig, PredictResult, RetryConfig
from jobs.guarded import DecodePool, Limits
from jobs.ranged import ranged
from jobs.table import newest_view, read_masks
from tests.faults.proxy import FaultProxy
from unetpp.checkpoint import from_pretrained, save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.images import decode_image, to_channels
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Predictor
from unetpp.torch_engine import scale

HEIGHT, WIDTH = 301, 397
LIMITS = Limits(30.0, 1 << 30)


def _noise(height: int = HEIGHT, width: int = WIDTH, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """Smooth blobs and noise, so that masks have shape and pixels near the threshold."""
    rng = np.random.default_rng(height * width + channels)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(y / (9 + c)) * np.cos(x / (13 - c)) for c in range(channels)], -1)
    values = (waves + 1) / 2 * 0.7 + rng.random((height, width, channels)) * 0.3
    return np.rint(values * np.iinfo(dtype).max).astype(dtype)


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """An empty folder of images."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def segment(tiny_model: Path, image_dir: Path, tmp_path: Path) -> Callable[..., PredictResult]:
    """Function: run predict inline on the folder of images, in windows of 96 unless told otherwise."""

    def run(**changed: Any) -> PredictResult:
        settings: dict[str, Any] = {
            "model": str(tiny_model),
            "input": str(image_dir),
            "output": str(tmp_path / "out"),
            "backend": "inline",
            "threads": 1,
            "window_px": 96,
            "shard_images": 5,
            "tile_px": 64,
            "write": ("parquet",),
        }
        return predict.run(PredictConfig(**(settings | changed)))

    return run


def _assembled(result: PredictResult, key: str, folder: Path, **more: Any) -> np.ndarray:
    out = str(folder / f"{key.replace('/', '_')}-{result.runs[-1]}.tif")
    assemble.run(AssembleConfig(output=result.table_uri.removesuffix("/table"), key=key, out=out, **more))
    with tifffile.TiffFile(out) as file:
        assert file.is_bigtiff
        assert file.pages[0].is_tiled
        return file.asarray()


def _wanted(model: Path, path: Path, **more: Any) -> np.ndarray:
    """The mask of the whole image as one tile: 0 and 255."""
    (mask_HW,) = Predictor.from_pretrained(model, tile_px=4096, **more)([decode_image(path.read_bytes())])
    return mask_HW * np.uint8(255)


def _rows(result: PredictResult) -> list[dict[str, Any]]:
    return read_masks(result.table_uri.removesuffix("/table"), result.model_digest).to_pylist()


# ------------------------------------------------------------------------------------------- the same mask


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def model_of_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A level, and a seeded random model of it: BatchNorm is not trivial, and about half of a mask is foreground."""
    with torch.random.fork_rng():
        torch.manual_seed(request.param)
        model = UNetPlusPlus(ModelConfig(level=request.param, filters=(4, 4, 6, 6, 8)))
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(torch.rand(2, 3, 64, 64))
            x_BCHW = scale(torch.from_numpy(_noise()[None]), model.config)
            for level, logits in model.eval()(x_BCHW).items():
                middle = logits.flatten().sort().values[logits.numel() // 2 :][:2].mean()  # between two pixels
                model.heads[str(level)].bias -= middle
    folder = tmp_path_factory.mktemp("level") / "model"
    save_pretrained(model, folder)
    return request.param, folder


@pytest.mark.parametrize(("window_px", "tile_px"), [(96, 64), (208, 512)])
def test_windows_together_are_the_whole_images_mask(
    segment, image_dir: Path, tmp_path: Path, model_of_level: tuple[int, Path], window_px: int, tile_px: int
) -> None:
    level, model_dir = model_of_level
    path = image_dir / "big.tif"
    tifffile.imwrite(path, image_HWC := _noise(), tile=(64, 64), compression="deflate", bigtiff=True)
    result = segment(model=str(model_dir), window_px=window_px, tile_px=tile_px)
    assert result.status == "complete"
    seen = _assembled(result, "big.tif", tmp_path)
    model = from_pretrained(model_dir).eval()
    with torch.inference_mode():
        logits = model(scale(torch.from_numpy(image_HWC[None]), model.config))[level]
    wanted = _wanted(model_dir, path)
    assert 0.4 < (wanted > 0).mean() < 0.6
    assert (seen != wanted).sum() <= (0 if level <= 2 else 1e-6 * wanted.size)
    logits_HW = logits[0, 0].numpy()  # of the model as it is: rounded elsewhere than the predictor's
    is_clear = np.abs(logits_HW) > 1e-5
    assert is_clear.mean() > 0.999
    np.testing.assert_array_equal((seen > 0)[is_clear], (logits_HW > 0)[is_clear])


def test_another_window_size_is_another_grid_and_the_same_mask(segment, image_dir: Path, tmp_path: Path) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64), compression="zlib")
    first = segment(window_px=96)
    before = _assembled(first, "big.tif", tmp_path)
    second = segment(window_px=160)
    assert (first.num_predicted, second.num_predicted) == (4 * 5, 2 * 3)
    np.testing.assert_array_equal(before, _assembled(second, "big.tif", tmp_path))
    rows = _rows(second)
    assert {row["window_px"] for row in rows} == {160}  # older grids are not mixed in
    view = duckdb.connect()
    view.sql(newest_view(second.table_uri.removesuffix("/table"), second.model_digest))
    assert view.sql("select count(*), min(window_px), max(window_px) from masks").fetchall() == [(6, 160, 160)]


@pytest.mark.parametrize("mode", [{"mode": "accurate"}, {"mode": "accurate", "flips": True}, {"level": 1}])
def test_every_mode_is_exact(segment, image_dir: Path, tmp_path: Path, tiny_model: Path, mode: dict[str, Any]) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64))
    seen = _assembled(segment(**mode), "big.tif", tmp_path)
    np.testing.assert_array_equal(seen, _wanted(tiny_model, image_dir / "big.tif", **mode))


FORMS: dict[str, dict[str, Any]] = {
    "tiled": {"tile": (64, 48), "compression": "deflate", "predictor": True},
    "big_endian": {"tile": (64, 64), "compression": "lzw", "byteorder": ">"},
    "bigtiff": {"tile": (128, 128), "compression": "zstd", "bigtiff": True},
    "strips": {"rowsperstrip": 7, "compression": "packbits"},
    "uncompressed": {},
    "uncompressed_strips": {"rowsperstrip": 16, "byteorder": ">"},
    "uncompressed_tiles": {"tile": (96, 32)},
    "planar": {"planarconfig": "separate", "tile": (64, 64), "compression": "deflate"},
    "planar_strips": {"planarconfig": "separate", "rowsperstrip": 32, "compression": "lzw"},
    "planar_uncompressed": {"planarconfig": "separate"},
    "jpeg": {"tile": (64, 64), "compression": "jpeg", "photometric": "ycbcr", "subsampling": (2, 2)},
    "jpeg_rgb": {"tile": (64, 64), "compression": "jpeg", "compressionargs": {"level": 90}},
    "one_strip": {"compression": "deflate", "rowsperstrip": HEIGHT},
}


@pytest.fixture(scope="module")
def region_decoders() -> Iterator[DecodePool]:
    """One decoder."""
    with DecodePool(1, max_pixels=10**6, limits=LIMITS) as pool:
        yield pool


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_region_of_any_form_is_that_part_of_the_image(
    region_decoders: DecodePool, tmp_path: Path, form: str, dtype: type
) -> None:
    if dtype == np.uint16 and form.startswith("jpeg"):
        pytest.skip("JPEG has 8 bits")
    path = tmp_path / "image.tif"
    planar = FORMS[form].get("planarconfig") == "separate"
    image_HWC = _noise(dtype=dtype)
    options = {"photometric": "rgb"} | FORMS[form]
    tifffile.imwrite(path, np.moveaxis(image_HWC, -1, 0) if planar else image_HWC, **options)
    _assert_regions_equal_the_whole(region_decoders, path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_is_cut_as_it_is_shown(region_decoders: DecodePool, tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "image.tif"
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(path, _noise(), tile=(64, 64), compression="deflate", photometric="rgb", extratags=[tag])
    _assert_regions_equal_the_whole(region_decoders, path)


@pytest.mark.parametrize(
    "name", ["grey.tif", "white.tif", "float.tif", "pyramid.tif", "jpeg.jpg", "turned.jpg", "a.png"]
)
def test_a_region_of_any_kind_is_that_part_of_the_image(region_decoders: DecodePool, tmp_path: Path, name: str) -> None:
    path, image_HWC = tmp_path / name, _noise()
    match name:
        case "grey.tif":
            tifffile.imwrite(path, image_HWC[..., 0], tile=(64, 64), compression="deflate")
        case "white.tif":
            tifffile.imwrite(path, image_HWC[..., 0], rowsperstrip=8, photometric="miniswhite", compression="lzw")
        case "float.tif":
            tifffile.imwrite(path, image_HWC[..., 0].astype(np.float32) / 255, tile=(64, 64), compression="zstd")
        case "pyramid.tif":
            with tifffile.TiffWriter(path, bigtiff=True) as writer:
                options: dict[str, Any] = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb"}
                writer.write(image_HWC, subifds=1, **options)
                writer.write(np.ascontiguousarray(image_HWC[::2, ::2]), subfiletype=1, **options)
        case "turned.jpg":
            exif = Image.Exif()
            exif[274] = 6
            Image.fromarray(image_HWC).save(path, exif=exif)
        case _:
            Image.fromarray(image_HWC).save(path)
    _assert_regions_equal_the_whole(region_decoders, path)


def _assert_regions_equal_the_whole(decoders: DecodePool, path: Path) -> None:
    wanted = decode_image(path.read_bytes())
    found = storage.find(path)
    assert found is not None
    with ThreadPoolExecutor(4) as threads:
        source = ranged(str(path), found.etag, found.size_bytes, threads)
        measure = decoders.measure(source)
        assert ((measure.height, measure.width), measure.fits) == (wanted.shape[:2], True)
        for box in windows.grid(*wanted.shape[:2], 112):
            seen = decoders.decode_region(source, wanted.shape[:2], box).image_HWC
            assert seen.dtype == wanted.dtype
            np.testing.assert_array_equal(seen, wanted[box.slices])


def test_a_slide_gives_the_mask_of_the_whole(
    segment, image_dir: Path, tmp_path: Path, tiny_model: Path, shared_dir: Path
) -> None:
    shutil.copy(shared_dir / "data/large/CMU-1-Small-Region.svs", image_dir / "slide.svs")
    result = segment(window_px=1024, level=1, tile_px=512)
    assert result.num_predicted == 3 * 3
    wanted = _wanted(tiny_model, image_dir / "slide.svs", level=1)
    np.testing.assert_array_equal(_assembled(result, "slide.svs", tmp_path), wanted)


def test_a_large_png_is_decoded_once_and_cut(
    segment, image_dir: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "LARGE_BYTES", 10_000)
    Image.fromarray(_noise()).save(image_dir / "big.png")
    Image.fromarray(_noise(40, 50)).save(image_dir / "small.png")
    result = segment()
    assert result.num_predicted == 4 * 5 + 1
    np.testing.assert_array_equal(_assembled(result, "big.png", tmp_path), _wanted(tiny_model, image_dir / "big.png"))
    np.testing.assert_array_equal(
        _assembled(result, "small.png", tmp_path), _wanted(tiny_model, image_dir / "small.png")
    )


# ------------------------------------------------------------------------------------------ rows and runs


def test_windows_are_rows_that_partition_the_image(segment, image_dir: Path) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64))
    tifffile.imwrite(image_dir / "small.tif", _noise(96, 96), tile=(64, 64))
    result = segment(write=("parquet", "png"))
    assert (result.num_listed, result.num_predicted, result.num_unchanged) == (21, 21, 0)
    assert result.megapixels == pytest.approx((HEIGHT * WIDTH + 96 * 96) / 1e6)
    rows = [row for row in _rows(result) if row["key"] == "big.tif"]
    covered = np.zeros((HEIGHT, WIDTH), int)
    for row in rows:
        y, x, height, width = (row[f"window_{name}"] for name in "yxhw")
        covered[y : y + height, x : x + width] += 1
        assert (row["num_windows"], row["window_px"], row["height"], row["width"]) == (20, 96, HEIGHT, WIDTH)
        assert sum(row["class_pixels"]) == height * width
        assert Path(row["mask_uri"]).read_bytes() == row["mask_png"]
        assert row["mask_uri"].endswith(f"big.tif.y{y}_x{x}.png")
    assert (covered == 1).all()
    (small,) = [row for row in _rows(result) if row["key"] == "small.tif"]
    assert (small["num_windows"], small["window_px"], small["window_h"], small["height"]) == (1, 0, 96, 96)


def test_a_second_run_predicts_nothing_and_reads_no_header(
    segment, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64))
    tifffile.imwrite(image_dir / "small.tif", _noise(50, 50))
    segment()
    monkeypatch.setattr(windows.Headers, "_measure", None)  # a call would fail
    again = segment()
    assert (again.status, again.num_listed, again.num_unchanged) == ("unchanged", 21, 21)


def test_window_px_0_leaves_images_whole(segment, image_dir: Path, tmp_path: Path, tiny_model: Path) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64))
    whole = segment(window_px=0)
    assert whole.num_predicted == 1
    np.testing.assert_array_equal(_assembled(whole, "big.tif", tmp_path), _wanted(tiny_model, image_dir / "big.tif"))
    assert segment(window_px=96).status == "unchanged"  # its mask is the whole image's already


def test_a_changed_image_is_done_again_in_all_its_windows(segment, image_dir: Path, tmp_path: Path) -> None:
    path = image_dir / "big.tif"
    tifffile.imwrite(path, _noise(), tile=(64, 64))
    segment()
    tifffile.imwrite(path, _noise(250, 200), tile=(64, 64))
    second = segment()
    assert (second.num_predicted, second.num_unchanged) == (9, 0)
    assert len(_rows(second)) == 9
    assert _assembled(second, "big.tif", tmp_path).shape == (250, 200)


# ------------------------------------------------------------------------------------------ what is broken


@pytest.fixture
def broken(image_dir: Path) -> Path:
    """A TIFF of 320 x 320 in deflated tiles of 32; the one at row 128, column 128 is damaged."""
    path = image_dir / "big.tif"
    tifffile.imwrite(path, _noise(320, 320), tile=(32, 32), compression="deflate")
    with tifffile.TiffFile(path) as file:
        number = 4 * 10 + 4
        offset, count = file.pages[0].dataoffsets[number], file.pages[0].databytecounts[number]
    content = bytearray(path.read_bytes())
    content[offset + count // 2 : offset + count] = bytes(count - count // 2)
    path.write_bytes(content)
    return path


def test_a_corrupt_tile_is_one_failed_window(segment, broken: Path, tmp_path: Path) -> None:
    result = segment(level=1, window_px=96, shard_images=3)
    rows = _rows(result)
    failed = [(row["window_y"], row["window_x"]) for row in rows if row["error_code"]]
    assert failed == [(96, 96)]
    assert (result.status, result.num_predicted, result.failures) == ("partial", 15, {"decode": 1})
    (row,) = [row for row in rows if row["error_code"]]
    assert (row["window_h"], row["height"], row["mask_png"]) == (96, 320, None)
    with pytest.raises(
        ConfigError, match=r"1 of the 16 windows of 'big.tif' are missing: \(y 96, x 96: decode in r00001"
    ):
        _assembled(result, "big.tif", tmp_path)
    assert segment(level=1, window_px=96, shard_images=3).status == "unchanged"  # the error is permanent


def test_one_window_is_retried_alone(segment, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image_dir / "big.tif"
    tifffile.imwrite(path, _noise(), tile=(64, 64))
    read_range, budget = storage.read_range, [6]

    def vanish(uri: str, start: int, stop: int, etag: str | None = None) -> bytes:
        budget[0] -= 1
        return read_range(uri, start, stop, "another version" if budget[0] == 0 else etag)

    monkeypatch.setattr(storage, "read_range", vanish)
    result = segment()
    monkeypatch.undo()
    assert result.failures == {"changed": 1}
    again = retry.run(
        RetryConfig(run=f"{result.table_uri.removesuffix('/table')}/runs/r00001", backend="inline", threads=1)
    )
    assert (again.status, again.num_listed, again.num_predicted) == ("complete", 1, 1)
    rows = _rows(again)
    assert (len(rows), sum(row["attempts"] for row in rows)) == (20, 21)
    assert _assembled(again, "big.tif", tmp_path).shape == (HEIGHT, WIDTH)


def test_an_image_that_is_not_complete_is_planned_whole(
    segment, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64))
    read_range, budget = storage.read_range, [6]

    def vanish(uri: str, start: int, stop: int, etag: str | None = None) -> bytes:
        budget[0] -= 1
        return read_range(uri, start, stop, "another version" if budget[0] == 0 else etag)

    monkeypatch.setattr(storage, "read_range", vanish)
    assert segment().num_failed == 1
    monkeypatch.undo()
    second = segment()
    assert (second.num_listed, second.num_predicted, second.num_unchanged) == (20, 20, 0)
    assert sorted(row["attempts"] for row in _rows(second)) == [1] * 19 + [2]


def test_a_missing_part_is_named_by_its_windows(segment, image_dir: Path, tmp_path: Path) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64))
    result = segment(shard_images=5)
    (part, *_) = sorted(Path(result.table_uri).rglob("part-00001.parquet"))
    part.unlink()
    with pytest.raises(ConfigError, match=r"5 of the 20 windows.*\(y 96, x 0: not done yet\), \(y 96, x 96: not"):
        _assembled(result, "big.tif", tmp_path)


def test_a_header_that_promises_too_much_is_a_row(segment, image_dir: Path) -> None:
    path = image_dir / "huge.tif"
    tifffile.imwrite(path, _noise(64, 64, 1)[..., 0], compression="deflate", rowsperstrip=64)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["ImageWidth"].overwrite(2**31 - 16)
        file.pages[0].tags["ImageLength"].overwrite(2**31 - 16)
    result = segment()
    assert result.num_listed == result.num_failed == 1
    assert result.failures == {"too_large": 1}


def test_a_poisonous_window_costs_no_other(segment, image_dir: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Behind the guard a window is predicted as without it."""
    from jobs.guarded import GuardedPredictor
    from unetpp.tiles import Box

    image_HWC = _noise(200, 180)
    kept = Box(32, 48, 128, 144)
    (wanted,) = Predictor.from_pretrained(tiny_model, tile_px=64).predict([image_HWC], [kept])
    with GuardedPredictor(tiny_model, 2, "fast", 64) as predictor:
        (seen,) = predictor.predict([image_HWC], [kept])
    np.testing.assert_array_equal(seen.mask_HW, wanted.mask_HW)
    assert seen.mask_HW.shape == (96, 96)


# --------------------------------------------------------------------------------- bytes, memory, commands


def test_only_the_needed_bytes_cross_the_wire(
    segment, image_dir: Path, tmp_path: Path, tiny_model: Path, s3_prefix: str, counting_proxy: FaultProxy
) -> None:
    path = image_dir / "big.tif"
    tifffile.imwrite(path, _noise(512, 512), tile=(64, 64))
    storage.write_bytes(f"{s3_prefix}/in/big.tif", path.read_bytes())
    found = next(iter(storage.list_objects(f"{s3_prefix}/in")))
    boxes = windows.grid(512, 512, 128)
    with DecodePool(1, max_pixels=10**6, limits=LIMITS) as decoders, storage.io_threads() as threads:
        source = ranged(f"{s3_prefix}/in/big.tif", found.etag, found.size_bytes, threads)
        decoders.measure(source)
        header_bytes = counting_proxy.bytes_of("GET", "big.tif")
        assert header_bytes <= 64 << 10
        decoders.decode_region(source, (512, 512), boxes[5])
        region_bytes = counting_proxy.bytes_of("GET", "big.tif") - header_bytes
    assert region_bytes == 4 * 64 * 64 * 3  # four tiles, nothing else
    result = segment(input=f"{s3_prefix}/in", output=f"{s3_prefix}/out", window_px=128)
    seen = _assembled(result, "big.tif", tmp_path)
    np.testing.assert_array_equal(seen, _wanted(tiny_model, path))


def test_memory_of_the_decoder_does_not_grow_with_the_image(tmp_path: Path) -> None:
    peaks = []
    for side in (512, 4096):
        path = tmp_path / f"{side}.tif"
        tifffile.imwrite(path, np.zeros((side, side, 3), np.uint8), tile=(256, 256), compression="deflate")
        found = storage.find(path)
        assert found is not None
        with DecodePool(1, max_pixels=10**6, limits=LIMITS) as decoders, ThreadPoolExecutor(4) as threads:
            source = ranged(str(path), found.etag, found.size_bytes, threads)
            for box in windows.grid(side, side, 512)[-3:]:
                decoders.decode_region(source, (side, side), box)
            newest = max(psutil.Process().children(), key=lambda child: child.create_time())
            assert "jobs.guarded_child" in newest.cmdline()
            peaks.append(newest.memory_info().rss)
    assert peaks[1] < peaks[0] + (8 << 20)


def test_the_command_writes_the_mask(segment, image_dir: Path, tmp_path: Path, tiny_model: Path, capsys) -> None:
    tifffile.imwrite(image_dir / "big.tif", _noise(), tile=(64, 64))
    segment()
    out = str(tmp_path / "mask.tif")
    assert run_command_line("assemble", [str(tmp_path / "out"), "big.tif", "--out", out]) == 0
    assert "20 windows" in capsys.readouterr().out
    np.testing.assert_array_equal(tifffile.imread(out), _wanted(tiny_model, image_dir / "big.tif"))
    assert to_channels(decode_image(Path(out).read_bytes()), 1).shape == (HEIGHT, WIDTH, 1)
    assert run_command_line("assemble", [str(tmp_path / "out"), "no.tif", "--out", out]) == 10
    assert "has no image 'no.tif'" in capsys.readouterr().err
    assert run_command_line("assemble", [str(tmp_path / "out"), "no.tif", "--out", str(tmp_path)]) == 10
    assert "is a folder; wanted the name of a file" in capsys.readouterr().err

"""One picture written in every form by other people's writers: it reads back the same, and gives the same mask.

Writers: Pillow, tifffile and imagecodecs, and a few files by hand. The table's right side says what the form keeps.
"""

import io
import json
import struct
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from PIL import Image

from tests.pictures import size_of
from unetpp.checkpoint import digest
from unetpp.config import ModelConfig, ValueRange
from unetpp.errors import ConfigError, ImageError
from unetpp.geo import tiff_tags
from unetpp.images import decode_image, read_image
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Predictor
from unetpp.torch_engine import TorchEngine

Array = npt.NDArray[Any]

HEIGHT, WIDTH = 47, 61
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
NOISE = np.random.default_rng(5)

GREY = ((ROWS * 3 + COLUMNS * 2) % 200 + NOISE.integers(0, 50, (HEIGHT, WIDTH))).astype(np.uint8)
RGB = np.stack([GREY, np.roll(GREY, 7, 1), 255 - np.roll(GREY, 5, 0)], axis=2)
BITS = np.where(GREY > 120, 255, 0).astype(np.uint8)
ALPHA = NOISE.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
STACK = np.stack([GREY, np.roll(GREY, 3, 0), ALPHA, BITS, 255 - GREY])
"""C x H x W: five channels."""

GREY16 = GREY.astype(np.uint16)
DEEP = GREY16 * 257
PALETTE = np.stack([np.arange(256), np.arange(256)[::-1], np.arange(256) // 2], axis=1).astype(np.uint8)


def pillow(array: Array, form: str, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(array: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def paletted(form: str, bits: int = 8) -> bytes:
    """GREY as indices into PALETTE; with 4 bits, GREY // 16 into its first 16 colours."""
    picture = Image.fromarray(GREY if bits == 8 else GREY // 16, mode="L")
    picture.putpalette(PALETTE[: 2**bits].tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, form, bits=bits)
    return buffer.getvalue()


def pages(*several: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in several:
            writer.write(page, **({"photometric": "minisblack", "metadata": None} | options))
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[274] = orientation
    return found


def oriented(orientation: int, form: str) -> bytes:
    """RGB laid down so that the orientation turns it upright: the turn's inverse, written out."""
    laid = {
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[orientation]
    laid = np.ascontiguousarray(laid)
    if form == "tifffile":
        return tiff(laid, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    if form == "TIFF":
        return pillow(laid, form, tiffinfo={274: orientation})
    return pillow(laid, form, exif=exif(orientation), **({"lossless": True} if form == "WEBP" else {}))


def packed_12(array: Array) -> bytes:
    """12 bits a sample, packed, as a camera writes them."""
    even = array[:, : WIDTH // 2 * 2]
    return tiff(even, bitspersample=12, photometric="minisblack")


EVEN = GREY16[:, : WIDTH // 2 * 2]
RGBA = np.dstack([RGB, ALPHA])

FORMS: dict[str, tuple[Callable[[], bytes], Array]] = {
    # grey, 8 bits
    "png grey": (lambda: pillow(GREY, "PNG"), GREY),
    "png grey by imagecodecs": (lambda: imagecodecs.png_encode(GREY), GREY),
    "png grey + alpha": (lambda: pillow(np.dstack([GREY, ALPHA]), "PNG"), GREY),
    "bmp grey": (lambda: pillow(GREY, "BMP"), GREY),
    "pgm": (lambda: pillow(GREY, "PPM"), GREY),
    "tiff grey": (lambda: tiff(GREY), GREY),
    "tiff grey by Pillow": (lambda: pillow(GREY, "TIFF"), GREY),
    "tiff grey, white is 0": (lambda: tiff(255 - GREY, photometric="miniswhite"), GREY),
    "tiff grey + alpha": (lambda: tiff(np.dstack([GREY, ALPHA]), extrasamples=["unassalpha"], planarconfig=1), GREY),
    "tiff grey of two pages": (lambda: pages(GREY, 255 - GREY), GREY),
    "tiff grey, big-endian BigTIFF": (lambda: tiff(GREY, bigtiff=True, byteorder=">"), GREY),
    "tiff grey, LZW": (lambda: pillow(GREY, "TIFF", compression="tiff_lzw"), GREY),
    # 1 bit
    "png bits": (lambda: pillow(BITS, "PNG", "1"), BITS),
    "tiff bits": (lambda: pillow(BITS, "TIFF", "1"), BITS),
    "tiff bits by tifffile": (lambda: tiff(BITS > 0, photometric="minisblack"), BITS),
    "tiff bits, white is 0": (lambda: tiff(BITS == 0, photometric="miniswhite"), BITS),
    "pbm": (lambda: pillow(BITS, "PPM", "1"), BITS),
    # 12 and 16 bits, float, signed: the same numbers in another type
    "png 16": (lambda: imagecodecs.png_encode(GREY16), GREY16),
    "png 16 by Pillow": (lambda: pillow(GREY16, "PNG"), GREY16),
    "tiff 16": (lambda: tiff(GREY16), GREY16),
    "tiff 16, white is 0": (lambda: tiff(65535 - GREY16, photometric="miniswhite"), GREY16),
    "tiff 12 in 16": (lambda: tiff(GREY16, compression="zlib"), GREY16),
    "tiff 12 packed": (lambda: packed_12(GREY16), EVEN),
    "pgm 16": (lambda: b"P5 61 47 65535\n" + GREY16.astype(">u2").tobytes(), GREY16),
    "tiff float16": (lambda: tiff(GREY.astype(np.float16)), GREY.astype(np.float32)),
    "tiff float32": (lambda: tiff(GREY.astype(np.float32), predictor=3, compression="zlib"), GREY.astype(np.float32)),
    "tiff float32 by Pillow": (lambda: pillow(GREY.astype(np.float32), "TIFF"), GREY.astype(np.float32)),
    "tiff float64": (lambda: tiff(GREY.astype(np.float64)), GREY.astype(np.float32)),
    "tiff int16": (lambda: tiff(GREY.astype(np.int16)), GREY.astype(np.float32)),
    "tiff uint32": (lambda: tiff(GREY.astype(np.uint32)), GREY.astype(np.float32)),
    "tiff int32 by Pillow": (lambda: pillow(GREY.astype(np.int32), "TIFF"), GREY.astype(np.float32)),
    # colour
    "png rgb": (lambda: pillow(RGB, "PNG"), RGB),
    "png rgba": (lambda: pillow(RGBA, "PNG"), RGB),
    "png rgba by imagecodecs": (lambda: imagecodecs.png_encode(RGBA), RGB),
    "png rgb 16": (lambda: imagecodecs.png_encode(RGB.astype(np.uint16)), RGB.astype(np.uint16)),
    "bmp rgb": (lambda: pillow(RGB, "BMP"), RGB),
    "ppm": (lambda: pillow(RGB, "PPM"), RGB),
    "webp": (lambda: pillow(RGB, "WEBP", lossless=True), RGB),
    "webp by imagecodecs": (lambda: imagecodecs.webp_encode(RGB, lossless=True), RGB),
    "webp rgba": (lambda: pillow(RGBA, "WEBP", lossless=True, exact=True), RGB),
    "tiff rgb": (lambda: tiff(RGB, photometric="rgb"), RGB),
    "tiff rgb planes": (lambda: tiff(RGB.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"), RGB),
    "tiff rgb tiles": (lambda: tiff(RGB, photometric="rgb", tile=(16, 32), compression="zlib", predictor=2), RGB),
    "tiff rgb zstd": (lambda: tiff(RGB, photometric="rgb", rowsperstrip=7, compression="zstd"), RGB),
    "tiff rgba": (lambda: tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), RGB),
    "tiff rgba, multiplied": (lambda: tiff(RGBA, photometric="rgb", extrasamples=["assocalpha"]), RGB),
    "tiff rgb 16": (lambda: tiff(RGB.astype(np.uint16), photometric="rgb"), RGB.astype(np.uint16)),
    "tiff cmyk": (lambda: pillow(RGB, "TIFF", "CMYK"), RGB),
    "tiff cmyk by tifffile": (lambda: tiff(np.dstack([255 - RGB, 0 * GREY]), photometric="separated"), RGB),
    "png palette": (lambda: paletted("PNG"), PALETTE[GREY]),
    "png palette, 4 bits": (lambda: paletted("PNG", 4), PALETTE[GREY // 16]),
    "gif": (lambda: paletted("GIF"), PALETTE[GREY]),
    "bmp palette": (lambda: paletted("BMP"), PALETTE[GREY]),
    "tiff palette": (lambda: paletted("TIFF"), PALETTE[GREY]),
    "tiff palette by tifffile": (
        lambda: tiff(GREY, photometric="palette", colormap=PALETTE.T.astype(np.uint16) * 257),
        PALETTE[GREY],
    ),
    **{
        f"{form} oriented {orientation}": (lambda form=form, orientation=orientation: oriented(orientation, form), RGB)
        for form in ("PNG", "WEBP", "TIFF", "tifffile")
        for orientation in range(2, 9)
    },
}


@pytest.fixture(scope="module")
def masks() -> Callable[[Array], Array]:
    """Function: the mask of an image, by a seeded network for which 0 to 255 is the range of every pixel type."""
    full = (0.0, 255.0)
    config = ModelConfig(level=2, filters=(4, 6, 8), value_range=ValueRange(uint8=full, uint16=full, float32=full))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = UNetPlusPlus(config).eval()
    predictor = Predictor(TorchEngine(model, "fast"), config, digest="0" * 64)
    return lambda image: predictor([image])[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_gives_the_picture_and_its_mask(form: str, masks: Callable[[Array], Array]) -> None:
    write, wanted = FORMS[form]
    data = write()
    image = decode_image(data)
    wanted_HWC = wanted[..., None] if wanted.ndim == 2 else wanted
    assert image.dtype == wanted.dtype
    assert size_of(data) == wanted.shape[:2]
    np.testing.assert_array_equal(image, wanted_HWC)
    plain = wanted.astype(np.uint8)
    assert 0 < masks(plain).mean() < 1
    np.testing.assert_array_equal(masks(image), masks(plain))


def test_a_lossy_form_gives_nearly_the_picture() -> None:
    smooth = np.dstack([(ROWS * 4) % 256, (COLUMNS * 4) % 256, ROWS + COLUMNS]).astype(np.uint8)
    for data in (
        pillow(smooth, "JPEG", quality=98, subsampling=0),
        pillow(smooth, "JPEG", "CMYK", quality=98),
        pillow(smooth, "WEBP", quality=100),
        imagecodecs.jpeg8_encode(smooth, level=98),
        tiff(smooth, photometric="rgb", compression="jpeg", compressionargs={"level": 98}),
        tiff(smooth, photometric="rgb", compression="jpeg", compressionargs={"level": 98}, tile=(32, 32)),
        tiff(smooth, photometric="rgb", compression="jpeg", compressionargs={"level": 98, "outcolorspace": "rgb"}),
    ):
        image = decode_image(data)
        assert image.shape == smooth.shape
        assert np.abs(image.astype(int) - smooth).mean() < 6


def test_sixteen_bit_colour_keeps_its_low_bits() -> None:
    deep = RGB.astype(np.uint16) * 257 - 3
    for data in (tiff(deep, photometric="rgb"), bytes(imagecodecs.png_encode(deep))):  # Pillow would cut them
        np.testing.assert_array_equal(decode_image(data), deep)


def test_an_ifd_beyond_the_file_is_refused() -> None:
    for start in (b"II*\0" + struct.pack("<I", 10**6), b"MM\0*" + struct.pack(">I", 10**6)):
        with pytest.raises(ImageError) as caught:
            decode_image(start + bytes(64))
        assert caught.value.code == "decode"


# ------------------------------------------------------------------------------------------- bands

STACKS: dict[str, tuple[Callable[[], bytes], Array]] = {
    "planes": (lambda: tiff(STACK, photometric="minisblack", planarconfig="separate"), STACK),
    "interleaved": (
        lambda: tiff(STACK.transpose(1, 2, 0).copy(), photometric="minisblack", planarconfig="contig"),
        STACK,
    ),
    "interleaved tiles": (
        lambda: tiff(STACK.transpose(1, 2, 0).copy(), photometric="minisblack", planarconfig="contig", tile=(16, 16)),
        STACK,
    ),
    "pages": (lambda: pages(*STACK), STACK),
    "pages by Pillow": (
        lambda: pillow(STACK[0], "TIFF", save_all=True, append_images=[Image.fromarray(each) for each in STACK[1:]]),
        STACK,
    ),
    "pages, compressed": (lambda: pages(*STACK, compression="lzma"), STACK),
    "ImageJ": (lambda: tiff(STACK, imagej=True, metadata={"axes": "CYX"}), STACK),
    "OME": (lambda: tiff(STACK, ome=True, metadata={"axes": "CYX"}), STACK),
    "16 bits": (lambda: tiff(STACK.astype(np.uint16) * 9, photometric="minisblack"), STACK.astype(np.uint16) * 9),
    "png rgba": (lambda: pillow(RGBA, "PNG"), RGBA.transpose(2, 0, 1)),
    "webp rgba": (lambda: pillow(RGBA, "WEBP", lossless=True, exact=True), RGBA.transpose(2, 0, 1)),
    "tiff rgba": (lambda: tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), RGBA.transpose(2, 0, 1)),
}


@pytest.mark.parametrize("form", STACKS)
@pytest.mark.parametrize("bands", [(0,), (2, 0), (3, 1, 2)])
def test_bands_are_the_channels_that_were_written(form: str, bands: tuple[int, ...]) -> None:
    write, stack = STACKS[form]
    image = decode_image(write(), bands=bands)
    assert image.dtype == stack.dtype
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, stack[list(bands)].transpose(1, 2, 0))


def test_the_mask_of_a_band_is_the_mask_of_that_picture(masks: Callable[[Array], Array]) -> None:
    for form in ("planes", "interleaved", "pages", "OME"):
        data = STACKS[form][0]()
        for band in (0, 1, 4):
            np.testing.assert_array_equal(masks(decode_image(data, bands=(band,))), masks(STACK[band]))
        rgb = np.ascontiguousarray(STACK[[4, 1, 0]].transpose(1, 2, 0))
        np.testing.assert_array_equal(masks(decode_image(data, bands=(4, 1, 0))), masks(rgb))


def test_without_bands_a_stack_of_planes_is_refused_and_one_of_pages_is_its_first() -> None:
    with pytest.raises(ImageError, match="5 samples a pixel is neither grey nor RGB; say with bands"):
        decode_image(STACKS["planes"][0]())
    np.testing.assert_array_equal(decode_image(STACKS["pages"][0]())[..., 0], STACK[0])


@pytest.mark.parametrize(("form", "there"), [("planes", 5), ("pages", 5), ("png rgba", 4)])
def test_a_band_that_is_not_there_is_refused(form: str, there: int) -> None:
    with pytest.raises(ImageError, match=rf"has {there} channel\(s\), 0 to {there - 1}, and bands asks for 7"):
        decode_image(STACKS[form][0](), bands=(0, 7))


def test_pages_that_are_bands_must_be_alike() -> None:
    for other in (GREY[:-1], GREY16):
        with pytest.raises(ImageError, match="must be alike"):
            decode_image(pages(GREY, other), bands=(0, 1))
    np.testing.assert_array_equal(decode_image(pages(GREY, BITS, GREY[:-1]), bands=(1, 0))[..., 0], BITS)


def test_smaller_copies_are_no_bands() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for plane in (GREY, BITS):
            writer.write(plane, photometric="minisblack", metadata=None)
            writer.write(plane[::2, ::2], photometric="minisblack", metadata=None, subfiletype=1)
    np.testing.assert_array_equal(decode_image(buffer.getvalue(), bands=(1,))[..., 0], BITS)
    with pytest.raises(ImageError, match=r"has 2 channel\(s\)"):
        decode_image(buffer.getvalue(), bands=(2,))


def test_a_model_knows_its_bands_and_they_are_part_of_what_it_is() -> None:
    def model(**changed: Any) -> UNetPlusPlus:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UNetPlusPlus(ModelConfig.model_validate({"level": 1, "filters": (4, 6), **changed}))

    plain, bands, others = (digest(model(bands=bands)) for bands in (None, (2, 1, 0), (0, 1, 2)))
    assert len({plain, bands, others}) == 3
    with pytest.raises(ValueError, match="bands names 2 channels, in_channels is 3"):
        model(bands=(0, 1))
    assert model(in_channels=5, bands=(0, 1, 2, 3, 9)).config.bands == (0, 1, 2, 3, 9)


def test_a_predictor_takes_as_many_bands_as_its_network_reads(tiny_model: Any) -> None:
    plain = Predictor.from_pretrained(tiny_model)
    other = Predictor.from_pretrained(tiny_model, bands=(0, 2, 1))
    assert plain.digest != other.digest
    assert other.config.bands == (0, 2, 1)
    assert Predictor.from_pretrained(tiny_model, bands=(4,)).config.bands == (4,)  # a grey one will do
    with pytest.raises(ConfigError, match="bands 0, 1 are 2 channels, the model reads 3"):
        Predictor.from_pretrained(tiny_model, bands=(0, 1))


# ------------------------------------------------------------------------------------------- pages


def two_frames(form: str) -> bytes:
    return pillow(GREY, form, save_all=True, append_images=[Image.fromarray(255 - GREY)], duration=100, lossless=True)


@pytest.mark.parametrize(
    ("data", "num_pages"),
    [
        (pages(GREY, BITS, GREY), 3),
        (pages(RGB, RGB, photometric="rgb"), 2),
        (two_frames("GIF"), 2),
        (two_frames("WEBP"), 2),
        (two_frames("PNG"), 2),
        (pillow(GREY, "MPO", save_all=True, append_images=[Image.fromarray(BITS)]), 2),
    ],
    ids=["tiff", "tiff rgb", "gif", "webp", "apng", "mpo"],
)
def test_several_pages_are_the_first_or_refused(data: bytes, num_pages: int) -> None:
    assert size_of(data) == decode_image(data).shape[:2] == (HEIGHT, WIDTH)
    with pytest.raises(ImageError, match=f"has {num_pages} pages or frames, and `pages` refuses them") as caught:
        read_image(data, pages="refuse")
    assert caught.value.code == "decode"


def test_one_page_is_never_refused() -> None:
    for form in FORMS.keys() - {"tiff grey of two pages"}:
        data = FORMS[form][0]()
        np.testing.assert_array_equal(read_image(data, pages="refuse").image_HWC, decode_image(data))


def test_a_pyramid_and_the_pages_that_are_bands_are_no_several_images() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(GREY, tile=(16, 16), subifds=1, metadata=None)
        writer.write(GREY[::2, ::2], tile=(16, 16), subfiletype=1, metadata=None)
        writer.write(GREY[::4, ::4], tile=(16, 16), subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_image(buffer.getvalue(), pages="refuse").image_HWC[..., 0], GREY)
    stack = read_image(STACKS["pages"][0](), pages="refuse", bands=(1,))
    np.testing.assert_array_equal(stack.image_HWC[..., 0], STACK[1])


# ------------------------------------------------------------------------------------------- on Earth

KEYS = [1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633]
"""GeoTIFF keys: projected, pixel is area, UTM zone 33N."""


def located(array: Array = GREY, *, keys: list[int] = KEYS, orientation: int = 1, **tags: Any) -> bytes:
    numbers = {"scale": 33550, "tie": 33922, "matrix": 34264}
    extra = [(numbers[name], 12, len(value), value, True) for name, value in tags.items()]
    extra += [(34735, 3, len(keys), keys, True), (34737, 2, 0, "UTM 33N|", True)]
    extra += [(274, 3, 1, orientation, True)] if orientation > 1 else []
    return tiff(array, extratags=extra, metadata=None)


SCALE, TIE = (10.0, 20.0, 0.0), (0.0, 0.0, 0.0, 400000.0, 5700000.0, 0.0)


def test_a_place_on_earth_is_kept_beside_the_pixels() -> None:
    image, text = read_image(located(scale=SCALE, tie=TIE))
    np.testing.assert_array_equal(image[..., 0], GREY)
    assert text is not None
    geo = json.loads(text)
    assert geo["epsg"] == 32633
    assert geo["transform"] == [10.0, 0.0, 400000.0, 0.0, -20.0, 5700000.0]
    assert geo["tags"] == {
        "ModelPixelScale": list(SCALE),
        "ModelTiepoint": list(TIE),
        "GeoKeyDirectory": KEYS,
        "GeoAsciiParams": "UTM 33N|",
    }
    assert read_image(tiff(GREY)).geo is read_image(pillow(GREY, "PNG")).geo is None


def test_the_tags_of_a_mask_say_what_the_images_said() -> None:
    data = located(scale=SCALE, tie=TIE)
    copy = tiff(BITS, extratags=tiff_tags(read_image(data).geo), metadata=None)
    with tifffile.TiffFile(io.BytesIO(data)) as ours, tifffile.TiffFile(io.BytesIO(copy)) as theirs:
        assert ours.pages[0].geotiff_tags == theirs.pages[0].geotiff_tags != {}  # type: ignore[union-attr]
    assert read_image(copy).geo == read_image(data).geo
    assert tiff_tags(None) == []


def test_a_transformation_a_tie_elsewhere_and_points_in_the_middle_of_pixels_are_understood() -> None:
    matrix = (2.0, 1.0, 0.0, 100.0, -1.0, 2.0, 0.0, 50.0, *[0.0] * 7, 1.0)
    assert json.loads(read_image(located(matrix=matrix)).geo or "")["transform"] == [2, 1, 100, -1, 2, 50]
    tie = (5.0, 7.0, 0.0, 400000.0, 5700000.0, 0.0)
    geo = json.loads(read_image(located(scale=SCALE, tie=tie)).geo or "")
    assert geo["transform"] == [10, 0, 399950, 0, -20, 5700140]
    point = [*KEYS[:11], 2, *KEYS[12:]]
    geo = json.loads(read_image(located(scale=SCALE, tie=TIE, keys=point)).geo or "")
    assert geo["transform"] == [10, 0, 399995, 0, -20, 5700010]
    control = read_image(located(tie=TIE * 4)).geo
    assert json.loads(control or "")["transform"] is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("raster_type", [1, 2], ids=["area", "point"])
def test_a_turned_image_is_where_it_was(orientation: int, raster_type: int) -> None:
    keys = [*KEYS[:11], raster_type, *KEYS[12:]]
    numbers = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)
    upright = json.loads(read_image(located(numbers, scale=SCALE, tie=TIE, keys=keys)).geo or "")["transform"]
    for data in (
        located(numbers, scale=SCALE, tie=TIE, keys=keys, orientation=orientation),
        located(
            numbers,
            matrix=(10.0, 0, 0, 400000.0, 0, -20.0, 0, 5700000.0, *[0.0] * 7, 1.0),
            keys=keys,
            orientation=orientation,
        ),
    ):
        image, text = read_image(data)
        a, b, c, d, e, f = json.loads(text or "")["transform"]
        for row, column in ((0, 0), (3, 5), (image.shape[0] - 1, image.shape[1] - 1)):
            stored_row, stored_column = divmod(int(image[row, column, 0]), WIDTH)
            here = np.array([a * (column + 0.5) + b * (row + 0.5) + c, d * (column + 0.5) + e * (row + 0.5) + f])
            a0, b0, c0, d0, e0, f0 = upright
            x, y = stored_column + 0.5, stored_row + 0.5
            np.testing.assert_allclose(here, [a0 * x + b0 * y + c0, d0 * x + e0 * y + f0])


def test_control_points_turn_with_their_pixels() -> None:
    ties = (0.0, 0.0, 0.0, 1.0, 2.0, 0.0, float(WIDTH), float(HEIGHT), 0.0, 3.0, 4.0, 0.0)
    geo = json.loads(read_image(located(tie=ties, orientation=6)).geo or "")
    assert geo["tags"]["ModelTiepoint"] == [HEIGHT, 0, 0, 1, 2, 0, 0, WIDTH, 0, 3, 4, 0]


def test_damaged_and_endless_tags_are_named_and_left_out() -> None:
    geo = json.loads(read_image(located(scale=(float("nan"), 1.0, 0.0), tie=TIE)).geo or "")
    assert (geo["left_out"], geo["transform"], geo["epsg"]) == (["ModelPixelScale"], None, 32633)
    geo = json.loads(read_image(located(tie=TIE * 2000)).geo or "")
    assert geo["left_out"] == ["ModelTiepoint"]
    odd = json.loads(read_image(located(keys=[1, 1, 0, 9, 3072, 0])).geo or "")
    assert (odd["epsg"], odd["transform"]) == (None, None)

"""Images: what is in a file is what is in the array, or an ImageError says why not."""

import csv
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from tests.pictures import picture, size_of
from unetpp.errors import ImageError
from unetpp.images import decode_image, decode_mask, encode_image, encode_mask, to_channels
from unetpp.tiles import Box

Array = npt.NDArray[Any]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's remarks on files made broken here


def pattern(*shape: int, top: int = 255, dtype: Any = np.uint8) -> Array:
    """A smooth image with some noise that no turn or mirror maps to itself."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    plane = (rows / shape[0] * 0.5 + columns / shape[1] * 0.3)[..., None] + np.linspace(0, 0.1, shape[2])
    noise = np.random.default_rng(0).uniform(0, 0.1, shape)
    return ((plane + noise) * top).astype(dtype)


def saved(array: Array, form: str, mode: str | None = None, **options: Any) -> bytes:
    """Written by Pillow."""
    buffer = io.BytesIO()
    picture = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    (picture.convert(mode) if mode else picture).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(array: Array, **options: Any) -> bytes:
    """Written by tifffile."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(height: int, width: int, bits: int, colour: int, rows: bytes, extra: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG by hand: `rows` are filter bytes and samples before compression."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = (
        png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + behind + png_chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


GREY, RGB = pattern(37, 53, 1), pattern(37, 53, 3)
GREY16, RGB16 = (pattern(37, 53, c, top=65535, dtype=np.uint16) for c in (1, 3))
ALPHA = pattern(37, 53, 1, top=180)
RGBA, RGBA16 = np.concatenate([RGB, ALPHA], 2), np.concatenate([RGB16, ALPHA.astype(np.uint16) * 257], 2)
BITS = (pattern(37, 53, 1) > 90).astype(np.uint8) * 255
FLOAT = pattern(37, 53, 1, top=1, dtype=np.float64)
SIGNED = GREY16.astype(np.int32) - 30000
PALETTE = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)


def paletted(form: str) -> bytes:
    picture = Image.fromarray(GREY[..., 0], mode="L")
    picture.putpalette(PALETTE.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def samples_12_bit() -> tuple[bytes, Array]:
    array = pattern(8, 10, 1, top=4095, dtype=np.uint16)
    return tiff(array[..., 0], bitspersample=12, photometric="minisblack"), array


FORMS: dict[str, tuple[bytes, Array]] = {
    "png grey 8": (saved(GREY, "PNG"), GREY),
    "png grey 1": (saved(BITS, "PNG", "1"), BITS),
    "png grey 2": (png(1, 4, 2, 0, b"\0\x1b"), np.array([0, 85, 170, 255], np.uint8).reshape(1, 4, 1)),
    "png grey 4": (png(1, 2, 4, 0, b"\0\x1f"), np.array([17, 255], np.uint8).reshape(1, 2, 1)),
    "png grey 16": (bytes(imagecodecs.png_encode(GREY16[..., 0])), GREY16),
    "png grey + alpha 8": (saved(np.concatenate([GREY, ALPHA], 2), "PNG"), GREY),
    "png rgb 8": (saved(RGB, "PNG"), RGB),
    "png rgb 16": (bytes(imagecodecs.png_encode(RGB16)), RGB16),
    "png rgba 8": (saved(RGBA, "PNG"), RGB),
    "png rgba 16": (bytes(imagecodecs.png_encode(RGBA16)), RGB16),
    "png palette": (paletted("PNG"), PALETTE[GREY[..., 0]]),
    "gif palette": (paletted("GIF"), PALETTE[GREY[..., 0]]),
    "bmp palette": (paletted("BMP"), PALETTE[GREY[..., 0]]),
    "tiff palette": (paletted("TIFF"), PALETTE[GREY[..., 0]]),
    "bmp grey": (saved(GREY, "BMP"), GREY),
    "bmp rgb": (saved(RGB, "BMP"), RGB),
    "webp lossless": (saved(RGB, "WEBP", lossless=True), RGB),
    "ppm": (saved(RGB, "PPM"), RGB),
    "pgm 16": (b"P5 53 37 65535\n" + GREY16.astype(">u2").tobytes(), GREY16),
    "tiff bits": (saved(BITS, "TIFF", "1"), BITS),
    "tiff bits, white is 0": (saved(BITS, "TIFF", "1", tiffinfo={262: 0}), BITS),
    "tiff grey 8": (tiff(GREY[..., 0]), GREY),
    "tiff grey 8, white is 0": (tiff(255 - GREY[..., 0], photometric="miniswhite"), GREY),
    "tiff grey 16": (tiff(GREY16[..., 0]), GREY16),
    "tiff grey 16, white is 0": (tiff(65535 - GREY16[..., 0], photometric="miniswhite"), GREY16),
    "tiff grey 12": samples_12_bit(),
    "tiff big-endian 16": (tiff(GREY16[..., 0], byteorder=">"), GREY16),
    "tiff rgb 8": (tiff(RGB, photometric="rgb"), RGB),
    "tiff rgba 8": (tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), RGB),
    "tiff rgb 16": (tiff(RGB16, photometric="rgb"), RGB16),
    "tiff rgb 16 planes": (tiff(np.moveaxis(RGB16, -1, 0), photometric="rgb", planarconfig="separate"), RGB16),
    "tiff rgba 16 lzw": (tiff(RGBA16, photometric="rgb", compression="lzw", extrasamples=["unassalpha"]), RGB16),
    "tiff tiles 16 deflate": (tiff(RGB16, photometric="rgb", tile=(16, 16), compression="zlib", predictor=2), RGB16),
    "tiff strips 8 lzw": (tiff(RGB, photometric="rgb", rowsperstrip=5, compression="lzw", predictor=2), RGB),
    "tiff strips 8 zstd": (tiff(RGB, photometric="rgb", rowsperstrip=5, compression="zstd"), RGB),
    "tiff packbits": (tiff(GREY[..., 0], compression="packbits"), GREY),
    "tiff lzma": (saved(RGB, "TIFF", compression="lzma"), RGB),
    "bigtiff": (tiff(RGB16, photometric="rgb", bigtiff=True), RGB16),
    "tiff float32": (tiff(FLOAT[..., 0].astype(np.float32)), FLOAT.astype(np.float32)),
    "tiff float64": (tiff(FLOAT[..., 0]), FLOAT.astype(np.float32)),
    "tiff float16": (tiff(FLOAT[..., 0].astype(np.float16)), FLOAT.astype(np.float16).astype(np.float32)),
    "tiff float rgb": (
        tiff(pattern(9, 7, 3, top=1, dtype=np.float32), photometric="rgb"),
        pattern(9, 7, 3, top=1, dtype=np.float32),
    ),
    "tiff int8": (tiff((SIGNED[..., 0] // 256).astype(np.int8)), (SIGNED // 256).astype(np.float32)),
    "tiff int16": (tiff(SIGNED[..., 0].astype(np.int16)), SIGNED.astype(np.int16).astype(np.float32)),
    "tiff int32": (tiff(SIGNED[..., 0]), SIGNED.astype(np.float32)),
    "tiff, first of two pages": (tiff(np.stack([GREY16[..., 0], GREY16[..., 0] // 2])), GREY16),
    "gif, first of two frames": (saved(GREY, "GIF", save_all=True, append_images=[Image.new("L", (53, 37))]), GREY),
    "one pixel": (saved(GREY[:1, :1], "PNG"), GREY[:1, :1]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_gives_back_the_samples_it_was_written_from(form: str) -> None:
    data, expected = FORMS[form]
    image = decode_image(data)
    assert image.dtype == expected.dtype
    assert image.flags.c_contiguous
    assert image.flags.writeable
    np.testing.assert_array_equal(image if expected.shape[2] == image.shape[2] else image[..., :1], expected)
    if expected.shape[2] != image.shape[2]:  # a GIF has no grey: its three channels are equal
        assert form.startswith("gif")
        assert (image == image[..., :1]).all()


@pytest.mark.parametrize("form", FORMS)
def test_size_is_known_from_the_header(form: str) -> None:
    data, expected = FORMS[form]
    assert size_of(data) == expected.shape[:2]


@pytest.mark.parametrize("form", [form for form in FORMS if "first of two" not in form])
def test_a_truncated_file_is_refused_wherever_it_is_cut(form: str) -> None:
    data, _ = FORMS[form]
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError) as caught:
            decode_image(data[: int(len(data) * share)])
        assert caught.value.code == "decode"


@pytest.mark.parametrize(("mode", "form"), [("L", "JPEG"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("CMYK", "JPEG")])
def test_lossy_formats_give_about_what_was_written(mode: str, form: str) -> None:
    colours = pattern(64, 64, 3)
    image = decode_image(saved(colours, form, mode, quality=95))
    expected = colours if mode != "L" else to_channels(colours, 1)
    assert image.shape == expected.shape
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).mean() < 6  # noise of a few grey levels is what such formats lose


@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_jpeg_in_tiff_equals_jpeg(tile: tuple[int, int] | None) -> None:
    image = decode_image(tiff(pattern(64, 64, 3), photometric="rgb", compression="jpeg", tile=tile))
    assert np.abs(image.astype(int) - pattern(64, 64, 3)).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "TIFF16", "TIFFbits"])
def test_orientation_is_applied_as_viewers_do(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    if form == "TIFF16":
        data = tiff(GREY16[..., 0], extratags=[(274, 3, 1, orientation, True)])
        plain: Array = decode_image(tiff(GREY16[..., 0]))
    elif form.startswith("TIFF"):
        array, mode = (BITS, "1") if form == "TIFFbits" else (RGB, None)
        data = saved(array, "TIFF", mode, tiffinfo={274: orientation})
        plain = array
    else:
        data, plain = saved(RGB, form, exif=exif), decode_image(saved(RGB, form))
    turned = Image.fromarray(plain[..., 0] if plain.shape[2] == 1 else plain)
    turned.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned)).reshape(*size_of(data), -1)
    np.testing.assert_array_equal(decode_image(data), expected)


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[274] = 6
    rows = b"".join(b"\0" + GREY[y, :, 0].tobytes() for y in range(37))
    data = png(37, 53, 8, 0, rows, behind=png_chunk(b"eXIf", exif.tobytes()[6:]))
    assert size_of(data) == (53, 37)
    np.testing.assert_array_equal(decode_image(data), np.rot90(GREY, -1))


# ------------------------------------------------------------------------------------------- damaged files


def test_a_png_whose_stream_ends_early_is_not_half_black() -> None:
    rows = b"".join(b"\0" + RGB[y].tobytes() for y in range(37))
    np.testing.assert_array_equal(decode_image(png(37, 53, 8, 2, rows)), RGB)
    with pytest.raises(ImageError, match="decode"):
        decode_image(png(37, 53, 8, 2, rows[: len(rows) // 2]))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_short_and_closed_again_is_not_half_grey(progressive: bool) -> None:
    data = saved(pattern(200, 300, 3), "JPEG", quality=90, progressive=progressive)
    for damaged in (data[: len(data) // 2] + b"\xff\xd9", data[: len(data) // 2] + bytes(2000) + b"\xff\xd9"):
        with pytest.raises(ImageError, match="decode"):
            decode_image(damaged)


ODD_METADATA: dict[str, Callable[[bytes], bytes]] = {
    "a JFIF version of the future": lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\3", 1),
    "an ICC profile in parts that are not there": lambda data: (
        data[:2] + b"\xff\xe2\x00\x10ICC_PROFILE\0\x09\x01" + data[2:]
    ),
    "bytes between segments": lambda data: data[:20] + bytes(7) + data[20:],
}


@pytest.mark.parametrize("how", ODD_METADATA)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_with_odd_metadata_is_read_and_damage_behind_it_is_seen(how: str, mode: str) -> None:
    data = saved(pattern(64, 64, 3), "JPEG", mode, quality=95)
    if mode == "CMYK":
        data = data[:2] + b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0" + data[2:]
    odd = ODD_METADATA[how](data)
    assert odd != data
    np.testing.assert_array_equal(decode_image(odd), decode_image(data))
    with pytest.raises(ImageError, match="decode"):
        decode_image(odd[: len(odd) * 2 // 3] + b"\xff\xd9")


def test_without_its_metadata_a_jpeg_has_the_same_colours() -> None:
    data = bytearray(saved(RGB, "JPEG", subsampling=0))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for number, name in enumerate(b"RGB"):  # such components are YCbCr since a JFIF segment says so
        data[frame + 10 + 3 * number] = data[scan + 5 + 2 * number] = name
    odd = ODD_METADATA["a JFIF version of the future"](bytes(data))
    np.testing.assert_array_equal(decode_image(odd), decode_image(bytes(data)))
    assert np.abs(decode_image(odd).astype(int) - RGB).mean() < 12


def test_damage_behind_odd_metadata_in_a_jpeg_tile_of_a_tiff_is_seen() -> None:
    def tile(jpeg: bytes) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(
            buffer, iter([jpeg]), shape=(64, 64), dtype=np.uint8, tile=(64, 64), compression="jpeg", photometric=1
        )
        return buffer.getvalue()

    jpeg = saved(pattern(64, 64, 1), "JPEG", quality=95)
    odd = ODD_METADATA["a JFIF version of the future"](jpeg)
    np.testing.assert_array_equal(decode_image(tile(odd)), decode_image(jpeg))
    with pytest.raises(ImageError, match="decode"):
        decode_image(tile(odd[: len(odd) // 2] + b"\xff\xd9"))


@pytest.mark.parametrize(("bits", "palette"), [(4, range(16)), (4, (0, 255)), (8, (0, 255))])
def test_a_bmp_of_a_grey_palette_is_read_at_its_depth(bits: int, palette: Sequence[int]) -> None:
    """As some programs write binary masks; Pillow takes black and white for 1 bit, whatever the header says."""
    colours = b"".join(bytes([value] * 3 + [0]) for value in palette)
    samples = bytes([0x10, 0x01, 0x10, 0x11] if bits == 4 else [1, 0, 0, 1])
    sizes = struct.pack("<IiiHHIIiiII", 40, 32 // bits, 1, 1, bits, 0, len(samples), 0, 0, len(palette), 0)
    start = 14 + len(sizes) + len(colours)
    header = b"BM" + struct.pack("<IHHI", start + len(samples), 0, 0, start)
    data = header + sizes + colours + samples
    indices = [1, 0, 0, 1, 1, 0, 1, 1] if bits == 4 else [1, 0, 0, 1]
    assert decode_image(data)[0, :, 0].tolist() == [palette[index] for index in indices]
    assert decode_mask(data)[0].tolist() == indices
    with pytest.raises(ImageError):
        decode_image(data[:-2])


def test_a_missing_tiff_strip_is_not_black() -> None:
    data = bytearray(tiff(GREY16[..., 0], rowsperstrip=10, compression="zlib"))
    page = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0]
    counts = page.tags["StripByteCounts"]
    data[counts.valueoffset : counts.valueoffset + 2] = b"\0\0"
    with pytest.raises(ImageError, match="strips or tiles are missing"):
        decode_image(bytes(data))


def test_damage_in_a_jpeg_tile_of_a_tiff_is_seen() -> None:
    data = bytearray(tiff(pattern(128, 128, 3), photometric="rgb", compression="jpeg"))
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    with pytest.raises(ImageError, match="decode"):
        decode_image(bytes(data))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_none_in_float32_are_refused(value: float) -> None:
    array = FLOAT[..., 0].copy()
    array[3, 4] = value
    with pytest.raises(ImageError, match="not a number"):
        decode_image(tiff(array))


def test_integers_that_float32_would_round_are_refused() -> None:
    array = np.full((4, 4), 2**24, np.uint32)
    assert decode_image(tiff(array)).max() == 2**24
    with pytest.raises(ImageError, match=r"above 2\*\*24"):
        decode_image(tiff(array + np.uint32(1)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html><body>404 Not Found</body></html>", "no PNG, JPEG"),
        (b"%PDF-1.4\n%\xe2\xe3", "no PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no PNG, JPEG"),
        (saved(RGB, "ICO"), "no PNG, JPEG"),
        (saved(RGB, "JPEG2000"), "no PNG, JPEG"),
        (saved(RGB, "TGA"), "no PNG, JPEG"),
        (b"P6 2 1 65535\n" + bytes(12), "PPM with values up to 65535"),
        (b"P5 2 1 4095\n" + bytes(4), "PPM with values up to 4095"),
        (saved(BITS, "TIFF", "1", compression="group4"), "fax-compressed"),
        (saved(RGB, "TIFF", "LAB"), "LAB"),
        (tiff(pattern(8, 8, 5), photometric="minisblack", planarconfig="contig"), "5 samples a pixel"),
        (tiff(np.float32(FLOAT[..., 0]), photometric="miniswhite"), "no known white"),
        *(
            (tiff(RGB, photometric="rgb", compression=name.lower()), f"TIFF compression {name} is not supported")
            for name in ("JPEG2000", "JPEGXL", "JPEGXR", "LERC", "PNG", "WEBP")
        ),
    ],
)
def test_what_is_not_supported_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(data)
    assert caught.value.code == "decode"


def bombs() -> dict[str, bytes]:
    """60,000 x 60,000 pixels in a header with next to nothing behind it."""
    bmp = bytearray(saved(RGB, "BMP"))
    bmp[18:26] = struct.pack("<II", 60000, 60000)
    gif = bytearray(saved(GREY, "GIF"))
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    tif = bytearray(tiff(GREY16[..., 0]))
    page = tifffile.TiffFile(io.BytesIO(bytes(tif))).pages[0]
    for name in ("ImageWidth", "ImageLength"):
        tag = page.tags[name]
        tif[tag.valueoffset : tag.valueoffset + 2] = struct.pack("<H", 60000)
    jpeg = bytearray(saved(RGB, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    return {
        "png": png(60000, 60000, 8, 2, b""),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
        "tiff": bytes(tif),
        "jpeg": bytes(jpeg),
    }


def test_a_tile_far_larger_than_its_image_is_refused_on_the_header() -> None:
    wide_tile = bytearray(tiff(GREY16[..., 0], tile=(16, 16), compression="zlib"))
    page = tifffile.TiffFile(io.BytesIO(bytes(wide_tile))).pages[0]
    for name in ("TileWidth", "TileLength"):
        tag = page.tags[name]
        wide_tile[tag.valueoffset : tag.valueoffset + 2] = struct.pack("<H", 60000)
    with pytest.raises(ImageError) as caught:
        decode_image(bytes(wide_tile))
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("form", ["png", "bmp", "gif", "tiff", "jpeg"])
@pytest.mark.parametrize(
    "read", [decode_image, lambda data: picture(data).region(Box(0, 0, 60000, 60000))], ids=["whole", "region"]
)
def test_a_bomb_is_refused_on_its_header(read: Any, form: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(bombs()[form])
    assert caught.value.code == "too_large"


def test_the_cap_is_the_callers() -> None:
    data, _ = FORMS["png rgb 8"]
    assert decode_image(data, max_pixels=37 * 53).shape == (37, 53, 3)
    with pytest.raises(ImageError, match="37 x 53 pixels is more than max_pixels, 1960") as caught:
        decode_image(data, max_pixels=37 * 53 - 1)
    assert caught.value.code == "too_large"
    decode_image(data, max_pixels=10**9)
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS >= 10**9
    with pytest.raises(ImageError):
        decode_image(data, max_pixels=37 * 53 - 1)


def refusal(read: Callable[[], object]) -> ImageError | None:
    """The ImageError that `read` raises, if it does."""
    try:
        read()
    except ImageError as error:
        return error
    return None


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0\x08\0\0\0", b"BM", b"GIF89a", b"RIFF", b"P6 "]
    ),
    st.binary(max_size=200),
)
def test_any_bytes_are_an_image_or_an_image_error(start: bytes, rest: bytes) -> None:
    for read in (decode_image, size_of):
        error = refusal(lambda read=read: read(start + rest, max_pixels=10**6))
        assert error is None or (error.code in ("decode", "too_large") and 0 < len(error.detail) < 400)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 2**31), st.integers(0, 255), st.integers(1, 4))
def test_a_changed_file_is_an_image_or_an_image_error(form: str, where: int, value: int, count: int) -> None:
    data = bytearray(FORMS[form][0])
    where %= min(len(data), 600)
    data[where : where + count] = bytes([value]) * len(data[where : where + count])
    try:
        image = decode_image(bytes(data), max_pixels=10**6)
    except ImageError:
        return
    assert image.ndim == 3
    assert image.shape[2] in (1, 3)
    assert image.size
    assert image.dtype in (np.uint8, np.uint16, np.float32)
    assert np.isfinite(image).all()


# --------------------------------------------------------------------------------- channels and masks


def test_grey_to_rgb_and_back_is_the_same_grey() -> None:
    for dtype in (np.uint8, np.uint16):
        grey = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(1, -1, 1)
        rgb = to_channels(grey, 3)
        assert rgb.shape == (1, grey.shape[1], 3)
        assert rgb.dtype == dtype
        np.testing.assert_array_equal(to_channels(rgb, 1), grey)
    assert to_channels(RGB, 3) is RGB


def test_rgb_to_grey_is_luma() -> None:
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]], np.uint8)
    np.testing.assert_array_equal(to_channels(image, 1)[0, :, 0], [76, 150, 29, 18])
    with pytest.raises(ImageError, match="3 channels and the model wants 2"):
        to_channels(image, 2)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1)))
def test_a_binary_mask_survives_its_png(mask: Array) -> None:
    data = encode_mask(mask, 1)
    assert data == encode_mask(mask.copy(), 1)
    np.testing.assert_array_equal(decode_mask(data, 1), mask)
    shown = Image.open(io.BytesIO(data))
    assert shown.mode == "L"
    np.testing.assert_array_equal(np.asarray(shown), mask * 255)


@given(st.integers(2, 255), st.data())
def test_a_mask_of_classes_survives_its_png(num_classes: int, data: st.DataObject) -> None:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=20)
    mask = data.draw(hnp.arrays(np.uint8, shapes, elements=st.integers(0, num_classes - 1)))
    encoded = encode_mask(mask, num_classes)
    assert encoded == encode_mask(mask.copy(), num_classes)
    np.testing.assert_array_equal(decode_mask(encoded, num_classes), mask)
    assert Image.open(io.BytesIO(encoded)).mode == "P"


@pytest.mark.parametrize("image", [GREY, RGB, GREY16, RGB16], ids=["grey", "rgb", "grey 16", "rgb 16"])
def test_an_image_survives_its_png(image: Array) -> None:
    data = encode_image(image)
    assert data == encode_image(image.copy())
    np.testing.assert_array_equal(decode_image(data), image)


def test_class_colours_differ_and_background_is_black() -> None:
    picture = Image.open(io.BytesIO(encode_mask(np.arange(20, dtype=np.uint8).reshape(4, 5), 20)))
    colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert not colours[0].any()
    assert len(np.unique(colours, axis=0)) == 20


def test_labels_written_by_others_are_read() -> None:
    ids = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    np.testing.assert_array_equal(decode_mask(saved(ids, "PNG"), 3), ids)
    np.testing.assert_array_equal(decode_mask(tiff(ids.astype(np.uint16)), 3), ids)
    np.testing.assert_array_equal(decode_mask(saved(ids, "PNG"), 1), ids > 0)
    np.testing.assert_array_equal(decode_mask(saved(BITS, "PNG", "1"), 1), BITS[..., 0] > 0)
    np.testing.assert_array_equal(decode_mask(saved(np.repeat(ids[..., None], 3, 2) * 100, "PNG"), 1), ids > 0)


def packed(ids_HW: Array, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits; the width is a whole number of bytes."""
    height, width = ids_HW.shape
    samples = np.unpackbits(ids_HW[..., None], axis=2)[..., 8 - bits :]
    rows = np.packbits(samples.reshape(height, -1), axis=1)
    return png(height, width, bits, 0, b"".join(b"\0" + row.tobytes() for row in rows))


def packed_tiff(ids_HW: Array, bits: int) -> bytes:
    samples, how = (ids_HW > 0, {}) if bits == 1 else (ids_HW, {"bitspersample": bits})
    return tiff(samples, photometric="minisblack", **how)


@pytest.mark.parametrize("write", [packed, packed_tiff])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_ids_of_a_few_bits_are_the_values_before_they_are_stretched(write: Any, bits: int) -> None:
    top = 2**bits - 1
    ids = np.arange(48, dtype=np.uint8).reshape(3, 16) % (top + 1)
    data = write(ids, bits)
    np.testing.assert_array_equal(decode_image(data)[..., 0], ids * (255 // top))
    np.testing.assert_array_equal(decode_mask(data, top + 1), ids)
    np.testing.assert_array_equal(decode_mask(data, top + 1, ignore=255), ids)
    np.testing.assert_array_equal(decode_mask(data, 1), ids > 0)
    np.testing.assert_array_equal(decode_mask(data, 1, ignore=255), ids > 0)
    if bits > 1:
        np.testing.assert_array_equal(decode_mask(data, top, ignore=top), ids)
        with pytest.raises(ImageError, match=f"must be 0 to {top - 1}, this mask has {top}"):
            decode_mask(data, top)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM"])
def test_bits_that_others_write_are_ids_0_and_1(form: str) -> None:
    data = saved(BITS, form, "1")
    for num_classes, ignore in ((1, None), (1, 255), (2, None), (2, 255)):
        np.testing.assert_array_equal(decode_mask(data, num_classes, ignore=ignore), BITS[..., 0] > 0)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float32, np.float64])
def test_ids_are_whole_numbers_of_any_type(dtype: type) -> None:
    ids = np.array([[0, 1, 2], [2, 1, 0]], dtype)
    np.testing.assert_array_equal(decode_mask(tiff(ids), 3), ids)
    for wrong in (-1, 3, *([0.5] if dtype in (np.float32, np.float64) else [])):
        ids[0, 0] = wrong
        with pytest.raises(ImageError, match=f"must be 0 to 2, this mask has {wrong}$"):
            decode_mask(tiff(ids), 3)


def test_labels_out_of_range_are_refused() -> None:
    ids = np.array([[0, 255]], np.uint8)
    with pytest.raises(ImageError, match="must be 0 to 2, this mask has 255"):
        decode_mask(saved(ids, "PNG"), 3)
    with pytest.raises(ImageError, match="grey or palette"):
        decode_mask(saved(RGB, "PNG"), 3)


@pytest.mark.parametrize(
    ("values", "num_classes", "expected"),
    [
        ([0, 1, 255], 1, [0, 1, 255]),
        ([0, 7, 255], 1, [0, 1, 255]),
        ([0, 255, 255], 1, [0, 255, 255]),
        ([0, 2, 255], 3, [0, 2, 255]),
        ([255, 255, 255], 3, [255, 255, 255]),
    ],
)
def test_a_value_to_be_ignored_is_kept(values: list[int], num_classes: int, expected: list[int]) -> None:
    ids = np.array([values], np.uint8)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0] + [0, 128, 0] * 253 + [224, 224, 192])  # as VOC paints index 255
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    for data in (saved(ids, "PNG"), tiff(ids.astype(np.uint16)), buffer.getvalue()):
        np.testing.assert_array_equal(decode_mask(data, num_classes, ignore=255), [expected])


def test_without_a_value_to_be_ignored_255_is_foreground_or_refused() -> None:
    data = saved(np.array([[0, 1, 255]], np.uint8), "PNG")
    np.testing.assert_array_equal(decode_mask(data, 1), [[0, 1, 1]])
    with pytest.raises(ImageError, match="must be 0 to 2, this"):
        decode_mask(data, 3)
    with pytest.raises(ImageError, match="must be 0 to 2, or 254, which is ignored, this mask has 255"):
        decode_mask(data, 3, ignore=254)


def test_in_a_colour_mask_every_channel_says_ignore() -> None:
    colours = np.array([[[0, 0, 0], [255, 0, 0], [255, 255, 255]]], np.uint8)
    np.testing.assert_array_equal(decode_mask(saved(colours, "PNG"), 1, ignore=255), [[0, 1, 255]])


# ------------------------------------------------------------------------------------ files from the wild

ODD = SHARED / "odd_images"
RUN_LENGTH = "run-length BMP"
FAX = "fax-compressed TIFF"
REFUSED_ALTHOUGH_PILLOW_DECODES = {
    "image-rs__images__bmp__images__imagemagick_invalid_run_length_issue_2321.bmp": RUN_LENGTH,
    "pillow__bmp__b__badrle.bmp": RUN_LENGTH,  # Pillow gives a third of it
    "pillow__bmp__g__pal4rle.bmp": RUN_LENGTH,
    "pillow__bmp__g__pal8rle.bmp": RUN_LENGTH,
    "pillow__bmp__q__pal4rletrns.bmp": RUN_LENGTH,
    "pillow__bmp__q__pal8rletrns.bmp": RUN_LENGTH,
    "pillow__hopper_rle8_grayscale.bmp": RUN_LENGTH,
    "image-rs__images__tiff__testsuite__fax4.tiff": FAX,
    "pillow__compression.tif": FAX,
    "pillow__crash-0da013a13571cc8eb457a39fee8db18f8a3c7127.tif": FAX,  # Pillow gives a white page
    "pillow__crash-74d2a78403a5a59db1fb0a2b8735ac068a75f6e3.tif": FAX,  # Pillow loses a letter
    "pillow__g4-multi.tiff": FAX,
    **{f"pillow__g4_orientation_{n}.tif": FAX for n in range(1, 9)},
    "pillow__pport_g4.tif": FAX,
    "pillow__total-pages-zero.tif": FAX,
    "image-rs__regression__tiff__clusterfuzz-testcase-minimized-fuzzer_script_tiff-5026894169374720.tif": (
        "premature end of data segment"  # Pillow gives a bird with patches of wrong colour
    ),
    "pillow__hopper_bad_exif.jpg": "extraneous bytes before marker 0xd0",  # Pillow gives stripes
    "pillow__apng__syntax_num_frames_invalid.png": "PNG unsigned integer out of range",
    "pillow__lab.tif": "LAB",
    "pillow__separate_planar_extra_samples.tiff": "2 samples a pixel",
}
DECODED_ALTHOUGH_PILLOW_DOES_NOT = {
    "image-rs__images__tiff__testsuite__rgb32f_bw.tiff",  # float RGB, a type Pillow does not have
    "image-rs__images__tiff__testsuite__rgb32f_color.tiff",
    "imageio__multipage_rgb.tif",  # float64 planes
    "pillow__apng__chunk_no_fctl.png",  # only the animation is broken, the still image is whole
}
OTHER_PIXELS_THAN_PILLOW = {
    "image-rs__images__tiff__testsuite__hpredict.tiff",  # Pillow divides colours by alpha where it was multiplied in
    "image-rs__images__tiff__testsuite__hpredict_packbits.tiff",
    "pillow__pil136.tiff",
    "pillow__8bit.s.tif",  # signed: Pillow wraps -1 to 255
}

SWEEP = """
import io, json, logging, pathlib, resource, sys, warnings
import numpy as np
from PIL import Image, ImageOps
from unetpp.decoders import MAX_PIXELS
from unetpp.errors import ImageError
from unetpp.images import decode_image
from unetpp.regions import Picture

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")

def as_pillow(data, image):
    picture = Image.open(io.BytesIO(data))
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] not in "IF":
        picture = picture.convert("L" if image.shape[2] == 1 else "RGB")
    return np.asarray(picture).reshape(*picture.size[::-1], -1)

for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    data, row = path.read_bytes(), {"file": path.name}
    try:
        image = decode_image(data)
        picture = Picture(lambda spans: [data[start:stop] for start, stop in spans], len(data), MAX_PIXELS)
        row |= {"shape": image.shape, "type": image.dtype.name, "size": [picture.height, picture.width]}
        row["deep"] = image.dtype != np.uint8
        row["same"] = bool(np.array_equal(image, as_pillow(data, image)))
    except ImageError as error:
        row |= {"code": error.code, "detail": error.detail}
    except Exception:
        if "shape" not in row:
            raise
    print(json.dumps(row))
"""


@pytest.fixture(scope="module")
def odd_rows() -> dict[str, dict[str, Any]]:
    """What became of every odd file, read in a process with a memory limit."""
    if not ODD.is_dir():
        pytest.skip(f"needs the odd images in {ODD}")
    sweep = subprocess.run([sys.executable, "-c", SWEEP, str(ODD)], capture_output=True, text=True, check=False)
    assert sweep.returncode == 0, sweep.stderr[-2000:]
    return {row["file"]: row for row in map(json.loads, sweep.stdout.splitlines())}


@pytest.fixture(scope="module")
def index() -> dict[str, dict[str, str]]:
    if not ODD.is_dir():
        pytest.skip(f"needs the odd images in {ODD}")
    with (ODD / "index.csv").open(newline="") as lines:
        return {row["file"]: row for row in csv.DictReader(lines)}


def test_every_odd_file_is_an_image_or_an_image_error(
    odd_rows: dict[str, dict[str, Any]], index: dict[str, dict[str, str]]
) -> None:
    assert set(index) <= set(odd_rows)
    for row in odd_rows.values():
        if "shape" in row:
            assert row["shape"][2] in (1, 3)
            assert row["shape"][:2] == row["size"]
        else:
            assert row["code"] in ("decode", "too_large")


def test_refused_odd_files_are_those_that_pillow_refuses_and_those_listed(
    odd_rows: dict[str, dict[str, Any]], index: dict[str, dict[str, str]]
) -> None:
    refused = {name for name in index if "code" in odd_rows[name]}
    refused_by_pillow = {name for name, row in index.items() if row["pillow_decodes"] != "yes"}
    assert refused - refused_by_pillow == set(REFUSED_ALTHOUGH_PILLOW_DECODES)
    assert refused_by_pillow - refused == DECODED_ALTHOUGH_PILLOW_DOES_NOT
    for name, reason in REFUSED_ALTHOUGH_PILLOW_DECODES.items():
        assert reason in odd_rows[name]["detail"], name


def test_odd_files_of_8_bits_have_the_pixels_that_pillow_sees(
    odd_rows: dict[str, dict[str, Any]], index: dict[str, dict[str, str]]
) -> None:
    compared = [row for name, row in odd_rows.items() if name in index and "same" in row]
    differing = {row["file"] for row in compared if not row["same"]}
    assert {name for name in differing if not odd_rows[name]["deep"]} | {
        "pillow__8bit.s.tif"
    } == OTHER_PIXELS_THAN_PILLOW
    deep = {name for name in differing if odd_rows[name]["deep"]} - OTHER_PIXELS_THAN_PILLOW
    assert deep
    assert all(index[name]["mode"] in ("RGB", "RGBA") for name in deep)
    assert len(compared) > 250


def test_nuclei_images_are_rgb() -> None:
    folder = SHARED / "dsb2018" / "images"
    if not folder.is_dir():
        pytest.skip(f"needs the nuclei images in {folder}")
    for path in sorted(folder.iterdir())[::12]:
        image = decode_image(path.read_bytes())
        assert image.shape[2] == 3
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, np.asarray(Image.open(path))[..., :3])

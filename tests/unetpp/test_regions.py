"""Regions: the pixels are those of the whole image, whatever the file says of how they are stored."""

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from tests.pictures import picture
from tests.unetpp.test_images import png, png_chunk
from unetpp.decoders import turn
from unetpp.errors import ImageError
from unetpp.images import read_image
from unetpp.tiles import Box

Array = npt.NDArray[Any]
GREY = np.random.default_rng(3).integers(0, 256, (40, 60), np.uint8)


def tiff(array: Array, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def tagged(array: Array, code: int, value: int, **options: Any) -> bytes:
    """A TIFF with a tag that tifffile does not write: written in another's name."""
    data = bytearray(tiff(array, metadata=None, extratags=[(65000, 3, 1, value, True)], **options))
    tag = tifffile.TiffFile(io.BytesIO(data)).pages[0].tags[65000]
    struct.pack_into("<H", data, tag.offset, code)
    return bytes(data)


def assert_whole_and_regions_are(data: bytes, wanted_HW: Array) -> None:
    np.testing.assert_array_equal(read_image(data).image_HWC[..., 0], wanted_HW)
    seen = picture(data)
    assert (seen.height, seen.width) == wanted_HW.shape
    for box in (Box(0, 0, seen.height, seen.width), Box(11, 7, 33, 52)):
        np.testing.assert_array_equal(seen.region(box)[..., 0], wanted_HW[box.slices])


# ------------------------------------------------------------------------------ samples that lie as they are


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("rowsperstrip", [7, 40])
def test_bits_that_are_stored_backwards_are_turned(dtype: type, rowsperstrip: int) -> None:
    wanted_HW = GREY.astype(dtype) * (np.iinfo(dtype).max // 255)
    stored_HW = imagecodecs.bitorder_encode(wanted_HW)
    data = tagged(stored_HW, 266, 2, rowsperstrip=rowsperstrip)
    assert_whole_and_regions_are(data, wanted_HW)


@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 7}, {"tile": (16, 16)}])
def test_a_predictor_without_compression_is_ignored_as_libtiff_does(layout: dict[str, Any]) -> None:
    data = tagged(GREY, 317, 2, **layout)
    np.testing.assert_array_equal(Image.open(io.BytesIO(data)), GREY)
    assert_whole_and_regions_are(data, GREY)


# ---------------------------------------------------------------------------- images that are decoded whole


def test_the_cap_on_pixels_is_the_callers_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(imagecodecs.png_encode(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size // 4)
    seen = picture(data, max_pixels=GREY.size)
    assert seen.fits
    np.testing.assert_array_equal(seen.region(Box(1, 2, 9, 8))[..., 0], GREY[1:9, 2:8])
    with pytest.raises(ImageError, match="40 x 60 pixels is more than max_pixels, 2399") as caught:
        picture(data, max_pixels=GREY.size - 1)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("where", ["extra", "behind"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_png_is_turned_wherever_its_exif_lies(where: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    rows = b"".join(b"\0" + row.tobytes() for row in GREY)
    others = png_chunk(b"tEXt", b"Comment\0eXIf is a chunk") * 1000
    chunks = {"extra": others, "behind": others}
    chunks[where] = others + png_chunk(b"eXIf", exif.tobytes()[6:]) + png_chunk(b"tIME", bytes(7))
    data = png(*GREY.shape, 8, 0, rows, **chunks)
    assert_whole_and_regions_are(data, turn(GREY, orientation))

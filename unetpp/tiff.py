"""TIFF to pixels: plain samples of any width through tifffile, the rest through Pillow at 8 bits.

Pillow alone would cut 16-bit colour to 8 bits, wrap signed samples around, and invert MinIsWhite at 8 bits only.
tifffile alone would fill strips and tiles that are missing with zeros, and knows neither orientation nor MinIsWhite.
Functions here raise whatever their library raises, besides ImageError.
"""

import io
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import TiffImagePlugin

from unetpp.decoders import (
    MAX_PIXELS,
    ORIENTATION_TAG,
    check_size,
    decode_jpeg_strictly,
    open_picture,
    pillow_pixels,
    turn,
    turned_size,
)
from unetpp.errors import ImageError

Array = npt.NDArray[Any]

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 262, 258, 339
_PLAIN_COMPRESSION = {1, 5, 8, 32773, 32946, 50000}  # none, LZW, deflate, PackBits, old deflate, Zstandard
_FAX_COMPRESSION = {2, 3, 4}
JPEG_COMPRESSION = {6, 7}
_PLAIN_BITS = {8, 12, 16, 32, 64}


def is_tiff(data: bytes) -> bool:
    """Whether the first bytes are those of a TIFF or BigTIFF file."""
    return data.startswith(_MAGIC)


def decode_tiff(data: bytes, max_pixels: int) -> Array:
    """HWC pixels of the first page, 1 or 3 channels, uint8, uint16 or float32, turned."""
    page = first_page(io.BytesIO(data))
    if page is not None:
        check_size(page.imagelength, page.imagewidth, max_pixels)
        if page.is_tiled:  # a tile may be larger than its image
            check_size(page.tilelength, page.tilewidth, MAX_PIXELS)
        if is_plain(page):
            return _plain_pixels(page, len(data))
        if page.compression in _FAX_COMPRESSION:
            raise ImageError("decode", "fax-compressed TIFF is not supported: damage in it cannot be seen")
        if page.compression in JPEG_COMPRESSION:
            _check_jpeg_segments(page, data)
    picture = open_picture(data, max_pixels)
    assert isinstance(picture, TiffImagePlugin.TiffImageFile)
    bits = max(picture.tag_v2.get(_BITS_TAG, (1,)))
    unsigned = set(picture.tag_v2.get(_SAMPLE_FORMAT_TAG, (1,))) == {1}
    if not unsigned or (bits > 8 and picture.mode != "CMYK"):
        compression = picture.info.get("compression")
        raise ImageError("decode", f"TIFF of {bits}-bit samples with compression {compression} is not supported")
    return pillow_pixels(picture)  # Pillow turns TIFF itself, and inverts MinIsWhite at up to 8 bits


def tiff_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width of the first page, turned, from the header alone."""
    page = first_page(io.BytesIO(data))
    if page is None:
        return open_picture(data, max_pixels).size[::-1]  # as it is once turned
    check_size(page.imagelength, page.imagewidth, max_pixels)
    return turned_size(page.imagelength, page.imagewidth, orientation_of(page))


def first_page(file: BinaryIO) -> tifffile.TiffPage | None:
    """The first page's header, or None where tifffile cannot make sense of it and Pillow may have a try."""
    try:
        page = tifffile.TiffFile(file).pages[0]
    except Exception:
        return None
    return page if isinstance(page, tifffile.TiffPage) else None


def orientation_of(page: tifffile.TiffPage) -> int:
    """The page's orientation 1..8."""
    return int(page.tags.valueof(ORIENTATION_TAG, 1))


def is_plain(page: tifffile.TiffPage) -> bool:
    """Whether the page holds samples of a width and compression that tifffile reads right and strictly."""
    return (
        page.dtype is not None
        and page.dtype.kind in "uif"
        and page.bitspersample in _PLAIN_BITS
        and page.compression in _PLAIN_COMPRESSION
        and page.photometric in (0, 1, 2)
    )


def _plain_pixels(page: tifffile.TiffPage, size_bytes: int) -> Array:
    colour_channels(page)
    _check_segments(page, size_bytes)
    stored = page.asarray(squeeze=False, maxworkers=1)
    if stored.shape != page.shaped:
        raise ImageError("decode", f"the TIFF page holds {stored.shape} samples, its header says {page.shaped}")
    image = np.moveaxis(stored[:, 0, :, :, 0], 0, -1) if stored.shape[0] > 1 else stored[0, 0]
    return turn(as_colours(page, image), orientation_of(page))


def as_colours(page: tifffile.TiffPage, samples_HWS: Array) -> Array:
    """Samples as a page, or a region of it, stores them -> pixels: 1 or 3 channels, light is high, not turned."""
    image = samples_HWS[..., : colour_channels(page)]
    if page.photometric == 0 and _PHOTOMETRIC_TAG in page.tags:
        if image.dtype.kind != "u":
            raise ImageError("decode", f"MinIsWhite TIFF of type {image.dtype} has no known white")
        image = image.dtype.type(2**page.bitspersample - 1) - image
    return _as_supported_type(image)


def colour_channels(page: tifffile.TiffPage) -> int:
    """1 or 3, the samples a pixel that are kept: one more may follow if it is alpha, or unused after RGB.

    ImageError for any other page.
    """
    num_planes, depth, _, _, num_samples = page.shaped
    if depth != 1 or min(num_planes, num_samples) != 1:
        raise ImageError("decode", f"a TIFF page of {depth} slices or mixed planes is not supported")
    channels = 3 if page.photometric == 2 or page.samplesperpixel == 3 else 1
    extra = page.samplesperpixel - channels
    alpha = bool(page.extrasamples) and page.extrasamples[0] in (1, 2)
    if extra == 0 or (extra == 1 and (alpha or channels == 3)):
        return channels
    raise ImageError(
        "decode", f"a TIFF with {page.samplesperpixel} samples a pixel is neither grey nor RGB; save the channels apart"
    )


def _check_segments(page: tifffile.TiffPage, size_bytes: int) -> None:
    """Every strip or tile is there and inside the file; tifffile would fill what is missing with zeros."""
    offsets, counts, num_segments = page.dataoffsets, page.databytecounts, int(np.prod(page.chunked))
    if page.is_contiguous and len(offsets) and sum(counts) >= page.nbytes:
        offsets, counts, num_segments = offsets[:1], (page.nbytes,), 1
    inside = all(o > 0 and c > 0 and o + c <= size_bytes for o, c in zip(offsets, counts, strict=False))
    if not inside or min(len(offsets), len(counts)) < num_segments:
        raise ImageError("decode", "the TIFF file is cut short: strips or tiles are missing")


def _check_jpeg_segments(page: tifffile.TiffPage, data: bytes) -> None:
    """Decode every JPEG strip or tile with libjpeg's warnings as errors: libtiff passes over them."""
    _check_segments(page, len(data))
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        check_jpeg_segment(page, data[offset : offset + count])


def check_jpeg_segment(page: tifffile.TiffPage, segment: bytes) -> None:
    """Raise ValueError where libjpeg warns about the pixels of a strip or tile."""
    tables = page.jpegtables or b""
    decode_jpeg_strictly(tables[:-2] + segment[2:] if tables else segment)


def _as_supported_type(image: Array) -> Array:
    """uint8 and uint16 as they are, all else as float32 of the same numbers."""
    if image.dtype in (np.uint8, np.uint16):
        return image
    if image.dtype.kind in "ui" and image.dtype.itemsize > 2 and np.abs(image.astype(np.float64)).max() > 2**24:
        raise ImageError("decode", f"{image.dtype} values above 2**24 do not fit in float32; rescale the image")
    with np.errstate(over="ignore"):
        as_float = image.astype(np.float32)
    if not np.isfinite(as_float).all():
        raise ImageError("decode", "the image has pixels that are infinite, not a number, or too large for float32")
    return as_float

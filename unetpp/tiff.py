"""TIFF to pixels: plain samples of any width through tifffile, the rest through Pillow at 8 bits.

Pillow alone would cut 16-bit colour to 8 bits, wrap signed samples around, and invert MinIsWhite at 8 bits only.
tifffile alone would fill strips and tiles that are missing with zeros, and knows neither orientation nor MinIsWhite.
Functions here raise whatever their library raises, besides ImageError.
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import TiffImagePlugin

from unetpp.config import Bands, Pages
from unetpp.decoders import (
    MAX_PIXELS,
    ORIENTATION_TAG,
    check_bands,
    check_size,
    choose,
    decode_jpeg_strictly,
    open_picture,
    pillow_pixels,
    refuse_pages,
    turn,
    turned_size,
)
from unetpp.errors import ImageError
from unetpp.geo import read_geo

Array = npt.NDArray[Any]

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 262, 258, 339
_PLAIN_COMPRESSION = {1, 5, 8, 32773, 32946, 50000}  # none, LZW, deflate, PackBits, old deflate, Zstandard
_FAX_COMPRESSION = {2, 3, 4}
_JPEG_COMPRESSION = {6, 7}
_PLAIN_BITS = {8, 12, 16, 32, 64}


def is_tiff(data: bytes) -> bool:
    """Whether the first bytes are those of a TIFF or BigTIFF file."""
    return data.startswith(_MAGIC)


def decode_tiff(
    data: bytes, max_pixels: int, pages: Pages = "first", bands: Bands | None = None
) -> tuple[Array, str | None]:
    """HWC pixels of the first page, turned, and where on Earth they are (`unetpp.geo`).

    1 or 3 channels, or those that `bands` names: of the first page's samples, or, where it has one sample a pixel and
    other pages follow, of the pages.
    """
    file = _open(data)
    page = None if file is None else _page(file, 0)
    if file is None or page is None:
        if pages == "refuse":
            refuse_pages(getattr(open_picture(data, max_pixels), "n_frames", 1))
        return _picture_pixels(data, max_pixels, bands), None
    numbers = range(1) if pages == "first" and bands is None else _numbers_of_pages(file)
    if bands is not None and page.samplesperpixel == 1 and len(numbers) > 1:
        check_bands(bands, len(numbers))
        image = _stacked(data, file, [numbers[band] for band in bands], max_pixels)
    else:
        if pages == "refuse":
            refuse_pages(len(numbers))
        image = _page_pixels(data, page, 0, max_pixels, bands)
    return image, read_geo(page.tags.valueof, page.imagelength, page.imagewidth, _orientation(page))


def tiff_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width of the first page, turned, from the header alone."""
    file = _open(data)
    page = None if file is None else _page(file, 0)
    if page is None:
        return open_picture(data, max_pixels).size[::-1]  # as it is once turned
    check_size(page.imagelength, page.imagewidth, max_pixels)
    return turned_size(page.imagelength, page.imagewidth, _orientation(page))


def _open(data: bytes) -> tifffile.TiffFile | None:
    """The file, or None where tifffile cannot make sense of it and Pillow may have a try."""
    try:
        return tifffile.TiffFile(io.BytesIO(data))
    except Exception:
        return None


def _page(file: tifffile.TiffFile, number: int) -> tifffile.TiffPage | None:
    """A page's header, or None as in `_open`."""
    try:
        page = file.pages[number]
    except Exception:
        return None
    return page if isinstance(page, tifffile.TiffPage) else None


def _numbers_of_pages(file: tifffile.TiffFile) -> list[int]:
    """Which of the pages are images of their own: not smaller copies, nor masks, nor what a slide scanner adds."""
    if file.is_svs:
        return [0]
    numbers = [0]
    for number in range(1, len(file.pages)):
        page = _page(file, number)
        if page is None:
            raise ImageError("decode", f"the header of the TIFF's page {number} is damaged")
        if not page.is_reduced and not page.is_mask:
            numbers.append(number)
    return numbers


def _stacked(data: bytes, file: tifffile.TiffFile, numbers: list[int], max_pixels: int) -> Array:
    """The pages of these numbers as channels."""
    planes: list[Array] = []
    for number in numbers:
        page = _page(file, number)
        assert page is not None
        plane = _page_pixels(data, page, number, max_pixels, None)
        if planes and (plane.shape, plane.dtype) != (planes[0].shape, planes[0].dtype):
            raise ImageError(
                "decode",
                f"page {number} is {plane.dtype} {plane.shape}, page {numbers[0]} is {planes[0].dtype} "
                f"{planes[0].shape}: pages that are bands of one image must be alike",
            )
        planes.append(plane)
    return np.concatenate(planes, axis=2)


def _page_pixels(data: bytes, page: tifffile.TiffPage, number: int, max_pixels: int, bands: Bands | None) -> Array:
    check_size(page.imagelength, page.imagewidth, max_pixels)
    if page.is_tiled:  # a tile may be larger than its image
        check_size(page.tilelength, page.tilewidth, MAX_PIXELS)
    if _is_plain(page):
        return _plain_pixels(page, len(data), bands)
    if page.compression in _FAX_COMPRESSION:
        raise ImageError("decode", "fax-compressed TIFF is not supported: damage in it cannot be seen")
    if page.compression in _JPEG_COMPRESSION:
        _check_jpeg_segments(page, data)
    return _picture_pixels(data, max_pixels, bands, number)


def _picture_pixels(data: bytes, max_pixels: int, bands: Bands | None, number: int = 0) -> Array:
    """A page as Pillow reads it: 8 bits."""
    picture = open_picture(data, max_pixels)
    if number:
        picture.seek(number)
        check_size(picture.height, picture.width, max_pixels)
    assert isinstance(picture, TiffImagePlugin.TiffImageFile)
    bits = max(picture.tag_v2.get(_BITS_TAG, (1,)))
    unsigned = set(picture.tag_v2.get(_SAMPLE_FORMAT_TAG, (1,))) == {1}
    if not unsigned or (bits > 8 and picture.mode != "CMYK"):
        compression = picture.info.get("compression")
        raise ImageError("decode", f"TIFF of {bits}-bit samples with compression {compression} is not supported")
    return choose(pillow_pixels(picture), bands)  # Pillow turns TIFF itself, and inverts MinIsWhite at up to 8 bits


def _orientation(page: tifffile.TiffPage) -> int:
    return int(page.tags.valueof(ORIENTATION_TAG, 1))


def _is_plain(page: tifffile.TiffPage) -> bool:
    return (
        page.dtype is not None
        and page.dtype.kind in "uif"
        and page.bitspersample in _PLAIN_BITS
        and page.compression in _PLAIN_COMPRESSION
        and page.photometric in (0, 1, 2)
    )


def _plain_pixels(page: tifffile.TiffPage, size_bytes: int, bands: Bands | None) -> Array:
    num_planes, depth, _, _, num_samples = page.shaped
    channels: slice | list[int] = slice(_colour_channels(page)) if bands is None else list(bands)
    if depth != 1 or min(num_planes, num_samples) != 1:
        raise ImageError("decode", f"a TIFF page of {depth} slices or mixed planes is not supported")
    _check_segments(page, size_bytes)
    stored = page.asarray(squeeze=False, maxworkers=1)
    if stored.shape != page.shaped:
        raise ImageError("decode", f"the TIFF page holds {stored.shape} samples, its header says {page.shaped}")
    image = np.moveaxis(stored[:, 0, :, :, 0], 0, -1) if num_planes > 1 else stored[0, 0]
    if bands is not None:
        check_bands(bands, image.shape[2])
    image = image[..., channels]
    if page.photometric == 0 and _PHOTOMETRIC_TAG in page.tags:
        if image.dtype.kind != "u":
            raise ImageError("decode", f"MinIsWhite TIFF of type {image.dtype} has no known white")
        image = image.dtype.type(2**page.bitspersample - 1) - image
    return turn(_as_supported_type(image), _orientation(page))


def _colour_channels(page: tifffile.TiffPage) -> int:
    """1 or 3, the samples a pixel that are kept: one more may follow if it is alpha, or unused after RGB."""
    channels = 3 if page.photometric == 2 or page.samplesperpixel == 3 else 1
    extra = page.samplesperpixel - channels
    alpha = bool(page.extrasamples) and page.extrasamples[0] in (1, 2)
    if extra == 0 or (extra == 1 and (alpha or channels == 3)):
        return channels
    raise ImageError(
        "decode",
        f"a TIFF with {page.samplesperpixel} samples a pixel is neither grey nor RGB; say with bands which to read",
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
    tables = page.jpegtables or b""
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        segment = data[offset : offset + count]
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

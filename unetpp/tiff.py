"""TIFF to pixels: plain samples of any width through tifffile, the rest through Pillow at 8 bits.

Pillow alone would cut 16-bit colour to 8 bits, wrap signed samples around, and invert MinIsWhite at 8 bits only.
tifffile alone would fill strips and tiles that are missing with zeros, and knows neither orientation nor MinIsWhite.
Functions here raise whatever their library raises, besides ImageError.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

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
)
from unetpp.errors import ImageError
from unetpp.geo import read_geo

Array = npt.NDArray[Any]

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTOMETRIC_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 262, 258, 339
_PLAIN_COMPRESSION = {1, 5, 8, 32773, 32946, 50000}  # none, LZW, deflate, PackBits, old deflate, Zstandard
_FAX_COMPRESSION = {2, 3, 4}
JPEG_COMPRESSION = {6, 7}
_PILLOW_COMPRESSION = TiffImagePlugin.COMPRESSION_INFO.keys() - {50001}  # its wheels have a libtiff without WebP
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
    file = open_tiff(io.BytesIO(data))
    page = None if file is None else page_of(file, 0)
    if file is None or page is None:
        if pages == "refuse":
            refuse_pages(getattr(open_picture(data, max_pixels), "n_frames", 1))
        return _picture_pixels(data, max_pixels, bands), None
    numbers, bands = pages_to_read(file, page, pages, bands)
    planes = (_page_pixels(data, _page_at(file, number), number, max_pixels, bands) for number in numbers)
    return stack(numbers, planes), geo_of(page)


# ----------------------------------------------------------- for whole files and for regions (`unetpp.regions`)


def open_tiff(file: BinaryIO) -> tifffile.TiffFile | None:
    """The file, or None where tifffile cannot make sense of it and Pillow may have a try."""
    try:
        return tifffile.TiffFile(file)
    except Exception:
        return None


def page_of(file: tifffile.TiffFile, number: int) -> tifffile.TiffPage | None:
    """A page's header, or None as in `open_tiff`."""
    try:
        page = file.pages[number]
    except Exception:
        return None
    if not isinstance(page, tifffile.TiffPage):
        return None
    if page.compression == 1:  # a predictor is a part of compression: without one libtiff does not look at it
        page.predictor = 1
    return page


def pages_to_read(
    file: tifffile.TiffFile, page: tifffile.TiffPage, pages: Pages, bands: Bands | None
) -> tuple[list[int], Bands | None]:
    """Numbers of the pages that hold an image's channels, and which channels of each: None, its colours.

    `page` is the first one. ImageError where there are others and they are refused, or fewer than `bands` wants.
    """
    one_sample = bands is not None and page.samplesperpixel == 1
    numbers = _numbers_of_pages(file) if one_sample or pages == "refuse" else [0]
    if bands is not None and one_sample and len(numbers) > 1:
        check_bands(bands, len(numbers))
        return [numbers[band] for band in bands], None
    if pages == "refuse":
        refuse_pages(len(numbers))
    return [0], bands


def stack(numbers: Sequence[int], planes: Iterable[Array]) -> Array:
    """Pixels of the pages of these numbers as channels of one image. ImageError where they are not alike."""
    found: list[Array] = []
    for number, plane in zip(numbers, planes, strict=True):
        if found and (plane.shape, plane.dtype) != (found[0].shape, found[0].dtype):
            raise ImageError(
                "decode",
                f"page {number} is {plane.dtype} {plane.shape}, page {numbers[0]} is {found[0].dtype} "
                f"{found[0].shape}: pages that are bands of one image must be alike",
            )
        found.append(plane)
    return found[0] if len(found) == 1 else np.concatenate(found, axis=2)


def channels_of(page: tifffile.TiffPage, bands: Bands | None) -> Sequence[int]:
    """The samples a pixel of a page that are kept: those of `bands`, or 1 or 3 colours.

    With the colours one more may be there, if it is alpha, or unused after RGB. ImageError for any other page.
    """
    num_planes, depth, _, _, num_samples = page.shaped
    if depth != 1 or min(num_planes, num_samples) != 1:
        raise ImageError("decode", f"a TIFF page of {depth} slices or mixed planes is not supported")
    if bands is not None:
        check_bands(bands, page.samplesperpixel)
        return bands
    colours = 3 if page.photometric == 2 or page.samplesperpixel == 3 else 1
    extra = page.samplesperpixel - colours
    alpha = bool(page.extrasamples) and page.extrasamples[0] in (1, 2)
    if extra == 0 or (extra == 1 and (alpha or colours == 3)):
        return range(colours)
    raise ImageError(
        "decode",
        f"a TIFF with {page.samplesperpixel} samples a pixel is neither grey nor RGB; say with bands which to read",
    )


def pick(samples_HWS: Array, channels: Sequence[int]) -> Array:
    """The samples of `channels_of`; a view where they are the first ones."""
    return samples_HWS[..., : len(channels)] if isinstance(channels, range) else samples_HWS[..., list(channels)]


def as_shown(page: tifffile.TiffPage, image_HWC: Array) -> Array:
    """Samples as a page, or a region of it, stores them -> light is high, and a type that is supported; not turned."""
    if page.photometric == 0 and _PHOTOMETRIC_TAG in page.tags:
        if image_HWC.dtype.kind != "u":
            raise ImageError("decode", f"MinIsWhite TIFF of type {image_HWC.dtype} has no known white")
        image_HWC = image_HWC.dtype.type(2**page.bitspersample - 1) - image_HWC
    return _as_supported_type(image_HWC)


def orientation_of(page: tifffile.TiffPage) -> int:
    """The page's orientation, 1..8."""
    return int(page.tags.valueof(ORIENTATION_TAG, 1))


def geo_of(page: tifffile.TiffPage) -> str | None:
    """Where on Earth the page is, once it is turned (`unetpp.geo`)."""
    return read_geo(page.tags.valueof, page.imagelength, page.imagewidth, orientation_of(page))


def refuse_fax(page: tifffile.TiffPage) -> None:
    """Raise ImageError for a page in which damage leaves no trace."""
    if page.compression in _FAX_COMPRESSION:
        raise ImageError("decode", "fax-compressed TIFF is not supported: damage in it cannot be seen")


def is_plain(page: tifffile.TiffPage) -> bool:
    """Whether tifffile reads the page's samples as they are."""
    return (
        page.dtype is not None
        and page.dtype.kind in "uif"
        and page.bitspersample in _PLAIN_BITS
        and page.compression in _PLAIN_COMPRESSION
        and page.photometric in (0, 1, 2)
    )


def check_jpeg_segment(page: tifffile.TiffPage, segment: bytes) -> None:
    """Raise ValueError where libjpeg warns about the pixels of a strip or tile: libtiff passes over that."""
    tables = page.jpegtables or b""
    decode_jpeg_strictly(tables[:-2] + segment[2:] if tables else segment)


# ------------------------------------------------------------------------------------------- whole files


def _page_at(file: tifffile.TiffFile, number: int) -> tifffile.TiffPage:
    if (page := page_of(file, number)) is None:
        raise ImageError("decode", f"the header of the TIFF's page {number} is damaged")
    return page


def _numbers_of_pages(file: tifffile.TiffFile) -> list[int]:
    """Which of the pages are images of their own: not smaller copies, nor masks, nor what a slide scanner adds."""
    if file.is_svs:
        return [0]
    others = ((number, _page_at(file, number)) for number in range(1, len(file.pages)))
    return [0, *(number for number, page in others if not page.is_reduced and not page.is_mask)]


def _page_pixels(data: bytes, page: tifffile.TiffPage, number: int, max_pixels: int, bands: Bands | None) -> Array:
    check_size(page.imagelength, page.imagewidth, max_pixels)
    if page.is_tiled:  # a tile may be larger than its image
        check_size(page.tilelength, page.tilewidth, MAX_PIXELS)
    if is_plain(page):
        return _plain_pixels(page, len(data), bands)
    refuse_fax(page)
    if page.compression not in _PILLOW_COMPRESSION:
        name = getattr(page.compression, "name", page.compression)
        raise ImageError("decode", f"TIFF compression {name} is not supported; convert it to deflate, LZW or Zstandard")
    if page.compression in JPEG_COMPRESSION:
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


def _plain_pixels(page: tifffile.TiffPage, size_bytes: int, bands: Bands | None) -> Array:
    channels = channels_of(page, bands)
    _check_segments(page, size_bytes)
    stored = page.asarray(squeeze=False, maxworkers=1)
    if stored.shape != page.shaped:
        raise ImageError("decode", f"the TIFF page holds {stored.shape} samples, its header says {page.shaped}")
    samples_HWS = np.moveaxis(stored[:, 0, :, :, 0], 0, -1) if stored.shape[0] > 1 else stored[0, 0]
    return turn(as_shown(page, pick(samples_HWS, channels)), orientation_of(page))


def _check_segments(page: tifffile.TiffPage, size_bytes: int) -> None:
    """Every strip or tile is there and inside the file; tifffile would fill what is missing with zeros."""
    offsets, counts, num_segments = page.dataoffsets, page.databytecounts, int(np.prod(page.chunked))
    if page.is_contiguous and len(offsets) and sum(counts) >= page.nbytes:
        offsets, counts, num_segments = offsets[:1], (page.nbytes,), 1
    inside = all(o > 0 and c > 0 and o + c <= size_bytes for o, c in zip(offsets, counts, strict=False))
    if not inside or min(len(offsets), len(counts)) < num_segments:
        raise ImageError("decode", "the TIFF file is cut short: strips or tiles are missing")


def _check_jpeg_segments(page: tifffile.TiffPage, data: bytes) -> None:
    """Decode every JPEG strip or tile with libjpeg's warnings as errors."""
    _check_segments(page, len(data))
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        check_jpeg_segment(page, data[offset : offset + count])


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

"""Regions of images that are too large to be held whole. Opens no file and no URI: bytes are asked for as needed.

A TIFF in tiles or strips gives a region for the bytes of the tiles that it touches, whatever the image's size: plain
samples and JPEG, contiguous or planar, BigTIFF, pages that are bands, and of a pyramid its first and largest page. Any
other image is decoded whole, under the cap on pixels, and kept for the next region. The pixels are those of
`images.read_image`, and what they mean is said by the same functions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import tifffile

from unetpp.config import Bands, Pages
from unetpp.decoders import check_size, open_header, orientation, turn, turned_size
from unetpp.errors import ImageError
from unetpp.images import Decoded, failures_as_image_errors, read_image
from unetpp.spans import BATCH_BYTES, BATCH_SPANS, Read, Span, SpanFile, fetch, read_whole
from unetpp.tiff import (
    JPEG_COMPRESSION,
    as_shown,
    channels_of,
    check_jpeg_segment,
    geo_of,
    is_plain,
    is_tiff,
    open_tiff,
    orientation_of,
    page_of,
    pages_to_read,
    pick,
    refuse_fax,
    stack,
)
from unetpp.tiles import Box

Array = npt.NDArray[Any]
MAX_SEGMENT_PX = 1 << 25
"""A larger strip or tile is no region: its image is decoded whole."""
TAIL_BYTES = 128 << 10
"""The end of a PNG in which an orientation is looked for that does not lie before the pixels."""


class Picture:
    """An image file: its size as it is shown, where on Earth it is, and its regions. ImageError as `read_image`."""

    def __init__(
        self, read: Read, size_bytes: int, max_pixels: int, pages: Pages = "first", bands: Bands | None = None
    ) -> None:
        """`max_pixels`, `pages` and `bands` as `read_image` takes them."""
        self._read, self._size_bytes = read, size_bytes
        self._max_pixels, self._pages, self._bands = max_pixels, pages, bands
        self._whole: Decoded | None = None
        self._numbers: list[int] = []
        self._stored: list[_Stored] = []
        """Of each page of `_numbers`, if regions can be read."""
        self.geo: str | None = None
        with failures_as_image_errors():
            file = cast(BinaryIO, SpanFile(read, size_bytes))
            height, width = self._open_tiff(file) or self._open_other(file)
            check_size(height, width, height * width)
            self.height, self.width = turned_size(height, width, self._orientation)

    def _open_tiff(self, file: BinaryIO) -> tuple[int, int] | None:
        """Height and width as stored; None where it is no TIFF that tifffile can make sense of."""
        is_ours = is_tiff(file.read(4))
        file.seek(0)
        tiff = open_tiff(file) if is_ours else None
        page = None if tiff is None else page_of(tiff, 0)
        if tiff is None or page is None:
            return None
        self._numbers, bands = pages_to_read(tiff, page, self._pages, self._bands)
        found = [page_of(tiff, number) for number in self._numbers]
        stored = [_stored(each, bands, self._read, self._size_bytes) for each in found if each is not None]
        are_alike = len({_shape(each) for each in found}) == 1
        self._stored = [each for each in stored if each is not None and are_alike]
        self._orientation, self.geo = orientation_of(page), geo_of(page)
        return page.imagelength, page.imagewidth

    def _open_other(self, file: BinaryIO) -> tuple[int, int]:
        file.seek(0)
        picture = open_header(file, self._max_pixels)
        file.seek(max(0, self._size_bytes - TAIL_BYTES))
        tail = file.read() if picture.format == "PNG" else b""
        # Pillow has turned a TIFF's size already.
        self._orientation = 1 if picture.format == "TIFF" else orientation(picture, tail)
        return picture.height, picture.width

    @property
    def fits(self) -> bool:
        """Whether its regions can be read: piece by piece, or since it is small enough to be decoded whole."""
        return self._is_stored or self.height * self.width <= self._max_pixels

    @property
    def _is_stored(self) -> bool:
        return bool(self._stored) and len(self._stored) == len(self._numbers)

    def region(self, box: Box) -> Array:
        """The pixels inside `box`, which lies within the image as it is shown: HWC, contiguous, writable."""
        with failures_as_image_errors():
            if not self._is_stored:
                return np.array(self._decoded().image_HWC[box.slices])
            check_size(box.height, box.width, self._max_pixels)
            height, width = turned_size(self.height, self.width, self._orientation)
            inside = _before_turning(box, height, width, self._orientation)
            pixels = stack(self._numbers, (page.pixels(inside) for page in self._stored))
            return np.require(turn(pixels, self._orientation), requirements=["C", "W", "O"])

    def _decoded(self) -> Decoded:
        if self._whole is None:
            check_size(self.height, self.width, self._max_pixels)
            content = read_whole(self._read, self._size_bytes)
            whole = read_image(content, max_pixels=self._max_pixels, pages=self._pages, bands=self._bands)
            if (seen := whole.image_HWC.shape[:2]) != (self.height, self.width):
                raise ImageError("decode", f"its header says {self.height} x {self.width} pixels, it has {seen}")
            self._whole = whole
        return self._whole


def _shape(page: tifffile.TiffPage | None) -> tuple[int, int, int] | None:
    return None if page is None else (page.imagelength, page.imagewidth, orientation_of(page))


def _before_turning(box: Box, height: int, width: int, orientation: int) -> Box:
    """Where a box of the image as it is shown lies in the image as it is stored, `height` x `width`."""
    rows = turn(np.broadcast_to(np.arange(height)[:, None], (height, width)), orientation)
    columns = turn(np.broadcast_to(np.arange(width), (height, width)), orientation)
    corners = (box.y0, box.x0), (box.y1 - 1, box.x1 - 1)
    y0, y1 = sorted(int(rows[corner]) for corner in corners)
    x0, x1 = sorted(int(columns[corner]) for corner in corners)
    return Box(y0, x0, y1 + 1, x1 + 1)


# --------------------------------------------------------------------------------------- pages, as stored


class _Piece(NamedTuple):
    """Some bytes of a page, and what they become: samples HWS that begin at row y, column x.

    channel: of the image, where the page's planes lie one after the other.
    """

    span: Span
    channel: int
    y: int
    x: int
    decode: Callable[[bytes], Array]


class _Stored:
    """A TIFF page in tiles or strips, and the channels of it that are wanted."""

    def __init__(self, page: tifffile.TiffPage, channels: Sequence[int], read: Read, size_bytes: int) -> None:
        self._page, self._channels, self._read, self._size_bytes = page, channels, read, size_bytes
        self._is_planar = page.shaped[0] > 1
        self._planes = channels if self._is_planar else range(1)
        self._side = _side(page)
        self._grid = -(-page.imagelength // self._side[0]), -(-page.imagewidth // self._side[1])

    def pixels(self, box: Box) -> Array:
        """The pixels inside a box, not turned."""
        page = self._page
        image_HWC = np.empty((box.height, box.width, len(self._channels)), page.dtype)
        pieces = list(self._rows(box) if _is_in_rows(page) else self._segments(box))
        for batch in _batches(pieces):
            for piece, content in zip(batch, fetch(self._read, [piece.span for piece in batch]), strict=True):
                found_HWS = piece.decode(content)
                top, left = max(box.y0, piece.y), max(box.x0, piece.x)
                bottom = min(box.y1, piece.y + found_HWS.shape[0])
                right = min(box.x1, piece.x + found_HWS.shape[1])
                found_HWS = found_HWS[top - piece.y : bottom - piece.y, left - piece.x : right - piece.x]
                channel = slice(piece.channel, piece.channel + 1) if self._is_planar else slice(None)
                image_HWC[top - box.y0 : bottom - box.y0, left - box.x0 : right - box.x0, channel] = (
                    found_HWS if self._is_planar else pick(found_HWS, self._channels)
                )
        return as_shown(page, image_HWC)

    def _rows(self, box: Box) -> Iterator[_Piece]:
        """Of each row the box's columns."""
        page = self._page
        num_samples = page.shaped[4]
        assert page.dtype is not None
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        pixel_bytes = num_samples * dtype.itemsize
        for channel, plane in enumerate(self._planes):
            for y in range(box.y0, box.y1):
                row = (plane * page.imagelength + y) * page.imagewidth
                start = page.dataoffsets[0] + (row + box.x0) * pixel_bytes
                span = self._inside(start, start + box.width * pixel_bytes)
                yield _Piece(
                    span,
                    channel,
                    y,
                    box.x0,
                    lambda content: np.frombuffer(content, dtype).reshape(1, box.width, num_samples),
                )

    def _segments(self, box: Box) -> Iterator[_Piece]:
        """The tiles or strips that the box touches."""
        offsets, counts = self._page.dataoffsets, self._page.databytecounts
        (height, width), (num_rows, num_columns) = self._side, self._grid
        for channel, plane in enumerate(self._planes):
            for row in range(box.y0 // height, -(-box.y1 // height)):
                for column in range(box.x0 // width, -(-box.x1 // width)):
                    number = (plane * num_rows + row) * num_columns + column
                    if number >= min(len(offsets), len(counts)) or not offsets[number] or not counts[number]:
                        raise ImageError("decode", "the TIFF file is cut short: strips or tiles are missing")
                    span = self._inside(offsets[number], offsets[number] + counts[number])
                    yield _Piece(span, channel, row * height, column * width, self._decoder(number, row, column))

    def _decoder(self, number: int, row: int, column: int) -> Callable[[bytes], Array]:
        page = self._page
        height = min(self._side[0], page.imagelength - row * self._side[0])
        width = min(self._side[1], page.imagewidth - column * self._side[1])

        def decode(content: bytes) -> Array:
            if page.compression in JPEG_COMPRESSION:
                check_jpeg_segment(page, content)
            found, _, _ = page.decode(content, number, jpegtables=page.jpegtables)
            if found is None or found.shape[0] != 1 or found.shape[1] < height or found.shape[2] < width:
                raise ImageError("decode", f"strip or tile {number} of the TIFF holds less than {height} x {width}")
            return np.asarray(found[0, :height, :width])

        return decode

    def _inside(self, start: int, stop: int) -> Span:
        if not 0 < start < stop <= self._size_bytes:
            raise ImageError("decode", "the TIFF file is cut short: strips or tiles are missing")
        return start, stop


def _stored(page: tifffile.TiffPage, bands: Bands | None, read: Read, size_bytes: int) -> _Stored | None:
    """The page, if regions of it can be read. ImageError where it cannot be read at all."""
    refuse_fax(page)
    is_jpeg = (
        page.compression in JPEG_COMPRESSION
        and page.photometric in (1, 2, 6)
        and page.bitspersample == 8
        and page.samplesperpixel in (1, 3)
        and page.planarconfig == 1
    )
    if page.dtype is None or page.imagelength < 1 or page.imagewidth < 1 or not (is_jpeg or is_plain(page)):
        return None
    channels, side = channels_of(page, bands), _side(page)
    is_small = 0 < side[0] * side[1] <= MAX_SEGMENT_PX
    return _Stored(page, channels, read, size_bytes) if is_small or _is_in_rows(page) else None


def _is_in_rows(page: tifffile.TiffPage) -> bool:
    """Whether its samples lie in the file row by row as they are."""
    return page.is_final and not page.is_tiled


def _side(page: tifffile.TiffPage) -> tuple[int, int]:
    """Height and width of its tiles or strips."""
    if page.is_tiled:
        return page.tilelength, page.tilewidth
    return min(page.rowsperstrip, page.imagelength), page.imagewidth


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    num_bytes = 0
    for piece in pieces:
        size_bytes = piece.span[1] - piece.span[0]
        if batch and (len(batch) == BATCH_SPANS or num_bytes + size_bytes > BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(piece)
        num_bytes += size_bytes
    if batch:
        yield batch

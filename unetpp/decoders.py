"""One decoder a file format, each the strictest at hand; `unetpp.images` is the door to them.

Pillow reads every header. Pixels come from libpng (imagecodecs) and libjpeg-turbo with its warnings as errors
(simplejpeg) where Pillow would fill with black what a PNG's compressed stream leaves out, or pass over damage inside a
JPEG; both are faster, too. Functions here raise whatever their library raises, besides ImageError.
"""

import io
import re
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Final

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from unetpp.config import Bands, Pages
from unetpp.errors import ImageError

Array = npt.NDArray[Any]

FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
"""The formats that are read, by Pillow's names. Anything else is refused, whatever its file name says."""

MAX_PIXELS: Final = 178_956_970
"""Default cap on height x width: where Pillow itself begins to refuse an image as a decompression bomb."""

ORIENTATION_TAG: Final = 274

_TURNS: dict[int, Callable[[Array], Array]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}


def turn(image: Array, orientation: int) -> Array:
    """The image (HW or HWC) turned as an EXIF or TIFF orientation asks; 1 and unknown values ask for nothing."""
    return _TURNS[orientation](image) if orientation in _TURNS else image


def turned_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Height and width after `turn`."""
    return (width, height) if 5 <= orientation <= 8 else (height, width)


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise ImageError for an empty image or one above the cap."""
    if height < 1 or width < 1:
        raise ImageError("decode", f"the header says {height} x {width} pixels: there is nothing to decode")
    if height * width > max_pixels:
        raise ImageError(
            "too_large",
            f"{height} x {width} pixels is more than max_pixels, {max_pixels}; raise it if there is memory enough",
        )


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """A fresh Pillow object of a file's bytes; see `open_header`.

    Fresh on purpose: after a first load() that raised, a second one on the same object gives half-black pixels.
    """
    if not data:
        raise ImageError("decode", "the file is empty")
    return open_header(io.BytesIO(data), max_pixels)


def open_header(file: BinaryIO, max_pixels: int) -> Image.Image:
    """A Pillow object with its header read, its format allowed and its size checked."""
    # Pillow's own cap is global. Raise it to what is allowed here, so that check_size below is the one that decides;
    # never lower it (another thread may just need it) and never switch it off.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    picture = Image.open(file, formats=FORMATS)
    check_size(picture.height, picture.width, max_pixels)
    return picture


def orientation(picture: Image.Image, data: bytes) -> int:
    """EXIF orientation 1..8. EXIF that cannot be read counts as none, as in every viewer.

    data: the file, of which a PNG may have its EXIF behind the pixels; or its end, if the picture was read from a part.
    """
    try:
        if picture.format == "PNG":
            if "exif" not in picture.info and (behind := _exif_chunk(data)):
                picture.info["exif"] = behind
            exif = Image.Image.getexif(picture)  # the one of PNG decodes all pixels in search of what is behind them
        else:
            exif = picture.getexif()
        value = exif.get(ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if value in _TURNS else 1


def _exif_chunk(data: bytes) -> bytes:
    """What is in the last chunk of EXIF of a PNG or of its end, found by its name and its checksum."""
    if (name := data.rfind(b"eXIf")) < 4:
        return b""
    stop = name + 4 + int.from_bytes(data[name - 4 : name])
    is_whole = zlib.crc32(data[name:stop]) == int.from_bytes(data[stop : stop + 4])
    return data[name + 4 : stop] if is_whole else b""


def choose(image_HWC: Array, bands: Bands | None) -> Array:
    """The channels `bands`; with None the colours: 1 or 3 channels, without alpha."""
    num_channels = image_HWC.shape[2]
    if bands is None:
        return image_HWC[..., :1] if num_channels <= 2 else image_HWC[..., :3]
    check_bands(bands, num_channels)
    return image_HWC[..., list(bands)]


def check_bands(bands: Bands, num_channels: int) -> None:
    """Raise ImageError where an image does not have a channel that is asked for."""
    if max(bands) >= num_channels:
        raise ImageError(
            "decode",
            f"the image has {num_channels} channel(s), 0 to {num_channels - 1}, and bands asks for {max(bands)}",
        )


def refuse_pages(num_pages: int) -> None:
    """Raise ImageError where there are several pages and none but the first would be looked at."""
    if num_pages > 1:
        raise ImageError(
            "decode",
            f"the file has {num_pages} pages or frames, and `pages` refuses them: split it, or set pages to first",
        )


def decode_picture(data: bytes, max_pixels: int, pages: Pages = "first", bands: Bands | None = None) -> Array:
    """HWC pixels of any allowed format but TIFF, turned: the colours, or the channels `bands`."""
    picture = open_picture(data, max_pixels)
    if pages == "refuse":
        refuse_pages(getattr(picture, "n_frames", 1))
    if picture.format == "PNG":
        image = _png_pixels(data)
    elif picture.format in ("JPEG", "MPO"):
        image = _jpeg_pixels(data, picture)
    elif picture.format == "BMP" and _has_another_depth(picture, data):
        image = imagecodecs.bmp_decode(data).reshape(picture.height, picture.width, -1)[..., :1]
    else:
        _refuse_what_pillow_changes(picture)
        image = pillow_pixels(picture)
    if image.shape[:2] != (picture.height, picture.width):
        raise ImageError("decode", f"header and pixels disagree: {picture.size[::-1]} and {image.shape[:2]}")
    return turn(choose(image, bands), orientation(picture, data))


def pillow_pixels(picture: Image.Image) -> Array:
    """HWC pixels, alpha included, uint8 (uint16 for a 16-bit PGM). Loads the picture, which must be fresh."""
    mode = picture.mode
    if mode in ("1", "L"):
        return np.asarray(picture.convert("L"))[..., None]
    if mode in ("LA", "La"):
        return np.stack([np.asarray(picture.getchannel(0)), np.asarray(picture.getchannel(1))], axis=2)
    if mode in ("RGB", "RGBA", "RGBX"):
        return np.asarray(picture)
    if mode in ("P", "PA", "CMYK", "YCbCr"):
        return np.asarray(picture.convert("RGB"))
    if mode == "I" and picture.format == "PPM":
        return np.asarray(picture).astype(np.uint16)[..., None]
    raise ImageError("decode", f"{picture.format} pixels of type {mode} are not supported; convert them to grey or RGB")


def grey_bits(picture: Image.Image) -> int:
    """Bits of a sample, 1, 2, 4 or 8, of a grey picture that is not loaded yet."""
    if picture.mode == "1":
        return 1
    args: Any = picture.tile[0].args  # type: ignore[attr-defined]
    stored = args if isinstance(args, str) else str(args[0])
    return {"L;2": 2, "L;4": 4}.get(stored[:3], 8)


def _png_pixels(data: bytes) -> Array:
    if b"IEND\xaeB`\x82" not in data:
        raise ImageError("decode", "the PNG file is cut short: its end chunk is missing")
    image = imagecodecs.png_decode(data)
    return image.reshape(*image.shape[:2], -1)


_JPEG_COLORSPACES = {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}

_JPEG_UNUSUAL = re.compile(r"Adobe|SOS parameters|subsampling level")
"""What libjpeg says of headers that it can do with, for Pillow to judge. All else means that pixels were made up."""

_JPEG_MARKER = re.compile(rb"\xff([\x01-\xfe])")
_JPEG_SCAN, _JPEG_JFIF, _JPEG_ADOBE = 0xDA, 0xE0, 0xEE
_JPEG_METADATA = {*range(0xE0, 0xF0), 0xFE} - {_JPEG_ADOBE}
_PLAIN_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


def decode_jpeg_strictly(data: bytes) -> Array | None:
    """Pixels as stored: grey, RGB or CMYK. ValueError where libjpeg warns about them, None where about the header.

    It warns once a file: what it says of metadata would hide damage behind them, so they are left out then.
    """
    try:
        return _warnings_are_errors(data)
    except ValueError:
        pass
    try:
        return _warnings_are_errors(_without_metadata(data))
    except ValueError as error:
        if _JPEG_UNUSUAL.search(str(error)):
            return None
        raise


def _warnings_are_errors(data: bytes) -> Array:
    *_, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    return np.asarray(simplejpeg.decode_jpeg(data, colorspace=_JPEG_COLORSPACES.get(colorspace, "RGB")))


def _without_metadata(data: bytes) -> bytes:
    """A JPEG with nothing before its first scan but what its pixels, and their colours, depend on."""
    kept, at = [data[:2]], 2
    while found := _JPEG_MARKER.search(data, at):
        marker, start = found[1][0], found.end()
        if marker == _JPEG_SCAN:
            return b"".join(kept) + data[found.start() :]
        if marker < 0xC0 or 0xD0 <= marker < _JPEG_SCAN:  # has no size, and no place here
            break
        at = start + int.from_bytes(data[start : start + 2])
        if marker == _JPEG_JFIF and data.startswith(b"JFIF\0", start + 2):
            kept.append(_PLAIN_JFIF)  # says that colours are YCbCr
        elif marker not in _JPEG_METADATA:
            kept.append(data[found.start() : at])
    return data


def _jpeg_pixels(data: bytes, picture: Image.Image) -> Array:
    image = decode_jpeg_strictly(data)
    if image is None or image.shape[2] == 4:  # Pillow knows Adobe's inverted CMYK
        return pillow_pixels(picture)
    return image


def _has_another_depth(picture: Image.Image, data: bytes) -> bool:
    """Whether Pillow would read a BMP of a grey palette wrongly: with black and white alone as of 1 bit, else of 8."""
    bits = data[24 if data[14] == 12 else 28]
    return picture.mode in ("1", "L") and bits != (1 if picture.mode == "1" else 8)


def _refuse_what_pillow_changes(picture: Image.Image) -> None:
    """Samples that Pillow rescales or cuts to 8 bits, and run lengths that it makes up for when they are damaged."""
    tile: Any = picture.tile[0] if picture.tile else None  # type: ignore[attr-defined]
    if picture.format == "BMP" and tile.codec_name == "bmp_rle":
        raise ImageError("decode", "run-length BMP is not supported: damage in it cannot be seen; convert it to PNG")
    if picture.format == "PPM":
        full = 65535 if picture.mode == "I" else 255
        maxval = tile.args[1] if isinstance(tile.args, tuple) else full
        if maxval != full:
            raise ImageError("decode", f"PPM with values up to {maxval} is not supported; convert it to PNG or TIFF")

"""Bytes to `image_HWC` arrays and `mask_HW` arrays to PNG bytes. Opens no file and no URI.

What an array holds, whatever the file format:

| in the file                              | in the array                                                      |
|------------------------------------------|-------------------------------------------------------------------|
| 1, 2 or 4 bits of grey                   | uint8, stretched to 0..255                                        |
| 8 bits                                   | uint8, as they are                                                |
| 12 or 16 bits                            | uint16, as they are (a 12-bit file holds 0..4095)                 |
| float, signed or 32-bit integers (TIFF)  | float32, the same numbers; refused where float32 cannot hold them |
| grey; colour                             | 1 channel; 3 channels, RGB                                        |
| palette, YCbCr, CMYK                     | RGB, uint8                                                        |
| alpha                                    | dropped; colours are neither multiplied nor divided by it         |
| other channels (TIFF)                    | refused, unless `bands` names those that are wanted               |
| MinIsWhite                               | inverted, so that light is high                                   |
| EXIF or TIFF orientation                 | applied                                                           |
| several pages or frames                  | the first; with `pages` "refuse" the file is refused              |
| smaller copies (pyramid), a slide's label| not looked at; they are no pages                                  |
| GeoTIFF tags                             | kept beside the array: `unetpp.geo`                               |

What these numbers mean to a network, `ModelConfig.value_range` says by type: nothing is stretched by what an image
happens to hold.

`bands` names channels by number, from 0, in the order in which they are wanted. They are the samples of a pixel as
they are stored, interleaved or in planes, alpha included; where a TIFF has one sample a pixel and several pages, they
are its pages in the order of the file, which must be alike (C x H x W stacks, as microscopes write them).

A file that is damaged, cut short, unknown or larger than the cap raises ImageError and nothing else: an image is whole
or it is refused. Formats in which damage leaves no trace at all (fax TIFF, run-length BMP) are refused outright, as is
TIFF with the compression of another image format than JPEG; in GIF, WebP, LZW and uncompressed files a changed byte can
still go unseen.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from unetpp.config import Bands, Pages
from unetpp.decoders import (
    FORMATS,
    MAX_PIXELS,
    decode_picture,
    grey_bits,
    open_picture,
    orientation,
    turn,
)
from unetpp.errors import ImageError
from unetpp.tiff import decode_tiff, is_tiff

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.uint8]


class Decoded(NamedTuple):
    """What is in an image file.

    image_HWC: uint8, uint16 or float32, contiguous, writable. geo: where on Earth it is, JSON of `unetpp.geo`, of a
    TIFF that says so.
    """

    image_HWC: Array
    geo: str | None


def read_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, pages: Pages = "first", bands: Bands | None = None
) -> Decoded:
    """The image in `data`, with 1 or 3 channels, or with those that `bands` names.

    Raises ImageError: `too_large` when height x width is above `max_pixels` (checked on the header, before any pixel
    is decoded) or memory runs out, `decode` for everything else.
    """
    with failures_as_image_errors():
        if is_tiff(data):
            image, geo = decode_tiff(data, max_pixels, pages, bands)
        else:
            image, geo = decode_picture(data, max_pixels, pages, bands), None
        return Decoded(np.require(image, requirements=["C", "W", "O"]), geo)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, bands: Bands | None = None) -> Array:
    """The pixels that `read_image` gives."""
    return read_image(data, max_pixels=max_pixels, bands=bands).image_HWC


def to_channels(image_HWC: Array, num_channels: int) -> Array:
    """The image with `num_channels` channels, in its own type.

    Grey becomes RGB by repetition, RGB becomes grey by ITU-R BT.601 luma (0.299, 0.587, 0.114), rounded for integers;
    so grey -> RGB -> grey is the identity. Raises ImageError for any other pair.
    """
    have = image_HWC.shape[2]
    if have == num_channels:
        return image_HWC
    if have == 1 and num_channels == 3:
        return np.repeat(image_HWC, 3, axis=2)
    if have == 3 and num_channels == 1:
        luma = (image_HWC.astype(np.float64) @ np.array([299.0, 587.0, 114.0]) / 1000)[..., None]
        return (luma if image_HWC.dtype.kind == "f" else np.rint(luma)).astype(image_HWC.dtype)
    raise ImageError("decode", f"the image has {have} channels and the model wants {num_channels}")


def encode_image(image_HWC: Array) -> bytes:
    """PNG bytes of an image of 1 or 3 channels, uint8 or uint16; the same image gives the same bytes."""
    return bytes(imagecodecs.png_encode(image_HWC, level=4))


def encode_mask(mask_HW: Mask, num_classes: int = 1) -> bytes:
    """PNG bytes of a mask of class ids; the same mask gives the same bytes.

    With `num_classes` 1 the mask is 0 or 1 and becomes 8-bit grey, 0 and 255, that any viewer shows. With more, ids
    0..num_classes-1 become the indices of a palette whose colour 0 is black.
    """
    assert (mask_HW.ndim, mask_HW.dtype) == (2, np.uint8), (mask_HW.shape, mask_HW.dtype)
    assert mask_HW.max() < max(num_classes, 2), (mask_HW.max(), num_classes)
    if num_classes == 1:
        return bytes(imagecodecs.png_encode(mask_HW * np.uint8(255), level=4, filter=0))
    picture = Image.fromarray(mask_HW, mode="L")
    picture.putpalette(_palette(num_classes))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=4, bits=8)
    return buffer.getvalue()


def decode_mask(data: bytes, num_classes: int = 1, *, ignore: int | None = None, max_pixels: int = MAX_PIXELS) -> Mask:
    """Class ids `mask_HW`, uint8, from an image file of labels: the inverse of `encode_mask`, and a bit more.

    With `num_classes` 1 every pixel that is not 0 in some channel is foreground, 1. With more, ids are a palette
    file's indices or a grey file's values; of 1, 2 or 4 bits the values before they are stretched.

    `ignore` (usually 255) is a value that says "not labelled": it is allowed beside the classes, and kept. With
    `num_classes` 1 it is no foreground then, so that a mask of 0 and 255 has foreground without `ignore` and none with
    `ignore` 255. A palette file has the value as an index, any other in every channel.

    Raises ImageError as `decode_image` does, and where a value is no id.
    """
    image = decode_image(data, max_pixels=max_pixels)
    if image.shape[2] == 1 and image.dtype == np.uint8:
        image //= _stretch(data, max_pixels)
    if num_classes == 1:
        mask = np.asarray(image.any(axis=2), dtype=np.uint8)
        if ignore is not None:
            mask[_is_ignored(image, data, ignore, max_pixels)] = ignore
        return mask
    ids = image[..., 0] if image.shape[2] == 1 else _palette_indices(data, max_pixels)
    classes = ids if ignore is None else ids[ids != ignore]
    wrong = classes[(classes < 0) | (classes >= num_classes) | (classes % 1 != 0)]
    if wrong.size:
        also = "" if ignore is None else f", or {ignore}, which is ignored"
        raise ImageError("decode", f"mask ids must be 0 to {num_classes - 1}{also}, this mask has {wrong.max():.9g}")
    return np.ascontiguousarray(ids, dtype=np.uint8)


def _stretch(data: bytes, max_pixels: int) -> np.uint8:
    """What the values of a grey file were multiplied by when it was decoded."""
    try:
        return np.uint8(255 // (2 ** grey_bits(open_picture(data, max_pixels)) - 1))
    except Exception:  # a TIFF that Pillow does not know, whose samples are as they are
        return np.uint8(1)


def _is_ignored(image: Array, data: bytes, ignore: int, max_pixels: int) -> npt.NDArray[np.bool_]:
    """Where the file says `ignore`: an index where it is a palette file, else a value in every channel."""
    if image.shape[2] > 1:
        with failures_as_image_errors():
            is_palette = open_picture(data, max_pixels).mode == "P"
        if is_palette:
            return np.asarray(_palette_indices(data, max_pixels) == ignore)
    return np.asarray((image == ignore).all(axis=2))


def _palette_indices(data: bytes, max_pixels: int) -> Array:
    """Indices of a palette file that the strict decoders have already found whole: they give its colours only."""
    with failures_as_image_errors():
        picture = open_picture(data, max_pixels)
        if picture.mode != "P":
            raise ImageError("decode", "a mask of several classes must be a grey or palette image, not RGB")
        indices = np.asarray(picture)
        return indices if is_tiff(data) else turn(indices, orientation(picture, data))  # Pillow has turned a TIFF


def _palette(num_classes: int) -> bytes:
    """RGB of every class id: black, then hues a golden angle apart, so that neighbours differ."""
    hue = (np.arange(num_classes) * 0.618033988749895) % 1.0 * 6.0
    rgb = np.stack([np.abs(hue - 3) - 1, 2 - np.abs(hue - 2), 2 - np.abs(hue - 4)], axis=1)
    colours = np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    colours[0] = 0
    return colours.tobytes()


@contextmanager
def failures_as_image_errors() -> Iterator[None]:
    """The boundary around decoders: they fail in many ways on bad bytes, callers see one."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("decode", f"no {', '.join(FORMATS)} file, or its header is damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", " ".join(str(error).split())) from error
    except MemoryError as error:
        raise ImageError("too_large", "decoding it needs more memory than there is") from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ImageError("decode", f"the image is damaged or unsupported: {type(error).__name__}: {text}") from error

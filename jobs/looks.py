"""One look at every image and mask of a labelled set: what they hold, and what is wrong with each by itself."""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jobs.contract import InspectConfig
from jobs.labelled import Sample
from jobs.neighbours import Borders, borders_of
from jobs.samples import Encoded, readers
from unetpp.errors import ImageError
from unetpp.images import decode_image, decode_mask

logger = logging.getLogger(__name__)

NUM_READERS = 8
LOG_EVERY_S = 5.0
NARROW_SHARE = 0.05
"""An image whose values span less of the value range than this is dark, flat, or stored in a type that is too wide."""


@dataclass
class Look:
    """What was seen of one sample. `faults` holds a sentence by code; what could not be seen keeps its default."""

    sample: Sample
    faults: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    pixel_type: str = ""
    low: float = float("nan")
    high: float = float("nan")
    mean: float = float("nan")
    digest: bytes = b""
    borders: Borders | None = None
    foreground: float = float("nan")

    @property
    def is_image(self) -> bool:
        """Whether the image could be decoded."""
        return self.size is not None


def look_at(samples: Sequence[Sample], config: InspectConfig) -> list[Look]:
    """Look at every sample, several at a time; the looks are in the order of `samples`."""
    looks: list[Look] = [Look(sample) for sample in samples]
    ahead: deque[Future[None]] = deque()
    told = time.monotonic()
    with ThreadPoolExecutor(NUM_READERS) as pool:
        for number, (position, read) in enumerate(readers(samples)):
            ahead.append(pool.submit(_look, looks[position], read, config))
            if len(ahead) > 2 * NUM_READERS:
                ahead.popleft().result()
            if time.monotonic() - told > LOG_EVERY_S:
                told = time.monotonic()
                logger.info("looked at %d of %d images", number, len(samples))
        for future in ahead:
            future.result()
    return looks


def _look(look: Look, read: Callable[[], Encoded], config: InspectConfig) -> None:
    """Fill in a look. What is wrong is a fault, not an error."""
    try:
        encoded = read()
    except ImageError as error:
        look.faults["undecodable_image"] = error.detail
        return
    try:
        _look_at_image(look, encoded.image_HWC(config.bands), config)
    except ImageError as error:
        look.faults["undecodable_image"] = error.detail
    look.faults |= dict(_mask_faults(look, encoded, config))


def _look_at_image(look: Look, image_HWC: NDArray[np.generic], config: InspectConfig) -> None:
    height, width, channels = image_HWC.shape
    look.size = (height, width)
    look.pixel_type = f"{image_HWC.dtype} x {channels}"
    look.low, look.high = float(image_HWC.min()), float(image_HWC.max())
    look.mean = float(image_HWC.mean(dtype=np.float64))
    look.digest = hashlib.sha256(repr((image_HWC.shape, str(image_HWC.dtype))).encode() + image_HWC.tobytes()).digest()
    look.borders = borders_of(image_HWC)
    low, high = getattr(config.value_range, str(image_HWC.dtype))
    if not (look.low >= low and look.high <= high):  # true of NaN, too
        look.faults["beyond_range"] = f"values from {look.low:g} to {look.high:g}, the range is {low:g} to {high:g}"
    elif look.high - look.low < NARROW_SHARE * (high - low):
        share = (look.high - look.low) / (high - low)
        look.faults["narrow_range"] = f"values from {look.low:g} to {look.high:g}, {share:.1%} of {low:g} to {high:g}"


def _mask_faults(look: Look, encoded: Encoded, config: InspectConfig) -> Iterator[tuple[str, str]]:
    try:
        target_HW = encoded.mask_HW(config.num_classes, config.ignore_index)
    except ImageError as error:
        yield ("wrong_class" if _is_mask(encoded) else "undecodable_mask"), error.detail
        return
    if look.size is not None and look.size != target_HW.shape:
        (height, width), (mask_height, mask_width) = look.size, target_HW.shape
        yield "size_mismatch", f"the mask is {mask_height} x {mask_width}, the image {height} x {width}"
    counts = np.bincount(target_HW.ravel(), minlength=256)
    if config.ignore_index is not None:
        counts[config.ignore_index] = 0
    num_labelled, num_background = int(counts.sum()), int(counts[0])
    look.foreground = 1 - num_background / num_labelled if num_labelled else float("nan")
    if not num_labelled:
        yield "unlabelled_mask", f"every pixel is {config.ignore_index}, the ignore_index"
    elif num_labelled == num_background:
        yield "empty_mask", "every labelled pixel is background"
    elif np.count_nonzero(counts) == 1:
        yield "full_mask", f"every labelled pixel is of class {int(counts.argmax())}"
    if config.num_classes == 1 and encoded.mask is not None:
        odd = sorted(_values(encoded.mask) - {0, 1, 255, config.ignore_index})
        if odd:
            yield "odd_values", f"it holds {', '.join(f'{value:g}' for value in odd[:5])}" + ", ..." * (len(odd) > 5)


def _is_mask(encoded: Encoded) -> bool:
    """Whether a mask can be decoded at all, whatever its classes."""
    try:
        encoded.mask_HW(1, None)
    except ImageError:
        return False
    return True


def _values(mask: bytes) -> set[float]:
    """The distinct values of a mask's file: the indices of a palette file, else those of any channel."""
    try:
        return set(np.unique(decode_mask(mask, 256)).tolist())
    except ImageError:  # a colour file, or values above 255
        return set(np.unique(decode_image(mask)).tolist())

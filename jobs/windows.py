"""Huge images as windows: adjacent rows of the manifest, each with a mask of its own.

```
plan    header read -> size -> windows on a grid of window_px, each a manifest row
read    window + halo, clipped at the image's border -> the bytes of the tiles that it touches -> pixels
predict the window inside of what was read: exactly what the whole image's mask has there
```
A window that fails is a row like any other. `jobs.assemble` puts the masks together again.
"""

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

from jobs import members, storage
from jobs.archives import location
from jobs.contract import PredictConfig
from jobs.guarded import DecodePool, Measure
from jobs.manifest import Listed, ManifestRow
from jobs.ranged import Ranged
from unetpp.config import Bands, ModelConfig
from unetpp.errors import ImageError
from unetpp.spans import BLOCK_BYTES, Span
from unetpp.tiles import Box

logger = logging.getLogger(__name__)

LARGE_BYTES = 16 << 20
"""Of a file that is no TIFF: from here on its header is read at planning."""
TIFF_NAMES = (".tif", ".tiff", ".svs", ".btf", ".tf8")
MAX_WINDOWS = 100_000
"""An image of more is left whole, and becomes a too_large row."""
NUM_CHILDREN = 4


class Reading(NamedTuple):
    """What is read of an image for one of its windows, and where the window lies in it."""

    outer: Box
    kept: Box


def grid(height: int, width: int, window_px: int) -> list[Box]:
    """The windows of an image, row by row; one where the image is no larger than `window_px`."""
    return [
        Box(y, x, min(y + window_px, height), min(x + window_px, width))
        for y in range(0, height, window_px)
        for x in range(0, width, window_px)
    ]


def reading(row: ManifestRow, model: ModelConfig) -> Reading | None:
    """What to read for the mask of a row's window; None for an image that is not cut.

    The halo lies around it where the image goes on, and the corner on the grid that images are padded to: so tiles,
    padding and what the network sees are those of the whole image.
    """
    if row.num_windows == 1:
        return None
    y0 = max(0, row.window_y - model.halo_px) // model.pad_multiple * model.pad_multiple
    x0 = max(0, row.window_x - model.halo_px) // model.pad_multiple * model.pad_multiple
    y1, x1 = row.window_y + row.window_h, row.window_x + row.window_w
    outer = Box(y0, x0, min(row.height, y1 + model.halo_px), min(row.width, x1 + model.halo_px))
    return Reading(outer, Box(row.window_y - y0, row.window_x - x0, y1 - y0, x1 - x0))


class Headers:
    """Reads the sizes of stored images, many at a time, in processes that may die of it."""

    def __init__(self, sources: Sequence[str], config: PredictConfig, bands: Bands | None) -> None:
        self._sources = sources
        self._decoders = DecodePool.of(config, bands, NUM_CHILDREN)
        self._threads = storage.io_threads()

    def windows_of(self, images: Sequence[Listed], window_px: int) -> list[list[Box]]:
        """The windows of each image; none for one that is left whole: small, not to be measured, or in an archive.

        What is wrong with an image is said when it is read, not here.
        """
        return list(self._threads.map(lambda found: self._windows(found, window_px), images))

    def _windows(self, found: Listed, window_px: int) -> list[Box]:
        if found.archive_etag or members.refusal(found.etag, found.position) is not None:
            return []
        if not found.key.lower().endswith(TIFF_NAMES) and found.size_bytes <= LARGE_BYTES:
            return []
        try:
            measure = self._measure(found)
        except ImageError as error:
            logger.info("%s is not cut into windows: %s", found.key, error.detail)
            return []
        num_windows = -(-measure.height // window_px) * -(-measure.width // window_px)
        if not measure.fits or not 1 < num_windows <= MAX_WINDOWS:
            return []
        return grid(measure.height, measure.width, window_px)

    def _measure(self, found: Listed) -> Measure:
        uri = location(self._sources[found.source], found)
        head = b""  # read before a child is taken: most headers lie there, and children are few
        if found.size_bytes:
            head = storage.read_range(uri, 0, min(BLOCK_BYTES, found.size_bytes), found.etag)

        def read(spans: Sequence[Span]) -> Sequence[bytes]:
            return [
                head[start:stop] if stop <= len(head) else storage.read_range(uri, start, stop, found.etag)
                for start, stop in spans
            ]

        return self._decoders.measure(Ranged(f"{uri}\0{found.etag}", found.size_bytes, read))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._decoders.close()

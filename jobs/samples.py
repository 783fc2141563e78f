"""How the samples of a labelled set are listed and read, whatever its form."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs import coco, coco_shapes, labelled_folder, labelled_parquet, storage
from jobs.labelled import Listed, Listing, Sample
from unetpp.config import Bands
from unetpp.errors import ImageError
from unetpp.images import decode_image, decode_mask


class Encoded(NamedTuple):
    """A sample as it is stored: the bytes of its image, and of its mask; None for a mask that is drawn from shapes."""

    sample: Sample
    image: bytes
    mask: bytes | None

    def image_HWC(self, bands: Bands | None = None) -> NDArray[np.generic]:
        """The decoded image, or its channels `bands`. ImageError where it is none, or lacks them."""
        return decode_image(self.image, bands=bands)

    def mask_HW(self, num_classes: int, ignore: int | None) -> NDArray[np.uint8]:
        """The mask's class ids. ImageError where it is none, or holds a class that is not below `num_classes`."""
        if self.mask is not None:
            return decode_mask(self.mask, num_classes, ignore=ignore)
        assert self.sample.coco is not None
        return coco_shapes.draw_mask(self.sample.coco, num_classes, ignore=ignore)


def list_samples(listing: Listing, split_column: str) -> Listed:
    """The samples of a set, and what is wrong with it. ConfigError where it cannot be listed at all."""
    list_form = {
        "folder": labelled_folder.list_samples,
        "coco": coco.list_samples,
        "parquet": labelled_parquet.list_samples,
    }
    return list_form[listing.form](listing, split_column)


def readers(samples: Sequence[Sample]) -> Iterator[tuple[int, Callable[[], Encoded]]]:
    """(position in `samples`, function that reads it) of every sample of a set, in the order in which that costs least.

    The functions are for threads; they raise ImageError where the object is gone or another one by now, or null.
    """
    if samples and samples[0].row is not None:
        for position, row in labelled_parquet.read(samples):
            yield position, partial(_from_row, samples[position], row)
    else:
        for position, sample in enumerate(samples):
            yield position, partial(_from_files, sample)


def _from_files(sample: Sample) -> Encoded:
    mask = storage.read_bytes(sample.mask_uri, sample.mask_etag) if sample.coco is None else None
    return Encoded(sample, storage.read_bytes(sample.image_uri, sample.image_etag), mask)


def _from_row(sample: Sample, row: labelled_parquet.StoredRow) -> Encoded:
    if row.image is None or row.mask is None:
        raise ImageError("decode", f"its {'image' if row.image is None else 'mask'} is null")
    return Encoded(sample, row.image, row.mask)

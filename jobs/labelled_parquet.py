"""Labelled sets in Parquet: a row an image, with the columns `id`, `image` and `mask` (the bytes of image files).

A split column (`split`) may be there, and any columns of text, numbers or booleans to group by. Files are read a row
group at a time, so that a set is never in memory as a whole: write some dozens of images into one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import storage
from jobs.labelled import Listed, Listing, ParquetRow, Sample, groups_of, hashed_split, without_split
from unetpp.errors import ConfigError

BATCH_ROWS = 16
BUFFER_BYTES = 4 << 20


class StoredRow(NamedTuple):
    """The bytes of a row's image and mask; None for a null."""

    image: bytes | None
    mask: bytes | None


def list_samples(listing: Listing, split_column: str) -> Listed:
    """The rows of all files. ConfigError where columns are absent or of a wrong type, or an id is there twice."""
    samples: dict[str, Sample] = {}
    first: list[str] | None = None
    for key, etag in sorted(listing.objects.items()):
        uri = storage.join(listing.root, key)
        with _opened(uri, etag) as file:
            columns = _plain_columns(file.schema_arrow, uri)
            if (first := first or columns) != columns:
                raise ConfigError(f"{uri} has the columns {', '.join(columns)}, the first file {', '.join(first)}")
            for row_group in range(file.num_row_groups):
                for number, row in enumerate(_rows(file, row_group, columns, uri)):
                    sample = _sample(
                        listing, row, ParquetRow(uri=uri, etag=etag, row_group=row_group, row=number), split_column
                    )
                    if (other := samples.setdefault(sample.id, sample)) is not sample:
                        raise ConfigError(
                            f"the id {sample.id!r} is there twice: {other.image_uri} and {sample.image_uri}"
                        )
    found = [samples[id_] for id_ in sorted(samples)]
    lacking = [sample.id for sample in found if not sample.split]
    problems = tuple(without_split(listing, lacking, split_column, "their rows"))
    return Listed(tuple(sample for sample in found if sample.split), problems)


def _sample(listing: Listing, row: Mapping[str, str], place: ParquetRow, split_column: str) -> Sample:
    id_ = row["id"]
    return Sample(
        id=id_,
        image_uri=f"{place.uri}#{id_}/image",
        mask_uri=f"{place.uri}#{id_}/mask",
        split=row[split_column] if split_column in row else hashed_split(listing, id_, split_column),
        groups=groups_of(dict(row), split_column),
        row=place,
    )


def _plain_columns(schema: pa.Schema, uri: str) -> list[str]:
    """The columns to list samples by: id, split and groups."""
    for name in ("image", "mask"):
        if name not in schema.names or not _is_binary(schema.field(name).type):
            seen = schema.field(name).type if name in schema.names else "not there"
            raise ConfigError(f"{uri}: column {name} is {seen}; wanted binary, the bytes of an image file")
    names = [field.name for field in schema if _is_plain(field.type)]
    if "id" not in names:
        raise ConfigError(f"{uri} has no column id of text or whole numbers; it has {', '.join(schema.names)}")
    return sorted(names)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_plain(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    return any(test(kind) for test in tests)


def _rows(file: pq.ParquetFile, row_group: int, columns: list[str], uri: str) -> Iterator[dict[str, str]]:
    for row in file.read_row_group(row_group, columns=columns).to_pylist():
        if row["id"] is None:
            raise ConfigError(f"{uri} has a row without an id, in row group {row_group}; every row needs one")
        yield {name: "" if value is None else str(value) for name, value in row.items()}


def read(samples: Sequence[Sample]) -> Iterator[tuple[int, StoredRow]]:
    """(position in `samples`, bytes) of every sample, in the order in which they are stored."""
    wanted: dict[tuple[str, str], dict[int, dict[int, int]]] = {}
    for position, sample in enumerate(samples):
        assert sample.row is not None
        groups = wanted.setdefault((sample.row.uri, sample.row.etag), {})
        groups.setdefault(sample.row.row_group, {})[sample.row.row] = position
    for (uri, etag), groups in sorted(wanted.items()):
        with _opened(uri, etag) as file:
            for row_group, positions in sorted(groups.items()):
                number, last = 0, max(positions)
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[row_group], columns=["image", "mask"]):
                    for image, mask in zip(batch["image"], batch["mask"], strict=True):
                        if number in positions:
                            yield positions[number], StoredRow(image.as_py(), mask.as_py())
                        number += 1
                    if number > last:
                        break


@contextmanager
def _opened(uri: str, etag: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of this version. ConfigError where it is no Parquet, or another version by now."""
    found = storage.find(uri)
    if found is None or found.etag != etag:
        raise ConfigError(f"{uri} was replaced or deleted after it was listed; start again, when nobody writes it")
    with storage.arrow(uri) as (filesystem, path):
        try:
            file = pq.ParquetFile(path, filesystem=filesystem, pre_buffer=False, buffer_size=BUFFER_BYTES)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{uri} is no Parquet file: {error}") from None
        with file:
            yield file

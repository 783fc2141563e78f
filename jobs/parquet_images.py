"""Parquet files with a column of image bytes: a row is an image, read row by row, never a row group at once."""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.members import Limits, Member, name_of, refused, rest, sha256

IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "content")
NAME_COLUMNS = ("key", "id", "name", "file_name", "filename", "path")
BROKEN = (OSError, pa.ArrowException, KeyError, ValueError)
"""What pyarrow raises for a file that is none, or damaged; the store has errors of its own."""
BUFFER_BYTES = 8 << 20
"""Of a column of a row group, read at once."""


class Columns(NamedTuple):
    """The columns with images and, if any, with their names; None: found by their usual names."""

    image: str | None = None
    name: str | None = None


def index(stream: BinaryIO, archive_bytes: int, columns: Columns, limits: Limits) -> Iterator[Member]:
    """Every row with its name and SHA-256. Last what is left out, if anything is."""
    row, total, max_bytes = 0, 0, limits.max_bytes(archive_bytes)
    try:
        file = _open(stream)
        if (image := _image_column(file.schema_arrow, columns.image)) is None:
            yield rest("table", 0)
            return
        if lacks_names(file.schema_arrow, columns):
            yield rest("names", 0)
            return
        name = _name_column(file.schema_arrow, columns.name)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > max_bytes:
            yield rest("bomb", 0)
            return
        for value, told in _values(file, image, name):
            member = _member(value, told, row, limits, is_named=name is not None)
            total += member.size_bytes
            if row == limits.max_members or total > max_bytes:
                yield rest("count" if row == limits.max_members else "bomb", row)
                return
            yield member
            row += 1
    except BROKEN:
        yield rest("rows", row)


def has_images(schema: pa.Schema, columns: Columns) -> bool:
    """Whether a column of image bytes is there."""
    return _image_column(schema, columns.image) is not None


def lacks_names(schema: pa.Schema, columns: Columns) -> bool:
    """Whether a column of names was asked for that is not there."""
    return columns.name is not None and columns.name not in schema.names


def read(stream: BinaryIO, rows: Sequence[int], columns: Columns) -> Iterator[bytes | None]:
    """The images of some rows, in rising order; None from where the file makes no sense."""
    wanted = iter(rows)
    num_read = 0
    try:
        file = _open(stream)
        image = _image_column(file.schema_arrow, columns.image) or ""
        row, start = next(wanted, None), 0
        for group in range(file.metadata.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            for at, (value, _) in enumerate(_values(file, image, None, [group]) if _is_below(row, stop) else (), start):
                if at == row:
                    num_read += 1
                    yield _bytes_of(value)
                    row = next(wanted, None)
                    if not _is_below(row, stop):
                        break
            start = stop
    except BROKEN:
        pass
    for _ in range(len(rows) - num_read):
        yield None


def _member(value: Any, told: Any, row: int, limits: Limits, *, is_named: bool) -> Member:
    name = _name(value, told, row, is_named)
    content = _bytes_of(value)
    if content is None:
        return Member(name, refused("empty"), 0, row)
    if len(content) > limits.max_member_bytes:
        return Member(name, refused("size"), len(content), row)
    return Member(name, sha256(content), len(content), row)


def _name(value: Any, told: Any, row: int, is_named: bool) -> str:
    """A row's name: what the column of names says, else the path of the image, else the row's number.

    The number of a row is no other's name: beside names it is written as none can be, beside paths a path of digits is
    none.
    """
    inner = value.get("path") if isinstance(value, dict) else None
    told = inner if told is None else told
    name = "" if told in (None, "") else name_of(str(told).encode("utf-8", "surrogatepass"))[0]
    if is_named:
        return name or f"%row{row}"
    return str(row) if not name or name.isdecimal() else name


def _open(stream: BinaryIO) -> pq.ParquetFile:
    # With pre_buffer, the default, a column of a row group would be read in one piece.
    return pq.ParquetFile(pa.PythonFile(stream, mode="r"), buffer_size=BUFFER_BYTES, pre_buffer=False)


def _values(
    file: pq.ParquetFile, image: str, name: str | None, groups: list[int] | None = None
) -> Iterator[tuple[Any, Any]]:
    """(image, name) of each row. One by one: a dictionary of one huge value makes of every row a copy of it."""
    columns = [image] if name is None else [image, name]
    for batch in file.iter_batches(1, row_groups=groups, columns=columns, use_threads=False):
        yield batch.column(image)[0].as_py(), None if name is None else batch.column(name)[0].as_py()


def _is_below(row: int | None, stop: int) -> bool:
    return row is not None and row < stop


def _bytes_of(value: Any) -> bytes | None:
    """An image as it is stored: bytes, or `{bytes, path}`, as data sets of images often have it."""
    found = value.get("bytes") if isinstance(value, dict) else value
    return found if isinstance(found, bytes) else None


def _image_column(schema: pa.Schema, asked: str | None) -> str | None:
    for name in (asked,) if asked else IMAGE_COLUMNS:
        if name in schema.names and _holds_bytes(schema.field(name).type):
            return name
    return None


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _name_column(schema: pa.Schema, asked: str | None) -> str | None:
    return asked or next((name for name in NAME_COLUMNS if name in schema.names), None)


def schema_of(content: BinaryIO) -> pa.Schema | None:
    """The columns of a Parquet file; None for a file that is none."""
    try:
        return _open(content).schema_arrow
    except BROKEN:
        return None


def rows(content: BinaryIO) -> Iterator[dict[str, Any]]:
    """Every row of a Parquet file without images."""
    for batch in _open(content).iter_batches(1000, use_threads=False):
        yield from batch.to_pylist()

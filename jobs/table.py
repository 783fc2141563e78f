"""Reading the table of masks: its parts, and the newest row of every image.

`<output>/table` is plain hive-partitioned Parquet: `pyarrow.dataset.dataset(uri, partitioning="hive")`, DuckDB, Polars
and Spark read it as is. A part is there whole or not at all, so every row that is there counts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import sink, storage
from jobs.manifest import identity
from jobs.sink import Footer

PARTS_AT_ONCE = 64

PLACE = ["source_uri", "key", "window_y", "window_x"]
GRID = ["etag", "num_windows", "window_px"]


class Part(NamedTuple):
    """One committed shard."""

    uri: str
    run: str
    shard: int
    etag: str
    size_bytes: int


def list_parts(output: str, digest: str | None, run: str | None = None) -> list[Part]:
    """The committed parts of a model (None: of every one), or of one of its runs, in the order of run and shard."""
    root = storage.join(output, "table", *([] if digest is None else [sink.model_folder(digest)]))
    where = root if run is None else storage.join(root, f"run={run}")
    parts = []
    for found in storage.list_objects(where, missing_ok=True):
        folder, _, name = found.key.rpartition("/")
        number = name.removeprefix("part-").removesuffix(".parquet")
        if name.endswith(".parquet") and number.isdecimal():
            run_id = run or folder.rpartition("run=")[2]
            parts.append(Part(storage.join(where, found.key), run_id, int(number), found.etag, found.size_bytes))
    return sorted(parts, key=lambda part: (part.run, part.shard))


def has_masks(output: str, digest: str | None = None) -> bool:
    """Whether anything of a model is in the output; None: of any model."""
    folder = storage.join(output, "table", *([] if digest is None else [sink.model_folder(digest)]))
    return next(storage.list_objects(folder, missing_ok=True), None) is not None


def read_footers(parts: Sequence[Part]) -> list[Footer]:
    """The footer of each part. StorageError where a file is no part."""
    if not parts:
        return []
    with storage.arrow(parts[0].uri) as (filesystem, _), storage.io_threads() as threads:

        def read(part: Part) -> Footer:
            path = storage.plain(part.uri).removeprefix("s3://")
            return sink.read_footer(pq.read_metadata(path, filesystem=filesystem), part.uri)

        return list(threads.map(read, parts))


def scan(parts: Sequence[Part], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of `parts`, in their order, few parts in memory at a time."""
    for _, rows in scan_parts(parts, columns):
        yield from rows.to_batches()


def scan_parts(parts: Sequence[Part], columns: Sequence[str]) -> Iterator[tuple[Part, pa.Table]]:
    """Each of `parts` with its rows, in their order, few parts in memory at a time."""
    schema = pa.schema([sink.SCHEMA.field(name) for name in columns])

    def read(part: Part) -> pa.Table:
        path = storage.plain(part.uri).removeprefix("s3://")
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            return file.read(schema.names).select(schema.names).cast(schema)

    remaining = iter(parts)
    while some := list(islice(remaining, PARTS_AT_ONCE)):
        # pyarrow's own dataset scanner reads ahead without a bound on memory.
        with storage.arrow(some[0].uri) as (filesystem, _), storage.io_threads() as threads:
            yield from zip(some, threads.map(read, some), strict=True)


def read_rows(parts: Sequence[Part], columns: Sequence[str]) -> pa.Table:
    """The rows of `parts`, in their order."""
    schema = pa.schema([sink.SCHEMA.field(name) for name in columns])
    return pa.Table.from_batches(scan(parts, columns), schema)


def read_masks(output: str, model: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The newest row of every image (and window), failed ones included, with its `run`; newest first.

    The windows of an image are those of its newest version and grid: older ones are not mixed in.

    Args:
        output: the output of the runs.
        model: the digest, whole or its first ten digits, of the model whose rows count; None: those of every model.
        columns: columns wanted, of `jobs.sink.SCHEMA`; default: all.
    """
    by_run = parts_by_run(list_parts(storage.canonical(output), model))
    wanted = list(columns or sink.SCHEMA.names)
    names = list(dict.fromkeys([*wanted, *PLACE, *GRID]))
    newest_only = NewestOnly()
    newest = [read_rows([], wanted).append_column("run", pa.array([], pa.string()))]
    for run in sorted(by_run, reverse=True):
        for batch in scan(by_run[run], names):
            rows = batch.select([*PLACE, *GRID]).to_pylist()
            fresh = [number for number, row in enumerate(rows) if newest_only.takes(row)]
            chosen = pa.Table.from_batches([batch.take(pa.array(fresh, pa.int64()))]).select(wanted)
            newest.append(chosen.append_column("run", pa.array([run] * len(fresh), pa.string())))
    return pa.concat_tables(newest)


class NewestOnly:
    """Tells, of rows that come newest first, which are the newest of their image, or of a window of its newest grid."""

    def __init__(self) -> None:
        self._grids: dict[bytes, bytes] = {}
        self._windows: set[bytes] = set()

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether no newer row stands in its place."""
        image = identity(row["source_uri"], row["key"], "")
        is_window = row["num_windows"] > 1
        grid = identity("", "", row["etag"], row["num_windows"], row["window_px"]) if is_window else b""
        if image in self._grids and (not is_window or self._grids[image] != grid):
            return False
        self._grids[image] = grid
        window = identity(row["source_uri"], row["key"], "", row["window_y"], row["window_x"]) if is_window else b""
        if window in self._windows:
            return False
        if is_window:
            self._windows.add(window)
        return True


def newest_view(output: str, model: str | None = None, name: str = "masks") -> str:
    """SQL that makes a DuckDB view of what `read_masks` reads: `duckdb.sql(newest_view(output, model))`.

    Args:
        output: the output of the runs; for s3:// DuckDB wants its httpfs extension and a secret of its own.
        model: the digest, whole or its first ten digits, of the model whose rows count; None: those of every model.
        name: the view's name.
    """
    root = re.sub(r"[\[*?]", r"[\g<0>]", storage.canonical(output))  # no globs, whatever the output is called
    folder = "*" if model is None else sink.model_folder(model)
    files = storage.join(root, "table", folder, "*", "*.parquet")
    place, image = ", ".join(PLACE), ", ".join(PLACE[:2])
    grid = f"struct_pack({', '.join(GRID)})"
    return (
        f"create or replace view {name} as select * from read_parquet('{files.replace(chr(39), chr(39) * 2)}', "
        f"hive_partitioning = true) qualify row_number() over (partition by {place} order by run desc) = 1 "
        f"and {grid} = first_value({grid}) over (partition by {image} order by run desc)"
    )


def parts_by_run(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """The parts of each run, in their order."""
    by_run: dict[str, list[Part]] = {}
    for part in parts:
        by_run.setdefault(part.run, []).append(part)
    return by_run

"""What a compaction copies: which rows of which parts, in which shards, and the manifest of its run."""

import math
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs import manifest, storage, table
from jobs.manifest import identity
from jobs.run_records import RunRecord
from jobs.runs import Archive
from jobs.table import GRID, PLACE, NewestOnly, Part
from unetpp.errors import StorageError


class Piece(NamedTuple):
    """Rows of a part that are the newest of their image."""

    part: Part
    rows: NDArray[np.int64]


def newest(
    parts: dict[str, list[Part]], chosen: Collection[str], others: Collection[str], *, before: str
) -> list[Piece] | None:
    """The rows of the chosen runs that are the newest of their image, or of a window of its newest grid.

    In the runs before one, oldest run first.

    None where one of the `others`, runs of other models, has a newer one.
    """
    newest_only, seen_elsewhere = NewestOnly(), set[bytes]()
    by_run: list[list[Piece]] = []
    for run in sorted((run for run in parts if run < before), reverse=True):
        pieces = []
        for part, rows in table.scan_parts(parts[run], [*PLACE, *GRID]):
            fresh = []
            for number, row in enumerate(rows.to_pylist()):
                image = identity(row["source_uri"], row["key"], "")
                if run in others:
                    seen_elsewhere.add(image)
                elif newest_only.takes(row):
                    fresh.append(number)
                    if run in chosen and image in seen_elsewhere:
                        return None
            if fresh:
                pieces.append(Piece(part, np.array(fresh, np.int64)))
        if run in chosen:
            by_run.append(pieces)
    return [piece for pieces in reversed(by_run) for piece in pieces]


def cut(pieces: Sequence[Piece], part_bytes: int) -> list[list[Piece]]:
    """Pieces in shards of at most `part_bytes`, where a piece alone is not larger."""
    shards: list[list[Piece]] = []
    num_bytes = math.inf
    for piece in pieces:
        if num_bytes + piece.part.size_bytes > part_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(piece)
        num_bytes += piece.part.size_bytes
    return shards


def manifest_of(archive: Archive, records: dict[str, RunRecord], shards: Sequence[Sequence[Piece]]) -> pa.Table:
    """The rows of the old runs' manifests that are copied, in their new shards."""
    found = [manifest.SCHEMA.empty_table()]
    placed = [(number, piece) for number, pieces in enumerate(shards) for piece in pieces]
    for run, several in groupby(placed, key=lambda each: each[1].part.run):
        record, mine = records[run], list(several)
        listed = manifest.read(archive.run_uri(run, record.manifest), record.manifest_sha256)
        names = [listed[name].to_pylist() for name in PLACE[1:]]
        sources = [storage.plain(record.sources[number]) for number in listed["source"].to_pylist()]
        row_of = {place: row for row, place in enumerate(zip(sources, *names, strict=True))}
        for (shard, piece), (_, rows) in zip(
            mine, table.scan_parts([piece.part for _, piece in mine], PLACE), strict=True
        ):
            places = rows.take(pa.array(piece.rows)).to_pylist()
            if missing := [place for place in places if tuple(place.values()) not in row_of]:
                raise StorageError(f"{piece.part.uri} has a row of {missing[0]['key']!r}, which run {run} never listed")
            chosen = listed.take(pa.array([row_of[tuple(place.values())] for place in places]))
            numbers = pa.array([shard] * len(chosen), pa.int32())
            found.append(chosen.set_column(0, manifest.SCHEMA.field("shard"), numbers))
    return pa.concat_tables(found)


def num_parts(shards: Sequence[Sequence[Piece]]) -> int:
    return sum(len(pieces) for pieces in shards)

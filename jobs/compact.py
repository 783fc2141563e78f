"""Few large parts instead of many small ones: `unetpp compact OUTPUT`.

A compaction is a run like any other, whose shards are copied instead of predicted: of every image (and window) the
newest row, from the parts of finished runs, into parts of `part_mb`. Its number is the highest, so that a reader that
takes the newest row of every image (`read_masks`, the view, the next night) sees the same rows before, meanwhile and
after; no part of the old runs is touched. When all is copied they are marked `compacted`, and `unetpp gc --delete`
removes their parts a day later, when nobody reads them any more. Rows that a newer row supersedes are not copied.

What makes that safe:

- Its number is taken before the table is read, and no other run of this archive is open then: no row can arrive that
  is newer than those that are copied, but older by its number.
- Copies are newer by their number than what other models have done since. Where those have done one of the images
  again, the older model's runs are left as they are: else `read_masks` over all models would show the older mask.
- A killed compaction is a run that is not finished: the same command goes on with it, and a night that meets it gives
  it up, as any run of other settings. What it copied is right as it is.
- `forget` writes parts over. So the old parts are looked at again after the copies are put, and `forget` looks for new
  runs after it wrote: whoever is later sees the other.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pyarrow as pa

from jobs import manifest, sink, storage, table
from jobs.contract import CompactConfig, Compaction, CompactResult, fingerprint
from jobs.copied import Piece, cut, manifest_of, newest, num_parts
from jobs.finish import write_up
from jobs.run_records import COMPACTED, RunRecord, State, list_runs, next_run, output_at, read_record
from jobs.runs import Archive, put_run, refuse_unfinished
from jobs.table import Part
from unetpp.errors import StorageError

logger = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What the rows of one part have in common."""

    model_digest: str
    sources: tuple[str, ...]
    write: tuple[str, ...]


class _Copying(NamedTuple):
    """A compaction under way: the pieces of each of its shards."""

    archive: Archive
    record: RunRecord
    shards: list[list[Piece]]


def run(config: CompactConfig) -> CompactResult:
    """Compact the finished runs of every archive and model of an output, where it makes fewer parts of them.

    ConfigError where a run is not finished.
    """
    output = output_at(config.output)
    done = []
    for kind in sorted({_kind_of(record) for record in _read_records(output, list_runs(output)).values()}):
        started = time.monotonic()
        while (copying := _begin(output, kind, config.part_mb << 20)) is not None:
            done.append(_finish(copying, started))
    return CompactResult(output_uri=output, compactions=tuple(done))


def _begin(output: str, kind: _Kind, part_bytes: int) -> _Copying | None:
    """Open a run, or find the one that a killed call left. None where there is nothing to gain."""
    while True:
        states = list_runs(output)
        name = next_run(states)
        records = _read_records(output, states)
        mine = {run: record for run, record in records.items() if set(kind.sources) & set(_kind_of(record).sources)}
        for run, record in mine.items():
            if record.compacts and states[run] == "open":
                return _resume(output, record)
            if record.compacts and states[run] == "sealed":
                _mark(output, record)
        for run, record in mine.items():
            run_uri, what = storage.join(output, "runs", run), f"run {run} of {', '.join(record.sources)}"
            refuse_unfinished(run_uri, record, states[run], what=what, then="compact")
        states = list_runs(output)
        parts = table.parts_by_run(table.list_parts(output, None))
        chosen = [
            run
            for run, record in mine.items()
            if _kind_of(record) == kind and states[run] != "compacted" and _is_small(parts.get(run, []), part_bytes)
        ]
        others = {run for run, record in records.items() if record.model_digest != kind.model_digest}
        if (pieces := newest(parts, chosen, others, before=name)) is None:
            logger.info("model %s is left as it is: another model has done its images since", kind.model_digest[:10])
            return None
        shards = cut(pieces, part_bytes)
        if len(shards) >= len({piece.part.uri for piece in pieces}):
            return None
        latest = mine[max(chosen)]
        archive = Archive.of(storage.join(output, "runs", latest.run), latest)
        content = manifest.encode(manifest_of(archive, mine, shards))
        record = _record(name, latest, chosen, content, shards)
        if put_run(archive, record, content):
            return _Copying(archive, record, shards)


def _resume(output: str, record: RunRecord) -> _Copying:
    """The pieces of a compaction that was begun: those that its manifest names, which no newer row can change."""
    archive = Archive.of(storage.join(output, "runs", record.run), record)
    parts = table.parts_by_run(table.list_parts(output, record.model_digest))
    pieces = iter(newest(parts, record.compacts, (), before=record.run) or ())
    shards: list[list[Piece]] = []
    for shard in manifest.shards(archive.run_uri(record.run, record.manifest), record.manifest_sha256):
        shards.append([])
        while sum(len(piece.rows) for piece in shards[-1]) < shard.num_images:
            piece = next(pieces, None)
            if piece is None:
                break
            shards[-1].append(piece)
        if sum(len(piece.rows) for piece in shards[-1]) != shard.num_images:
            raise StorageError(
                f"run {record.run} copies rows that are not in the table any more: parts of {record.compacts[0]} to "
                f"{record.compacts[-1]} were removed or written over; put them back"
            )
    return _Copying(archive, record, shards)


def _finish(copying: _Copying, started: float) -> Compaction:
    """Copy every shard, seal the run and mark the runs whose rows it holds."""
    archive, record, shards = copying
    logger.info("%s: %d parts of %d runs become %d", record.run, num_parts(shards), len(record.compacts), len(shards))
    there = {part.shard for part in table.list_parts(archive.output_uri, record.model_digest, record.run)}
    for number, pieces in enumerate(shards):
        if number not in there:
            _copy(archive, record, number, pieces)
    _copy_what_changed(copying)
    result = write_up(archive, record, time.monotonic() - started)
    _mark(archive.output_uri, record)
    return Compaction(
        run=record.run,
        model_digest=record.model_digest,
        sources=record.sources,
        compacted=record.compacts,
        num_rows=result.num_listed,
        num_parts_before=num_parts(shards),
        num_parts=len(shards),
    )


def _copy(archive: Archive, record: RunRecord, shard: int, pieces: Sequence[Piece], *, over: bool = False) -> None:
    """Commit a shard; with `over`, write it over what is there."""
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    numbers = {piece.part.uri: piece.rows for piece in pieces}
    for part, found in table.scan_parts([piece.part for piece in pieces], sink.SCHEMA.names):
        rows += found.take(pa.array(numbers[part.uri])).to_pylist()
    uri = storage.join(archive.parts_uri(record.run), sink.part_name(shard))
    seconds, sha256 = time.perf_counter() - started, record.manifest_sha256
    if over:
        footer = sink.footer_of(rows, run=record.run, manifest_sha256=sha256, shard=shard, seconds=seconds)
        storage.write_bytes(uri, sink.encode_part(rows, footer), root=archive.output_uri)
    else:
        root = archive.output_uri
        sink.commit(uri, rows, run=record.run, manifest_sha256=sha256, shard=shard, seconds=seconds, root=root)


def _copy_what_changed(copying: _Copying) -> None:
    """Copy again the shards of which `forget` wrote a part over since it was listed, until none is."""
    archive, record, shards = copying
    seen = {piece.part.uri: piece.part.etag for pieces in shards for piece in pieces}
    while True:
        now = {part.uri: part.etag for part in table.list_parts(archive.output_uri, record.model_digest)}
        changed = {uri for uri, etag in seen.items() if now.get(uri) != etag}
        if gone := sorted(changed - now.keys()):
            raise StorageError(f"{gone[0]} was removed while it was copied; put it back, and run again")
        if not changed:
            return
        seen |= {uri: now[uri] for uri in changed}
        for number, pieces in enumerate(shards):
            if any(piece.part.uri in changed for piece in pieces):
                _copy(archive, record, number, pieces, over=True)


def _mark(output: str, record: RunRecord) -> None:
    """Say of every run whose rows this one holds that it does."""
    for run in record.compacts:
        uri = storage.join(output, "runs", run, COMPACTED)
        storage.put_if_absent(uri, json.dumps({"by": record.run}).encode(), root=output)


def _record(
    name: str, latest: RunRecord, chosen: Sequence[str], content: bytes, shards: Sequence[Sequence[Piece]]
) -> RunRecord:
    num_rows = sum(len(piece.rows) for pieces in shards for piece in pieces)
    changed = {
        "run": name,
        "fingerprint": fingerprint({"compacts": sorted(chosen), "digest": latest.model_digest}),
        "manifest": f"manifest-{uuid.uuid4().hex}.parquet",
        "manifest_sha256": hashlib.sha256(content).hexdigest(),
        "num_shards": len(shards),
        "num_images": num_rows,
        "num_listed": num_rows,
        "num_unchanged": 0,
        "opened_at": datetime.now(UTC),
        "parent": None,
        "compacts": tuple(sorted(chosen)),
    }
    return latest.model_copy(update=changed)


def _is_small(parts: Sequence[Part], part_bytes: int) -> bool:
    """Whether a run's parts are worth copying: they are far from what they could be."""
    return sum(part.size_bytes for part in parts) < len(parts) * part_bytes / 2


def _kind_of(record: RunRecord) -> _Kind:
    sources = tuple(storage.plain(source) for source in record.sources)
    return _Kind(record.model_digest, sources, tuple(sorted(record.write)))


def _read_records(output: str, runs: dict[str, State]) -> dict[str, RunRecord]:
    with storage.io_threads() as threads:
        names = sorted(runs)
        found = threads.map(lambda run: read_record(storage.join(output, "runs", run)), names)
        return dict(zip(names, found, strict=True))


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("compact")

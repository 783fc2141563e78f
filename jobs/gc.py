"""Remove what no reader needs: `unetpp gc OUTPUT`. Lists it only, unless told to delete.

Nothing that a row, an open run or a resumption needs is ever removed: PNGs of finished runs that no row names, parts
whose rows another run holds (`unetpp compact`), notes of finished runs, manifests that no run was opened with, indexes
of archives that are gone or have another version, leftovers of killed writers.
"""

import hashlib
import logging
from collections.abc import Iterator

import numpy as np

from jobs import indexes, sink, storage, table
from jobs.contract import GcConfig, GcResult
from jobs.manifest import find
from jobs.run_records import COMPACTED, HINTS, INDEXES, RunRecord, holder_of, list_runs, output_at, read_record
from jobs.runs import is_being_given_up
from jobs.storage import SCRATCH

logger = logging.getLogger(__name__)

Garbage = Iterator[tuple[str, str, int]]
"""(kind, URI, bytes) of each object."""

Names = bytearray
"""16-byte digests of paths below a run's folder of PNGs, one after the other."""


def run(config: GcConfig) -> GcResult:
    """List the garbage of an output, or with `delete` remove it."""
    output = output_at(config.output)
    counts: dict[str, int] = {}
    num_bytes = 0
    with storage.io_threads() as threads:
        removals = []
        for kind, uri, size_bytes in _garbage(output, config.older_than_hours * 3600):
            counts[kind] = counts.get(kind, 0) + 1
            num_bytes += size_bytes
            logger.info("%s %s", kind, uri)
            if config.delete:
                removals.append(threads.submit(storage.delete, uri))
        for removal in removals:
            removal.result()
    return GcResult(
        output_uri=output, objects=dict(sorted(counts.items())), size_bytes=num_bytes, deleted=config.delete
    )


def _garbage(output: str, min_age_s: float) -> Garbage:
    states = list_runs(output)
    copies: dict[str, dict[str, Names]] = {}
    for run, state in states.items():
        run_uri = storage.join(output, "runs", run)
        record = read_record(run_uri)
        is_over = state != "open" and not is_being_given_up(run_uri, record, state)
        if is_over:
            named = _names(output, record.model_digest, run).get(run, Names())
            if state == "compacted":
                by = holder_of(run_uri)
                if by not in copies:
                    copies[by] = _names(output, record.model_digest, by)
                named += copies[by].get(run, Names())
                if _is_old(storage.join(run_uri, COMPACTED), output, min_age_s):
                    yield from _superseded(output, record, by)
            yield from _orphans(output, record, named)
        for found in storage.list_objects(run_uri):
            is_note = found.key.startswith(f"{HINTS}/") and is_over
            is_spare = found.key.startswith("manifest-") and found.key != record.manifest
            uri = storage.join(run_uri, found.key)
            if (is_note or is_spare) and _is_old(uri, output, min_age_s):
                yield "note" if is_note else "manifest", uri, found.size_bytes
    listed = list(storage.list_objects(storage.join(output, "runs"), missing_ok=True))
    opened = list_runs(output)  # after the listing: a run may have been opened since we began
    for found in listed:
        run, _, name = found.key.partition("/")
        uri = storage.join(output, "runs", found.key)
        if name.startswith("manifest-") and run not in opened and _is_old(uri, output, min_age_s):
            yield "manifest", uri, found.size_bytes
    for found in storage.list_objects(storage.join(output, INDEXES), missing_ok=True):
        uri = storage.join(output, INDEXES, found.key)
        if _is_old(uri, output, min_age_s) and not indexes.is_needed(uri, found):
            yield "index", uri, found.size_bytes
    for found in storage.list_objects(storage.join(output, SCRATCH), missing_ok=True):
        uri = storage.join(output, SCRATCH, found.key)
        if _is_old(uri, output, min_age_s):
            yield "leftover", uri, found.size_bytes


def _superseded(output: str, record: RunRecord, by: str) -> Garbage:
    """The parts of a compacted run, if the run that holds its rows is there to the last part."""
    holder = read_record(storage.join(output, "runs", by))
    if len(table.list_parts(output, record.model_digest, by)) < holder.num_shards:
        logger.warning("run %s lacks parts: those of %s, which it was made of, are kept", by, record.run)
        return
    for part in table.list_parts(output, record.model_digest, record.run):
        yield "part", part.uri, part.size_bytes


def _orphans(output: str, record: RunRecord, named: Names) -> Garbage:
    """PNGs of a finished run that no row names: its shards were abandoned, or an image forgotten or done again."""
    pngs = sink.pngs_uri(output, record.model_digest, record.run)
    known = np.unique(np.frombuffer(bytes(named), "S16"))

    for found in storage.list_objects(pngs, missing_ok=True):
        if not find(known, np.array([_digest(found.key)], "S16"))[0].all():
            yield "png", storage.join(pngs, found.key), found.size_bytes


def _names(output: str, digest: str, run: str) -> dict[str, Names]:
    """What the rows of a run name: PNGs of its own folder, or, where it copied them, of other runs'."""
    named: dict[str, Names] = {}
    parts = table.list_parts(output, digest, run)
    for batch in table.scan(parts, ["mask_uri"]):
        for uri in batch["mask_uri"].to_pylist():
            if uri is not None:
                run_id, key = sink.split_mask_uri(uri, digest)
                named.setdefault(run_id, Names()).extend(_digest(key) + _digest(sink.probability_uri(key)))
    return named


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _is_old(uri: str, output: str, min_age_s: float) -> bool:
    age_s = storage.age_s(uri, root=output)
    return age_s is not None and age_s >= min_age_s


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("gc")

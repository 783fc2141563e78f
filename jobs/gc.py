"""Remove what no reader needs: `unetpp gc OUTPUT`. Lists it only, unless told to delete.

Nothing that a row, an open run or a resumption needs is ever removed: PNGs that no row of their finished run names,
notes of finished runs, manifests that no run was opened with, leftovers of killed writers.
"""

import hashlib
import logging
from collections.abc import Iterator

import numpy as np

from jobs import sink, storage, table
from jobs.contract import GcConfig, GcResult
from jobs.runs import HINTS, RunRecord, list_runs, read_record
from jobs.storage import SCRATCH, StoredObject

logger = logging.getLogger(__name__)

Garbage = Iterator[tuple[str, str, int]]
"""(kind, URI, bytes) of each object."""


def run(config: GcConfig) -> GcResult:
    """List the garbage of an output, or with `delete` remove it."""
    output = storage.canonical(config.output)
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
    for run, state in states.items():
        run_uri = storage.join(output, "runs", run)
        record = read_record(run_uri)
        if state != "open":
            yield from _orphans(output, record)
        for found in storage.list_objects(run_uri):
            is_note = found.key.startswith(f"{HINTS}/") and state != "open"
            is_spare = found.key.startswith("manifest-") and found.key != record.manifest
            uri = storage.join(run_uri, found.key)
            if (is_note or is_spare) and _is_old(uri, output, min_age_s):
                yield "note" if is_note else "manifest", uri, found.size_bytes
    for found in storage.list_objects(storage.join(output, "runs"), missing_ok=True):
        uri = storage.join(output, "runs", found.key)
        if found.key.split("/")[0] not in states and _is_old(uri, output, min_age_s):
            yield "manifest", uri, found.size_bytes
    for found in storage.list_objects(storage.join(output, SCRATCH), missing_ok=True):
        uri = storage.join(output, SCRATCH, found.key)
        if _is_old(uri, output, min_age_s):
            yield "leftover", uri, found.size_bytes


def _orphans(output: str, record: RunRecord) -> Garbage:
    """PNGs of a finished run that none of its rows names: its shards were abandoned, or an image forgotten."""
    pngs = storage.join(output, "png", sink.model_folder(record.model_digest), f"run={record.run}")
    parts = table.list_parts(output, record.model_digest, record.run)
    named = [np.empty(0, "S16")]
    for batch in table.scan(parts, ["mask_uri"]):
        # By what follows the run's folder: an output that was moved keeps its PNGs.
        uris = [uri for uri in batch["mask_uri"].to_pylist() if uri is not None]
        keys = [uri.rpartition(f"/{sink.model_folder(record.model_digest)}/run={record.run}/")[2] for uri in uris]
        named.append(np.array([_digest(key) for key in keys], "S16"))
    known = np.unique(np.concatenate(named))

    def is_orphan(found: StoredObject) -> bool:
        at = np.searchsorted(known, np.bytes_(_digest(found.key)))
        return at == len(known) or known[at] != np.bytes_(_digest(found.key))

    for found in storage.list_objects(pngs, missing_ok=True):
        if is_orphan(found):
            yield "png", storage.join(pngs, found.key), found.size_bytes


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()


def _is_old(uri: str, output: str, min_age_s: float) -> bool:
    age_s = storage.age_s(uri, root=output)
    return age_s is not None and age_s >= min_age_s


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("gc")

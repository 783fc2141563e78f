"""Remove every mask of an image from an output: `unetpp forget OUTPUT KEY`, as when a patient withdraws consent.

The one place where a part is written over: its row stays, so that counts hold, but says `forgotten` and holds no mask.
First of all the output remembers it (`jobs.forgotten`), so that no model predicts the image again, and a call that is
killed at any moment is finished by the next. A new version of the image is a new image. The image itself is for its
owner to delete.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from jobs import forgotten, lease, manifest, sink, storage, table
from jobs.contract import ForgetConfig, ForgetResult
from jobs.finish import write_up
from jobs.run_records import RunRecord, State, list_runs, output_at, read_record
from jobs.runs import Archive, refuse_unfinished
from jobs.sink import Footer
from jobs.table import Part
from unetpp.errors import ConfigError

logger = logging.getLogger(__name__)

FORGOTTEN: dict[str, Any] = dict.fromkeys(
    ("mask_png", "mask_uri", "class_pixels", "uncertainty", "probability_png", "geo", "extra")
)
FORGOTTEN |= {"error_code": "forgotten", "error": "removed on request"}


def run(config: ForgetConfig) -> ForgetResult:
    """Forget an image in the runs of every model.

    ConfigError where no run has it, or one that may still write a mask of it: it is open, or is being given up.
    """
    output = output_at(config.output)
    if config.source is not None:
        config = config.model_copy(update={"source": storage.plain(storage.canonical(config.source))})
    num_rows: dict[str, int] = {}
    while True:
        runs = list_runs(output)
        num_rows |= _forget_in_runs(output, config, runs)
        if list_runs(output).keys() <= runs.keys():
            break  # else a run was opened meanwhile, and may copy what was there before
    return ForgetResult(
        key=config.key,
        num_rows=sum(num_rows.values()),
        runs=tuple(run for run, count in sorted(num_rows.items()) if count),
    )


def _forget_in_runs(output: str, config: ForgetConfig, runs: Mapping[str, State]) -> dict[str, int]:
    """Forget an image in these runs; the number of its rows by run."""
    records = {name: read_record(storage.join(output, "runs", name)) for name in sorted(runs)}
    listed = {name: _listed(storage.join(output, "runs", name), record, config) for name, record in records.items()}
    having = {name: rows for name, rows in listed.items() if rows}
    if not having:
        of = "" if config.source is None else f" of {config.source}"
        raise ConfigError(
            f"no run of {output} has an image {config.key!r}{of}; keys are paths below the input, as `key` says, and "
            "sources are called as `source_uri` says"
        )
    for name in having:
        _refuse_unfinished(storage.join(output, "runs", name), records[name], runs[name], config.key)
    forgotten.remember(
        output, {(row["source_uri"], row["key"], row["etag"]) for rows in having.values() for row in rows}
    )
    for name in having:  # the report may show the image, and of a compacted run it cannot be made anew
        storage.delete(storage.join(output, "runs", name, "report.html"))
    pngs = [uri for name, rows in having.items() for uri in _pngs(output, records[name], rows)]
    with storage.io_threads() as threads:
        list(threads.map(storage.delete, pngs))
    num_rows = {}
    for name in having:
        counts = _counts(table.list_parts(output, records[name].model_digest, name), config)
        for part, count in counts.items():
            if count:
                _forget_in(part, output)
        num_rows[name] = sum(counts.values())
    for name in having:
        if runs[name] == "sealed":
            archive = Archive.of(storage.join(output, "runs", name), records[name])
            write_up(archive, records[name], _seconds(archive, name))
    return num_rows


def _listed(run_uri: str, record: RunRecord, config: ForgetConfig) -> list[dict[str, Any]]:
    """What the manifest of a run says of the image, its source as rows call it.

    Not what the rows say: a worker that was killed may have put a PNG that no row names.
    """
    columns = ["source", "key", "etag", "window_y", "window_x", "num_windows"]
    listed = manifest.read(storage.join(run_uri, record.manifest), record.manifest_sha256, columns)
    sources = [storage.plain(source) for source in record.sources]
    rows = listed.filter(pc.equal(listed["key"], config.key)).to_pylist()
    named = [row | {"source_uri": sources[row["source"]]} for row in rows]
    return [row for row in named if config.source in (None, row["source_uri"])]


def _refuse_unfinished(run_uri: str, record: RunRecord, state: State, key: str) -> None:
    """ConfigError where somebody may still write a mask of the image."""
    refuse_unfinished(run_uri, record, state, what=f"run {record.run}, which has {key!r} to do,", then="forget")
    if state == "abandoned" and (held := lease.live(Archive.of(run_uri, record), record)) is not None:
        raise ConfigError(
            f"{held.owner} still works on run {record.run}, which was given up and has {key!r}: stop it, or wait "
            f"{held.ttl_s:.0f} s if it is dead, then forget"
        )


def _pngs(output: str, record: RunRecord, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where a run puts the PNGs of rows of its manifest, if it writes any."""
    for row in rows if "png" in record.write else ():
        mask = sink.png_uri(output, record.model_digest, record.run, row, row["source"], len(record.sources))
        yield from (mask, sink.probability_uri(mask))


def _counts(parts: Sequence[Part], config: ForgetConfig) -> dict[Part, int]:
    """How many rows of each part are of the image."""
    counts = {}
    for part, rows in table.scan_parts(parts, ["source_uri", "key"]):
        mine = rows.filter(pc.equal(rows["key"], config.key))["source_uri"].to_pylist()
        counts[part] = sum(config.source in (None, source) for source in mine)
    return counts


def _forget_in(part: Part, output: str) -> None:
    """Write a part anew without the masks of what the output has noted, until it has none.

    Another call may do so at the same time. Each notes its image before it writes and reads the notes after: whoever
    writes last sees what the other has noted.
    """
    while True:
        removed = forgotten.identities(output)
        seen = table.read_rows([part], ["source_uri", "key", "etag", "error_code"]).to_pylist()
        noted = forgotten.among(removed, ((row["source_uri"], row["key"], row["etag"]) for row in seen))
        if all(row["error_code"] == "forgotten" for row, is_noted in zip(seen, noted, strict=True) if is_noted):
            return
        rows = table.read_rows([part], sink.SCHEMA.names).to_pylist()
        (footer,) = table.read_footers([part])
        for row, is_noted in zip(rows, noted, strict=True):
            if is_noted:
                row.update(FORGOTTEN)
        storage.write_bytes(part.uri, sink.encode_part(rows, _counted(footer, rows)), root=output)


def _counted(footer: Footer, rows: list[dict[str, Any]]) -> Footer:
    failures = Counter(row["error_code"] for row in rows if row["error_code"] is not None)
    counts = {"num_predicted": len(rows) - failures.total(), "num_failed": failures.total(), "failures": dict(failures)}
    return footer.model_copy(update=counts)


def _seconds(archive: Archive, run: str) -> float:
    footers = table.read_footers(table.list_parts(archive.output_uri, archive.model_digest, run))
    first = min(footer.committed_at - footer.seconds for footer in footers)
    return max(footer.committed_at for footer in footers) - first


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("forget")

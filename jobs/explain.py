"""The story of one image: `unetpp explain RUN KEY`."""

import pyarrow as pa
import pyarrow.compute as pc

from jobs import manifest, run_records, storage, table
from jobs.contract import Attempt, ExplainConfig, ExplainResult

COLUMNS = ["key", "source_uri", "etag", "attempts", "error_code", "error", "height", "width", "level"]
COLUMNS += ["class_pixels", "uncertainty", "mask_uri", "window_y", "window_x", "num_windows"]


def run(config: ExplainConfig) -> ExplainResult:
    """Look the key up in the run's manifest and in the table. ConfigError where there is no such run."""
    run_uri = storage.canonical(config.run)
    record, output = run_records.read_record(run_uri), run_records.output_of(run_uri)
    listed = manifest.read(storage.join(run_uri, record.manifest), record.manifest_sha256)
    found = listed.filter(pc.equal(listed["key"], config.key)).to_pylist()
    sources = pa.array([storage.plain(source) for source in record.sources])
    rows: list[Attempt] = []
    for part, there in table.scan_parts(table.list_parts(output, record.model_digest)[::-1], COLUMNS):
        is_ours = pc.is_in(there["source_uri"], value_set=sources)
        chosen = there.filter(pc.and_(pc.equal(there["key"], config.key), is_ours))
        rows += [_attempt(row, part) for row in chosen.to_pylist()]
    first = found[0] if found else {}
    was_committed = bool(found) and run_records.state_of(run_uri) == "compacted"  # then another run holds its rows
    return ExplainResult(
        run=record.run,
        key=config.key,
        is_in_manifest=bool(found),
        shard=first.get("shard"),
        etag=first.get("etag"),
        size_bytes=first.get("size_bytes"),
        is_committed=was_committed or any(row.run == record.run for row in rows),
        rows=tuple(rows),
    )


def _attempt(row: dict[str, object], part: table.Part) -> Attempt:
    kept = {name: row[name] for name in COLUMNS if name in Attempt.model_fields}
    return Attempt.model_validate(
        kept | {"run": part.run, "part_uri": part.uri, "outcome": row["error_code"] or "predicted"}
    )


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("explain")

"""How far a run is: `unetpp status RUN`. Read from run.json and the committed parts, so it is true at any moment."""

from collections import Counter
from datetime import UTC, datetime

from jobs import run_records, storage, table
from jobs.contract import StatusConfig, StatusResult


def run(config: StatusConfig) -> StatusResult:
    """Count what is committed. ConfigError where there is no such run."""
    run_uri = storage.canonical(config.run)
    record = run_records.read_record(run_uri)
    footers = table.read_footers(table.list_parts(run_records.output_of(run_uri), record.model_digest, record.run))
    failures: Counter[str] = Counter()
    for footer in footers:
        failures.update(footer.failures)
    done = [footer for footer in footers if footer.abandoned_by is None]
    num_predicted = sum(footer.num_predicted for footer in done)
    num_done = num_predicted + failures.total()
    last = max((footer.committed_at for footer in done), default=None)
    rate = None
    if last is not None:
        first = min(footer.committed_at - footer.seconds for footer in done)
        rate = num_done / max(last - first, 1e-9)
    state = run_records.state_of(run_uri)
    return StatusResult(
        run=record.run,
        state=state,
        sources=record.sources,
        model_digest=record.model_digest,
        opened_at=record.opened_at,
        parent=record.parent,
        compacted_into=run_records.holder_of(run_uri) if state == "compacted" else None,
        num_shards=record.num_shards,
        num_shards_done=len(done),
        num_images=record.num_images,
        num_predicted=num_predicted,
        num_failed=failures.total(),
        num_unchanged=record.num_unchanged,
        failures=dict(sorted(failures.items())),
        last_commit_at=None if last is None else datetime.fromtimestamp(last, UTC),
        images_per_second=rate,
        seconds_left=(record.num_images - num_done) / rate if rate and state == "open" else None,
    )


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("status")

"""Make a finished run's report.html, result.json and _SUCCESS.json anew from its parts: `unetpp rebuild RUN`."""

from jobs import storage, table
from jobs.contract import PredictResult, RebuildConfig
from jobs.finish import write_up
from jobs.run_records import holder_of, read_record, state_of
from jobs.runs import Archive, pending_shards
from unetpp.errors import ConfigError


def run(config: RebuildConfig) -> PredictResult:
    """Write the three files again. ConfigError where there is no such run, or it is not finished."""
    run_uri = storage.canonical(config.run)
    record = read_record(run_uri)
    archive = Archive.of(run_uri, record)
    if (state := state_of(run_uri)) == "compacted":
        raise ConfigError(f"run {record.run} was compacted: {holder_of(run_uri)} holds its rows; rebuild that one")
    if state == "abandoned":
        raise ConfigError(f"run {record.run} was abandoned: it has no result, and what it committed is in the table")
    if pending := pending_shards(archive, record):
        raise ConfigError(
            f"run {record.run} is not finished: {len(pending)} of its {record.num_shards} shards are to be done; "
            "start the command that opened it again"
        )
    footers = table.read_footers(table.list_parts(archive.output_uri, archive.model_digest, record.run))
    first = min(footer.committed_at - footer.seconds for footer in footers)
    return write_up(archive, record, max(footer.committed_at for footer in footers) - first)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("rebuild")

"""End an unfinished run that nothing is to finish, such as one of a model that was replaced: `unetpp abandon RUN`.

An open run holds up `forget` and `compact`. What it committed stays in the table; what is left of it the next run of
the same archive and model finds undone.
"""

from jobs import lease, runs, status, storage
from jobs.contract import AbandonConfig, StatusConfig, StatusResult
from jobs.run_records import read_record, state_of
from jobs.runs import Archive
from unetpp.errors import ConfigError


def run(config: AbandonConfig) -> StatusResult:
    """Abandon a run, or end what a killed call began of that.

    ConfigError where there is no such run, it is finished, all of it is committed, or somebody works on it.
    """
    run_uri = storage.canonical(config.run)
    record = read_record(run_uri)
    archive = Archive.of(run_uri, record)
    if (state := state_of(run_uri)) in ("sealed", "compacted"):
        raise ConfigError(f"run {record.run} is {state}: it is finished, and there is nothing to abandon")
    if state == "open":
        if not runs.pending_shards(archive, record):
            raise ConfigError(f"all of run {record.run} is committed: finish it with unetpp rebuild {run_uri}")
        if (held := lease.live(archive, record)) is not None:
            raise ConfigError(
                f"{held.owner} works on run {record.run}: stop it first, or let it finish; if it is dead, its lease "
                f"ends {held.ttl_s:.0f} s after its last sign of life"
            )
    runs.abandon(archive, record, by="unetpp abandon")
    return status.run(StatusConfig(run=config.run))


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("abandon")

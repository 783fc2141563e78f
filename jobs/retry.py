"""Try the failed images of a run again: `unetpp retry RUN [--only CODE]`.

A retry is a run of its own whose manifest is what is still failed of its parent, versions and all; parts are never
rewritten, and `read_masks` shows the newest row of every image.
"""

from jobs import predict, storage
from jobs.contract import PredictConfig, PredictResult, RetryConfig
from jobs.run_records import holder_of, output_of, read_record, state_of
from unetpp.errors import ConfigError


def run(config: RetryConfig) -> PredictResult:
    """Retry with the run's own settings, in the output that the run is in now, which may have been moved.

    ConfigError where there is no such run, or another one is unfinished.
    """
    run_uri = storage.canonical(config.run)
    record = read_record(run_uri)
    if state_of(run_uri) == "compacted":
        raise ConfigError(f"run {record.run} was compacted: {holder_of(run_uri)} holds its rows; retry that one")
    said = {
        name: getattr(config, name) for name in ("model", "max_pixels", "pages") if getattr(config, name) is not None
    }
    how = config.model_dump(include={"backend", "num_workers", "threads", "partial_ok", "result"})
    where = {"output": output_of(run_uri)}
    if config.backend == "inline":
        where["topology"] = "fused"  # split is Ray's
    settings = PredictConfig.model_validate(record.config | where | how | said)
    return predict.run(settings, parent=record.run, only=config.only)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("retry")

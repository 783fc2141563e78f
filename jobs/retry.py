"""Try the failed images of a run again: `unetpp retry RUN [--only CODE]`.

A retry is a run of its own whose manifest is what is still failed of its parent, versions and all; parts are never
rewritten, and `read_masks` shows the newest row of every image.
"""

from jobs import predict, storage
from jobs.contract import PredictConfig, PredictResult, RetryConfig
from jobs.runs import read_record


def run(config: RetryConfig) -> PredictResult:
    """Retry with the run's own settings. ConfigError where there is no such run, or another one is unfinished."""
    record = read_record(storage.canonical(config.run))
    said = {
        name: getattr(config, name) for name in ("model", "max_pixels", "pages") if getattr(config, name) is not None
    }
    how = config.model_dump(include={"backend", "num_workers", "threads", "partial_ok", "result"})
    settings = PredictConfig.model_validate(record.config | how | said)
    return predict.run(settings, parent=record.run, only=config.only)


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("retry")

"""Go back to the model before the current one: `unetpp rollback MODELS`. Nothing is rewritten, a number is added."""

from jobs import registry
from jobs.contract import RollbackConfig, RollbackResult


def run(config: RollbackConfig) -> RollbackResult:
    """Write the next number. ConfigError where there is no model before the current one."""
    number, model = registry.rollback(config.models)
    return RollbackResult(
        number=number,
        digest=model.digest,
        level=model.level,
        model_uri=registry.model_uri(config.models, model.digest),
        reason=model.gate,
    )


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("rollback")

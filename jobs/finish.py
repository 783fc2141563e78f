"""The end of a run: count what is committed, check the law, write the report, the result and last `_SUCCESS.json`."""

import contextlib
import json
import logging
from collections import Counter

from jobs import sink, storage, table
from jobs.contract import ExitCode, PredictResult
from jobs.report import write_report
from jobs.run_records import SUCCESS, RunRecord
from jobs.runs import Archive
from unetpp.errors import ConfigError, StorageError, UnetppError

logger = logging.getLogger(__name__)


def seal(archive: Archive, record: RunRecord, seconds: float) -> PredictResult:
    """Finish a run whose parts are all there, unless another driver of it was first."""
    if storage.exists(archive.run_uri(record.run, SUCCESS)):
        with contextlib.suppress(FileNotFoundError, StorageError, ValueError):  # lost or damaged: made anew
            return PredictResult.model_validate(storage.read_json(archive.run_uri(record.run, "result.json")))
    return write_up(archive, record, seconds)


def write_up(archive: Archive, record: RunRecord, seconds: float) -> PredictResult:
    """Make from the parts what can be made from them: check the law, write report, result and last _SUCCESS.json.

    Raises:
        StorageError: a part is missing.
        ConfigError: a part is of another run.
    """
    parts = table.list_parts(archive.output_uri, archive.model_digest, record.run)
    footers = table.read_footers(parts)
    _check_identity(record, parts, footers)
    failures: Counter[str] = Counter()
    for footer in footers:
        failures.update(footer.failures)
    num_predicted = sum(footer.num_predicted for footer in footers)
    num_failed = sum(footer.num_failed for footer in footers)
    check_law(record.run, record.num_listed, num_predicted, num_failed, record.num_unchanged)
    result = PredictResult(
        status="partial" if num_failed else "complete",
        exit_code=_exit_code(num_failed, archive.config.partial_ok),
        runs=(record.run,),
        model_digest=record.model_digest,
        table_uri=storage.join(archive.output_uri, "table"),
        report_uri=archive.run_uri(record.run, "report.html"),
        num_listed=record.num_listed,
        num_predicted=num_predicted,
        num_failed=num_failed,
        num_unchanged=record.num_unchanged,
        failures=dict(sorted(failures.items())),
        megapixels=sum(footer.megapixels for footer in footers),
        seconds=seconds,
    )
    write_report(archive, record, parts, footers, result)
    storage.write_bytes(
        archive.run_uri(record.run, "result.json"), result.model_dump_json(indent=2).encode(), root=archive.output_uri
    )
    success = {
        "run": record.run,
        "num_listed": result.num_listed,
        "num_predicted": num_predicted,
        "num_failed": num_failed,
        "num_unchanged": result.num_unchanged,
        "law": "num_listed = num_predicted + num_failed + num_unchanged",
        "parts": [
            {"name": sink.part_name(part.shard), "size_bytes": part.size_bytes, "etag": part.etag} for part in parts
        ],
    }
    storage.write_bytes(
        archive.run_uri(record.run, SUCCESS), json.dumps(success, indent=2).encode(), root=archive.output_uri
    )
    storage.sweep_scratch(archive.output_uri)
    return result


def check_law(what: str, num_listed: int, num_predicted: int, num_failed: int, num_unchanged: int) -> None:
    """Log that every listed image is accounted for; UnetppError where one is not."""
    counts = (
        f"{what}: {num_listed} listed = {num_predicted} predicted + {num_failed} failed + {num_unchanged} unchanged"
    )
    if num_listed != num_predicted + num_failed + num_unchanged:
        raise UnetppError(f"{counts} does not add up; the run is not sealed. This is a fault of the program: report it")
    logger.info(counts)


def _exit_code(num_failed: int, partial_ok: bool) -> int:
    return int(ExitCode.DONE_WITH_FAILED_IMAGES if num_failed and not partial_ok else ExitCode.DONE)


def _check_identity(record: RunRecord, parts: list[table.Part], footers: list[sink.Footer]) -> None:
    for part, footer in zip(parts, footers, strict=True):
        sink.refuse_abandoned(footer)
        if footer.identity != (record.run, record.manifest_sha256, part.shard):
            raise ConfigError(f"{part.uri} is not of run {record.run} (it says {footer.identity}); move it away")
    missing = sorted(set(range(record.num_shards)) - {part.shard for part in parts})
    if missing:
        first = sink.part_name(missing[0])
        raise StorageError(f"run {record.run}: {len(missing)} part(s) are missing from the table, the first is {first}")

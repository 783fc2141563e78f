"""Segment an archive: list what is new, cut it into shards, take each through read, predict and write.

A shard's Parquet part, put only if absent and after its PNGs, is its commit; a killed run is resumed by the same
command. A bad image becomes a row with `error_code`; a bad world (StorageError) stops the run with nothing half done.
"""

import contextlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal

from jobs import backends, lease, models, storage, table
from jobs.command_line import exit_code
from jobs.contract import ExitCode, PredictConfig, PredictResult
from jobs.finish import check_law, seal
from jobs.forecast import shard_size
from jobs.lease import Lease
from jobs.manifest import Shard
from jobs.models import fetch_model
from jobs.progress import Breaker, Drain, Progress, interruptible
from jobs.run_records import HINTS, RunRecord
from jobs.runs import Archive, Opening, open_run, pending_shards
from jobs.shard import Task, load_predictor
from jobs.sink import Footer
from jobs.sources import resolve
from unetpp.engine_names import AUTO_PRECISIONS, PRECISION, EngineName, Precision
from unetpp.errors import UnetppError
from unetpp.predictor import Predictor, mask_digest

logger = logging.getLogger(__name__)


def run(config: PredictConfig, *, parent: str | None = None, only: tuple[str, ...] = ()) -> PredictResult:
    """Segment what is new below `config.input`, after finishing what an earlier call left unfinished.

    Args:
        config: what to do and how.
        parent: a run: its failed images are tried again instead (`unetpp retry`).
        only: with `parent`, the error codes that are; default: all.

    Returns:
        Counts over the runs of this call; status `interrupted` after Ctrl-C or SIGTERM.

    Raises:
        ConfigError, ModelError, StorageError: with `config.result`, a result of status `failed` is written before.
    """
    call = _Call(config, parent, only)
    try:
        with interruptible():
            result = call.work()
    except KeyboardInterrupt:
        sentence = "interrupted; the same command goes on from here"
        result = call.stopped("interrupted", int(ExitCode.INTERRUPTED), sentence)
    except UnetppError as error:
        failed = call.stopped("failed", exit_code(error), str(error))
        if config.result is not None:
            with contextlib.suppress(UnetppError):  # the first error is the one to tell
                storage.write_bytes(config.result, failed.model_dump_json(indent=2).encode())
        raise
    return result


class _Call:
    """One call of `run`: the runs it finishes and opens, and what they add up to."""

    def __init__(self, config: PredictConfig, parent: str | None, only: tuple[str, ...]) -> None:
        self._config = config
        self._parent, self._only = parent, only
        self._started = time.monotonic()
        self._sealed: list[PredictResult] = []
        self._archive: Archive | None = None
        self._record: RunRecord | None = None

    def work(self) -> PredictResult:
        """Resume what is unfinished, then open one run of what is new."""
        output_uri = storage.canonical_sink(self._config.output)
        sources = resolve(self._config.input, output_uri)
        predictor = self._load(output_uri)
        config = self._config
        archive = Archive(
            sources,
            output_uri,
            predictor.digest,
            config,
            self._parent,
            self._only,
            predictor.config.bands,
            shard_size(config, predictor.config),
        )
        self._archive = archive
        while True:
            opening = open_run(archive, waiting=[run for sealed in self._sealed for run in sealed.runs])
            if not isinstance(opening, Opening):
                return self._finished(opening.num_listed)
            self._record = opening.record
            if not self._is_done(archive, opening, predictor):
                continue  # it is open still, or given up: look again what there is to do
            self._sealed.append(seal(archive, opening.record, self._seconds))
            self._record = None
            if opening.is_ours:
                return self._finished()

    def _load(self, output_uri: str) -> Predictor:
        if self._config.engine == "auto":
            self._config = self._config.model_copy(update={"engine": self._auto_engine(output_uri)})
        return load_predictor(models.canonical(self._config.model), self._config, self._config.threads)

    def _auto_engine(self, output_uri: str) -> EngineName:
        """Of the engines that `auto` may mean where the work is done: one that goes on with the output's masks.

        Masks of another precision are another model's: a night on another machine would make all of them anew.
        """
        engines = backends.auto_engines_of(self._config)
        if not table.has_masks(output_uri):
            return engines[0]
        here: dict[Precision, EngineName] = {PRECISION[engine]: engine for engine in engines}
        elsewhere = [precision for precision in AUTO_PRECISIONS if precision not in here]
        model = fetch_model(models.canonical(self._config.model))
        there = next((each for each in (*here, *elsewhere) if self._has_masks(output_uri, model, each)), None)
        if there is None:
            return engines[0]
        if there in elsewhere:
            logger.warning(
                "the masks of this model that are there are of precision %s, for which auto has no engine here: engine "
                "%s makes masks of all images anew, beside those; to go on with them, use a machine like the one they "
                "are from",
                there,
                engines[0],
            )
            return engines[0]
        if here[there] != engines[0]:
            logger.info("engine %s goes on in the precision of the masks that are there", here[there])
        return here[there]

    def _has_masks(self, output_uri: str, model: Path, precision: Precision) -> bool:
        config = self._config
        digest = mask_digest(model, precision, config.mode, config.level, flips=config.flips, bands=config.bands)
        return table.has_masks(output_uri, digest)

    def _is_done(self, archive: Archive, opening: Opening, predictor: Predictor) -> bool:
        """Work on the run, or follow the driver that does, until all its shards are committed or that one is gone.

        One that lost its lease on the way follows, too: all drivers of a run end alike.
        """
        if not self._config.lease_s:
            return self._execute(archive, opening, predictor, None)
        if (held := lease.take(archive, opening.record, self._config.lease_s)) is not None:
            with held:
                if self._execute(archive, opening, predictor, held):
                    return True
        return lease.follow(archive, opening.record) == "sealed"

    def _execute(self, archive: Archive, opening: Opening, predictor: Predictor, held: Lease | None) -> bool:
        """Take the run's shards through the workers. False where the lease was lost on the way."""
        record = opening.record
        shards = pending_shards(archive, record)
        num_done = record.num_images - sum(shard.num_images for shard in shards)
        logger.info(
            "%s %s: %d images in %d shards, %d images done before",
            "opened" if opening.is_ours else "resuming",
            record.run,
            record.num_images,
            record.num_shards,
            num_done,
        )
        if held is None and not opening.is_ours:
            shards.reverse()  # should the driver that opened the run be alive, the two meet in the middle
        drain, num_committed = Drain(), 0
        with (
            Progress(record.run, record.num_images, num_done) as progress,
            contextlib.closing(self._footers(archive, record, shards, predictor, drain)) as footers,
        ):
            breaker = Breaker(record.run, self._config.max_failed_share)
            for footer in footers:
                num_committed += 1
                progress.advance(footer)
                breaker.count(footer)
                if held is not None:
                    held.advance(progress.num_done)
                    if held.is_lost:
                        return False
        if num_committed < len(shards):
            raise KeyboardInterrupt
        return True

    def _footers(
        self, archive: Archive, record: RunRecord, shards: list[Shard], predictor: Predictor, drain: Drain
    ) -> Generator[Footer]:
        on_ray = self._config.backend == "ray"
        task = Task(
            run=record.run,
            sources=tuple(archive.roots),
            output_uri=archive.output_uri,
            model_uri=models.canonical(self._config.model),
            model_digest=archive.model_digest,
            network=predictor.config,
            manifest_uri=archive.run_uri(record.run, record.manifest),
            manifest_sha256=record.manifest_sha256,
            config=self._config,
            threads=self._config.threads or (1 if on_ray else None),
            hints_uri=archive.run_uri(record.run, HINTS),
            call=uuid.uuid4().hex,
        )
        if on_ray and shards:
            return backends.on_ray(task, shards, drain)
        return backends.inline(task, shards, predictor, drain)

    def _finished(self, num_listed_now: int = 0) -> PredictResult:
        """What all runs add up to; with none, `num_listed_now` images are all done."""
        if not self._sealed:
            check_law("nothing new", num_listed_now, 0, 0, num_listed_now)
            return self._result(
                "unchanged",
                int(ExitCode.DONE),
                num_unchanged=num_listed_now,
                message="nothing new" if self._parent is None else f"no image of {self._parent} is to be tried again",
            )
        num_unchanged = self._sealed[0].num_unchanged
        failed = any(sealed.num_failed for sealed in self._sealed)
        result = self._result(
            "partial" if failed else "complete",
            int(ExitCode.DONE_WITH_FAILED_IMAGES if failed and not self._config.partial_ok else ExitCode.DONE),
            num_unchanged=num_unchanged,
        )
        if len(self._sealed) > 1:
            check_law(", ".join(result.runs), result.num_listed, result.num_predicted, result.num_failed, num_unchanged)
        return result

    def stopped(self, status: Literal["interrupted", "failed"], exit_code: int, message: str) -> PredictResult:
        """What is committed so far. Images of the open run that are not done count as not listed."""
        footers: list[Footer] = []
        if self._archive is not None and self._record is not None:
            with contextlib.suppress(UnetppError):  # a count is not worth hiding why the run stopped
                parts = table.list_parts(self._archive.output_uri, self._archive.model_digest, self._record.run)
                footers = table.read_footers(parts)
                num_done = sum(footer.num_predicted + footer.num_failed for footer in footers)
                message += f" ({self._record.run}: {num_done} of {self._record.num_images} images are done)"
        first = self._sealed[0] if self._sealed else self._record
        return self._result(status, exit_code, first.num_unchanged if first else 0, message, footers)

    def _result(
        self,
        status: Literal["complete", "partial", "unchanged", "interrupted", "failed"],
        exit_code: int,
        num_unchanged: int,
        message: str = "",
        footers: Sequence[Footer] = (),
    ) -> PredictResult:
        counted: list[PredictResult | Footer] = [*self._sealed, *footers]
        failures: Counter[str] = Counter()
        for each in counted:
            failures.update(each.failures)
        unfinished = sum(footer.num_predicted + footer.num_failed for footer in footers)
        listed = sum(sealed.num_listed - sealed.num_unchanged for sealed in self._sealed)
        runs = tuple(run for sealed in self._sealed for run in sealed.runs)
        return PredictResult(
            status=status,
            exit_code=exit_code,
            runs=runs if self._record is None else (*runs, self._record.run),
            model_digest=self._archive.model_digest if self._archive else "",
            table_uri=storage.join(self._archive.output_uri if self._archive else self._config.output, "table"),
            report_uri=self._sealed[-1].report_uri if self._sealed else None,
            num_listed=num_unchanged + listed + unfinished,
            num_predicted=sum(each.num_predicted for each in counted),
            num_failed=sum(each.num_failed for each in counted),
            num_unchanged=num_unchanged,
            failures=dict(sorted(failures.items())),
            megapixels=sum(each.megapixels for each in counted),
            seconds=self._seconds,
            message=message,
        )

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("predict")

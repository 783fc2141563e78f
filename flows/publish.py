"""What a night leaves to look at: Prefect artifacts, its job's lines and progress, and words on the terminal.

A flow lives without all of it: where Prefect's API does not answer, the work goes on and a line in the log says so.
"""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, Self
from uuid import UUID

from prefect import runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event
from prefect.states import Completed
from rich.console import Console
from rich.markup import escape

from flows.outcome import TrainOutcome
from flows.ray_jobs import JobBackend
from jobs.contract import PredictResult
from jobs.summary import chosen_table, counts_line, interval
from jobs.watch import Watch

logger = logging.getLogger(__name__)
job_logger = logging.getLogger("flows.job")

JOB_ARTIFACT = "ray-job"
PROGRESS_EVERY_S = 15.0
MAX_LINE = 2000
BURST_LINES, LINES_PER_S = 200, 0.1

Words = ParamSpec("Words")


def never_in_the_way(publish: Callable[Words, None]) -> Callable[Words, None]:
    """Make a failure to publish a warning: what is published is about the work, not the work."""

    @functools.wraps(publish)
    def guarded(*args: Words.args, **kwargs: Words.kwargs) -> None:
        try:
            publish(*args, **kwargs)
        except Exception as error:
            logger.warning("%s: Prefect did not take it (%s: %s)", publish.__name__, type(error).__name__, error)

    return guarded


class Following:
    """What is shown of a job while a flow follows it: which one it is, its lines, how far it is."""

    def __init__(self, backend: JobBackend, submission_id: str, watch: Watch | None) -> None:
        self._backend, self._name, self._watch = backend, submission_id, watch
        self._lines = _LineBudget(backend.url(submission_id)) if "PREFECT_API_URL" in os.environ else None
        self._progress: UUID | None = None
        self._shown, self._next = -1.0, 0.0
        self._is_named = False

    @property
    def on_screen(self) -> bool:
        """Whether all of the job's lines are shown to whoever started the flow."""
        return self._lines is None

    def say(self, line: str) -> None:
        """One line of the job's log: on a terminal as it is, in Prefect's log a bounded number of them."""
        if self._lines is None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        else:
            self._lines.say(line)

    def tick(self) -> None:
        """Show how far the job is, now and then."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PROGRESS_EVERY_S
        if not self._is_named:
            self._show_job()
        if self._watch is not None:
            self._show_progress()

    @never_in_the_way
    def _show_progress(self) -> None:
        assert self._watch is not None
        seen = self._watch.look()
        if seen is None or not seen.num_images or (share := 100 * seen.num_done / seen.num_images) == self._shown:
            return
        self._shown = share
        words = f"{seen.run}: {seen.num_done} of {seen.num_images} images"
        if self._progress is None:
            made = create_progress_artifact(share, key="progress", description=words)
            assert isinstance(made, UUID)
            self._progress = made
        else:
            update_progress_artifact(self._progress, progress=share, description=words)

    @never_in_the_way
    def _show_job(self) -> None:
        url = self._backend.url(self._name)
        text = f"`{self._name}` on {self._backend.where}" + (f": [its page]({url})" if url else "")
        create_markdown_artifact(text, key=JOB_ARTIFACT, description=self._name)
        self._is_named = True  # whoever cancels this flow run finds the job by it

    def __enter__(self) -> Self:
        self._show_job()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._watch is not None:
            self._show_progress()
        if self._lines is not None:
            self._lines.end()


class _LineBudget:
    """Prefect keeps every line for ever: some at once, then a few a minute, and a count of those left out."""

    def __init__(self, url: str | None) -> None:
        self._where = f"; all of them: {url}" if url else ""
        self._budget, self._filled, self._num_left_out = float(BURST_LINES), time.monotonic(), 0

    def say(self, line: str) -> None:
        now = time.monotonic()
        self._budget = min(BURST_LINES, self._budget + LINES_PER_S * (now - self._filled))
        self._filled = now
        if self._budget < 1:
            self._num_left_out += 1
            return
        self._budget -= 1
        self.end()
        job_logger.info("%s", line if len(line) <= MAX_LINE else line[:MAX_LINE] + " ...")

    def end(self) -> None:
        """Say how many lines were left out since the last one."""
        if self._num_left_out:
            job_logger.info("... %d lines left out%s", self._num_left_out, self._where)
            self._num_left_out = 0


@never_in_the_way
def publish_levels(outcome: TrainOutcome) -> None:
    """Publish the table of levels, with the chosen one, and the gate's decision."""
    rows = [
        {
            "level": report.name,
            "validation IoU": f"{report.score.mean_iou:.4f}",
            "95 % interval": interval(report.score),
            "parameters": report.num_parameters,
            "seconds per megapixel": f"{report.seconds_per_megapixel:.3f}",
            "chosen": "yes" if report.name == f"L{outcome.pruned.level}" else "",
        }
        for report in outcome.measured.reports
    ]
    words = outcome.gate.reason
    if outcome.quantised is not None:
        words += f"; {outcome.quantised.message}"
    create_table_artifact(rows, key="levels", description=words)


@never_in_the_way
def publish_archive(predicted: PredictResult) -> None:
    """Publish the counts of an archive run and the link to its report."""
    failures = "\n".join(f"| {code} | {number} |" for code, number in sorted(predicted.failures.items()))
    by_cause = f"\n\n| failed because | images |\n|---|---|\n{failures}" if failures else ""
    text = f"**{predicted.status}**: {counts_line(predicted)}\n\ntable: `{predicted.table_uri}`{by_cause}"
    create_markdown_artifact(text, key="archive", description=predicted.status)
    if predicted.report_uri:
        link = predicted.report_uri if "://" in predicted.report_uri else f"file://{predicted.report_uri}"
        create_link_artifact(link, key="report", link_text="report.html", description=counts_line(predicted))


def ended(predicted: PredictResult, value: object = None) -> Any:
    """Return the state that a flow ends with: Completed, with a warning where images failed, holding its result."""
    words = f"{predicted.status}: {counts_line(predicted)}"
    if predicted.num_failed:
        causes = ", ".join(f"{code} {number}" for code, number in sorted(predicted.failures.items()))
        words = f"warning, {predicted.num_failed} images failed ({causes}); {words}"
        logger.warning("%s", words)
        _tell_partial(words, predicted)
    return Completed(message=words, data=predicted if value is None else value)


@never_in_the_way
def _tell_partial(words: str, predicted: PredictResult) -> None:
    resource = {"prefect.resource.id": f"unetpp.night.{runtime.flow_run.id}", "prefect.resource.name": "a night"}
    emit_event("unetpp.night.partial", resource, payload={"words": words, "failures": predicted.failures})


@never_in_the_way
def publish_nights(rows: list[dict[str, str]]) -> None:
    """Publish the matrix of a backfill: a line a night."""
    create_table_artifact(rows, key="nights", description=f"{len(rows)} nights")


def show(outcome: TrainOutcome | None, predicted: PredictResult | None) -> None:
    """Say on the terminal where to look."""
    console = Console(emoji=False)
    if outcome is not None:
        console.print(chosen_table(outcome.measured.reports, outcome.pruned.level))
        _line(console, "level", f"L{outcome.pruned.level}, the cheapest within the tolerance")
        _line(console, "gate", outcome.gate.reason)
        if outcome.quantised is not None:
            _line(console, "int8", outcome.quantised.message)
    if predicted is not None:
        _line(console, predicted.status, counts_line(predicted))
        _line(console, "table", predicted.table_uri)
        if predicted.report_uri:
            _line(console, "report", predicted.report_uri)


def _line(console: Console, label: str, text: str) -> None:
    console.print(f"[bold]{label:>9}[/]  {escape(text)}", highlight=False, soft_wrap=True)

"""What a night leaves to look at: Prefect artifacts (levels, counts, the report's link), and lines on the terminal."""

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from rich.console import Console
from rich.markup import escape

from flows.stages import GateResult
from jobs.contract import EvaluateResult, PredictResult, PruneResult, TrainResult
from jobs.summary import chosen_table, counts_line, interval
from unetpp.config import Frozen


class TrainOutcome(Frozen):
    """The results of the four stages that make a model."""

    trained: TrainResult
    measured: EvaluateResult
    pruned: PruneResult
    gate: GateResult


def publish_levels(outcome: TrainOutcome) -> None:
    """Publish the table of levels, with the chosen one, and the gate's decision."""
    rows = [
        {
            "level": report.name,
            "validation IoU": f"{report.score.mean_iou:.4f}",
            "95 % interval": interval(report),
            "parameters": report.num_parameters,
            "seconds per megapixel": f"{report.seconds_per_megapixel:.3f}",
            "chosen": "yes" if report.name == f"L{outcome.pruned.level}" else "",
        }
        for report in outcome.measured.reports
    ]
    create_table_artifact(rows, key="levels", description=outcome.gate.reason)


def publish_archive(predicted: PredictResult) -> None:
    """Publish the counts of an archive run and the link to its report."""
    failures = "\n".join(f"| {code} | {number} |" for code, number in sorted(predicted.failures.items()))
    by_cause = f"\n\n| failed because | images |\n|---|---|\n{failures}" if failures else ""
    text = f"**{predicted.status}**: {counts_line(predicted)}\n\ntable: `{predicted.table_uri}`{by_cause}"
    create_markdown_artifact(text, key="archive", description=predicted.status)
    if predicted.report_uri:
        link = predicted.report_uri if "://" in predicted.report_uri else f"file://{predicted.report_uri}"
        create_link_artifact(link, key="report", link_text="report.html", description=counts_line(predicted))


def show(outcome: TrainOutcome | None, predicted: PredictResult | None) -> None:
    """Say on the terminal where to look."""
    console = Console()
    if outcome is not None:
        console.print(chosen_table(outcome.measured.reports, outcome.pruned.level))
        _line(console, "level", f"L{outcome.pruned.level}, the cheapest within the tolerance")
        _line(console, "gate", outcome.gate.reason)
    if predicted is not None:
        _line(console, predicted.status, counts_line(predicted))
        _line(console, "table", predicted.table_uri)
        if predicted.report_uri:
            _line(console, "report", predicted.report_uri)


def _line(console: Console, label: str, text: str) -> None:
    console.print(f"[bold]{label:>9}[/]  {escape(text)}", highlight=False, soft_wrap=True)

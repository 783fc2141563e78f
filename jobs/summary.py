"""A job's result for a person at a terminal: a table or a few lines."""

from collections.abc import Sequence

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.contract import (
    AssembleResult,
    CompactResult,
    EvaluateResult,
    ExplainResult,
    ForgetResult,
    GcResult,
    InspectResult,
    LevelReport,
    PredictResult,
    PruneResult,
    QuantiseResult,
    RollbackResult,
    Score,
    StatusResult,
    SynthResult,
    TrainResult,
)
from unetpp.card import INT8_COLUMNS, int8_rows


def show(result: BaseModel, console: Console) -> None:
    """Print what a job did, and where."""
    match result:
        case TrainResult():
            levels = ", ".join(f"L{level} {iou:.4f}" for level, iou in sorted(result.val_iou.items()))
            _line(
                console,
                "trained",
                f"{result.run}: {result.epochs} epochs, {result.steps} steps, {result.seconds:.0f} s",
            )
            _line(console, "validation IoU", levels)
            _line(console, "model", f"{result.model_uri} (digest {result.digest[:10]})")
        case EvaluateResult():
            console.print(level_table(result.reports))
            if groups := group_table(result.reports):
                console.print(groups)
            _line(console, "model", f"{result.model_uri} (digest {result.digest[:10]})")
        case PruneResult():
            if result.choices:
                console.print(choice_table(result))
            _line(console, "pruned", f"level L{result.level}: {result.model_uri} (digest {result.digest[:10]})")
        case QuantiseResult():
            console.print(int8_table(result))
            _line(console, "quantised" if result.accepted else "refused", result.message)
            _line(console, "model", f"{result.model_uri} (digest {result.digest[:10]})")
        case PredictResult():
            _show_predict(result, console)
        case StatusResult():
            _show_status(result, console)
        case ExplainResult():
            _show_explain(result, console)
        case CompactResult():
            for each in result.compactions:
                what = f"{each.num_parts_before} parts of {len(each.compacted)} runs became {each.num_parts}"
                _line(
                    console,
                    each.run,
                    f"{what}, {each.num_rows} rows; a day later unetpp gc --delete removes the old ones",
                )
            if not result.compactions:
                _line(console, "unchanged", f"no part would be saved in {result.output_uri}")
        case GcResult():
            found = ", ".join(f"{number} {kind}" for kind, number in result.objects.items()) or "nothing"
            size = f"{result.size_bytes / 1e6:.1f} MB of {result.output_uri}"
            _line(console, "removed" if result.deleted else "would remove", f"{found}: {size}")
            if result.objects and not result.deleted:
                _line(console, "note", "nothing was removed; --delete does it")
        case AssembleResult():
            windows = "1 mask" if result.num_windows == 1 else f"{result.num_windows} windows"
            _line(console, "assembled", f"{result.key}: {windows}, {result.height} x {result.width}")
            _line(console, "mask", result.out)
        case ForgetResult():
            _line(console, "forgotten", f"{result.key}: {result.num_rows} row(s) of {', '.join(result.runs)}")
        case RollbackResult():
            _line(console, "current", f"number {result.number}: {result.model_uri}, level L{result.level}")
            _line(console, "why", result.reason)
        case InspectResult():
            _show_inspect(result, console)
        case SynthResult():
            _line(console, "synthesised", f"{result.num_images} images: {result.data_uri}")
        case _:
            console.print_json(result.model_dump_json())


def level_table(reports: Sequence[LevelReport]) -> Table:
    """Quality and cost, one row a level."""
    table = _table(
        "Quality and cost by level", "level", "IoU", "95 % interval", "Dice", "parameters", "GMAC/MP", "s/MP"
    )
    for report in reports:
        table.add_row(
            report.name,
            f"{report.score.mean_iou:.4f}",
            interval(report.score),
            f"{report.score.mean_dice:.4f}",
            f"{report.num_parameters:,}",
            f"{report.gmacs_per_megapixel:.1f}",
            f"{report.seconds_per_megapixel:.3f}",
        )
    return table


def chosen_table(reports: Sequence[LevelReport], level: int) -> Table:
    """Validation quality and cost, one row a level, with the chosen one marked."""
    table = _table("Levels on the validation split", "level", "IoU", "95 % interval", "parameters", "s/MP", "chosen")
    for report in reports:
        is_chosen = report.name == f"L{level}"
        table.add_row(
            report.name,
            f"{report.score.mean_iou:.4f}",
            interval(report.score),
            f"{report.num_parameters:,}",
            f"{report.seconds_per_megapixel:.3f}",
            "yes" if is_chosen else "",
            style="bold" if is_chosen else None,
        )
    return table


def int8_table(result: QuantiseResult) -> Table:
    """Mean IoU in float32 and in int8, over all images and by group."""
    table = _table("int8 against float32", *INT8_COLUMNS)
    for row in int8_rows(result.scores):
        table.add_row(*row)
    return table


def interval(score: Score) -> str:
    """`low .. high` of the mean IoU."""
    return "{:.3f} .. {:.3f}".format(*score.mean_iou_interval)


def group_table(reports: Sequence[LevelReport]) -> Table | None:
    """Mean IoU by group, a block of rows a group; None where the set has no groups."""
    if not reports or not reports[0].groups:
        return None
    table = _table("Mean IoU by group", "group", "images", "level", "IoU", "95 % interval")
    for group, first in reports[0].groups.items():
        for report in reports:
            score = report.groups[group]
            name, number = (escape(group), str(first.num_images)) if report is reports[0] else ("", "")
            # one image has no interval
            bounds = interval(score) if score.num_images > 1 else ""
            table.add_row(name, number, report.name, f"{score.mean_iou:.4f}", bounds)
        table.add_section()
    return table


def choice_table(result: PruneResult) -> Table:
    """How each level compares with the best one."""
    table = _table("Levels against the best one", "level", "IoU", "loss to best", "upper bound", "within tolerance")
    for choice in result.choices:
        table.add_row(
            f"L{choice.level}",
            f"{choice.mean_iou:.4f}",
            f"{choice.loss_to_best:.4f}",
            f"{choice.loss_upper_bound:.4f}",
            "yes" if choice.within_tolerance else "no",
            style="bold" if choice.level == result.level else None,
        )
    return table


def counts_line(result: PredictResult) -> str:
    """`N images -> N rows: ...`, the conservation law in words."""
    rows = result.num_predicted + result.num_failed + result.num_unchanged
    return (
        f"{result.num_listed} images -> {rows} rows: {result.num_predicted} predicted, {result.num_failed} failed, "
        f"{result.num_unchanged} unchanged"
    )


def _show_predict(result: PredictResult, console: Console) -> None:
    _line(console, result.status, counts_line(result))
    for code, number in sorted(result.failures.items()):
        _line(console, f"  {code}", str(number))
    if result.message:
        _line(console, "note", result.message)
    if result.megapixels and result.seconds:
        rate = result.megapixels / result.seconds
        _line(console, "rate", f"{result.megapixels:.1f} megapixels in {result.seconds:.1f} s ({rate:.2f} MP/s)")
    _line(console, "table", result.table_uri)
    if result.report_uri:
        _line(console, "report", result.report_uri)


def _show_status(result: StatusResult, console: Console) -> None:
    num_done = result.num_predicted + result.num_failed
    state: str = result.state if result.state != "open" else "working, or waiting for the same command to go on"
    state += f" into {result.compacted_into}" if result.compacted_into else ""
    _line(console, result.run, state + (f", a retry of {result.parent}" if result.parent else ""))
    _line(console, "archive", ", ".join(result.sources))
    _line(
        console,
        "done",
        f"{num_done} of {result.num_images} images ({result.num_predicted} predicted, {result.num_failed} failed), "
        f"{result.num_shards_done} of {result.num_shards} shards; {result.num_unchanged} unchanged before",
    )
    for code, number in result.failures.items():
        _line(console, f"  {code}", str(number))
    if result.last_commit_at is not None:
        left = "" if result.seconds_left is None else f", about {result.seconds_left:.0f} s left at this rate"
        _line(
            console,
            "rate",
            f"{result.images_per_second or 0:.2f} images a second, last commit "
            f"{result.last_commit_at:%Y-%m-%d %H:%M:%S} UTC{left}",
        )


def _show_explain(result: ExplainResult, console: Console) -> None:
    if result.is_in_manifest:
        _line(console, result.run, f"listed {result.key}: {result.size_bytes} bytes, version {result.etag}")
        _line(console, "shard", f"{result.shard}, {'committed' if result.is_committed else 'not committed'}")
    else:
        why = "done before, not matched by include, or not in the archive when the run was opened"
        _line(console, result.run, f"has no {result.key}: {why}")
    for row in result.rows:
        size = f", {row.height} x {row.width}" if row.height else ""
        if row.num_windows > 1:
            size += f", window at y {row.window_y}, x {row.window_x} of {row.num_windows}"
        _line(
            console, row.run, f"{row.outcome} at attempt {row.attempts}, level L{row.level}{size}, version {row.etag}"
        )
        if row.error:
            _line(console, "  why", row.error)
        if row.class_pixels:
            _line(console, "  pixels by class", ", ".join(map(str, row.class_pixels)))
        if row.mask_uri:
            _line(console, "  mask", row.mask_uri)
        _line(console, "  row in", row.part_uri)
    if not result.rows:
        _line(console, "rows", "none in the table yet")


SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def _show_inspect(result: InspectResult, console: Console) -> None:
    values = _table("What the images hold", "split", "group", "images", "pixels", "values", "mean", "mask")
    for row in result.groups:
        values.add_row(
            escape(row.split),
            escape(row.group),
            str(row.num_images),
            row.pixel_types,
            "" if row.low is None else f"{row.low:g}..{row.high:g}",
            "" if row.mean is None else f"{row.mean:.4g}",
            "" if row.foreground is None else f"{row.foreground:.1%}",
        )
    console.print(values)
    for finding in result.findings:
        style = SEVERITY_STYLES[finding.severity]
        console.print(f"[{style}]{finding.severity}[/] [bold]{finding.code}[/]", highlight=False)
        _line(console, f"  {finding.count}", finding.what)
        _line(console, "  first", ", ".join(map(_short, finding.ids)))
        _line(console, "  do", finding.advice)
    counts = {severity: sum(found.severity == severity for found in result.findings) for severity in SEVERITY_STYLES}
    told = (
        ", ".join(f"{number} {severity}(s)" for severity, number in counts.items() if number) or "nothing wrong found"
    )
    _line(console, "inspected", f"{result.num_images} images of {result.data}: {told}")
    if result.output is not None:
        _line(console, "written", f"{result.output}: contact_sheet.png, images.csv, inspect.json")


def _short(ids: str) -> str:
    """Ids, joined by a plus where several belong together, cut to what a line has room for."""
    return " + ".join(id_ if len(id_) <= 24 else id_[:23] + "…" for id_ in ids.split(" + "))


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _line(console: Console, label: str, text: str) -> None:
    console.print(f"[bold]{escape(label)}[/]  {escape(text)}", highlight=False, soft_wrap=True)

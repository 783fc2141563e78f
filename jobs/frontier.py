"""The picture of a level choice: quality against measured cost, over all images and group by group."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from jobs.contract import ACCURATE, LevelReport, Score
from unetpp.card import Choice

MAX_GROUPS = 11
MAX_COLUMNS = 3
MIN_IMAGES = 2
"""A group of one image has no interval, and no panel."""

LEVELS, MODES, KEPT = "#1f6fb4", "#d9730d", "#1a7f37"


def frontier_png(reports: Sequence[LevelReport], choice: Choice | None = None) -> bytes:
    """PNG bytes: a panel over all images, then one for each group of two images or more, the largest ones first.

    Points are outputs, bars their 95 % bootstrap intervals over images. Panels share the axis of cost and not that of
    quality: groups are as hard as they are. With `choice`, the first panel shows which level it kept, and why.
    """
    sizes = {group: score.num_images for group, score in reports[0].groups.items() if score.num_images >= MIN_IMAGES}
    groups = sorted(sizes, key=lambda group: (-sizes[group], group))[:MAX_GROUPS]
    panels = [("all images", [report.score for report in reports])]
    panels += [(group, [report.groups[group] for report in reports]) for group in groups]
    num_columns = 2 if len(panels) == 4 else min(MAX_COLUMNS, len(panels))
    num_rows = -(-len(panels) // num_columns)
    size = (max(6.4, 4.2 * num_columns), max(4.2, 3.3 * num_rows))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True).ravel().tolist()
    for axes, (title, scores) in zip(grid, panels, strict=False):
        axes.set_title(f"{title} (n = {scores[0].num_images})", fontsize=10)
        _draw(axes, reports, scores)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    if choice is not None:
        _mark(grid[0], reports, choice)
    figure.supxlabel("seconds per megapixel on the machine that measured", fontsize=9)
    figure.supylabel("mean IoU over images, 95 % interval", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw(axes: Axes, reports: Sequence[LevelReport], scores: Sequence[Score]) -> None:
    costs = [report.seconds_per_megapixel for report in reports]
    for report, score in zip(reports, scores, strict=True):
        low, high = score.mean_iou_interval
        mean, cost = score.mean_iou, report.seconds_per_megapixel
        is_level = report.name.startswith("L")
        axes.errorbar(
            [cost],
            [mean],
            yerr=[[max(0.0, mean - low)], [max(0.0, high - mean)]],
            fmt="o" if is_level else "D",
            ms=5,
            capsize=3,
            lw=1.2,
            color=LEVELS if is_level else MODES,
        )
        # Accurate mode costs about as much as the deepest level: their names go to different sides.
        where, side = ((6, -9), "left") if report.name == ACCURATE else ((-9, 6), "right")
        axes.annotate(report.name, (cost, mean), textcoords="offset points", xytext=where, ha=side, fontsize=8)
    levels = [place for place, report in enumerate(reports) if report.name.startswith("L")]
    axes.plot([costs[n] for n in levels], [scores[n].mean_iou for n in levels], "-", color=LEVELS, lw=1, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.9, max(costs) * 1.9)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8, labelbottom=True)
    axes.grid(alpha=0.25)


def _mark(axes: Axes, reports: Sequence[LevelReport], choice: Choice) -> None:
    best = max(each.mean_iou for each in choice.levels)
    axes.axhspan(best - choice.tolerance, best, color=KEPT, alpha=0.12, lw=0)
    (kept,) = [report for report in reports if report.name == f"L{choice.level}"]
    axes.plot(
        [kept.seconds_per_megapixel], [kept.score.mean_iou], "o", ms=14, mfc="none", mec=KEPT, mew=2
    )  # the ring around the point
    axes.text(
        0.98,
        0.03,
        f"kept: L{choice.level}, the cheapest that loses\nat most {choice.tolerance:g} (band) at "
        f"{100 * choice.confidence:g} % confidence",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8,
        color=KEPT,
    )

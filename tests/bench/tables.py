"""The results of `make bench` as tables in Markdown, as README.md beside it quotes them.

python -m tests.bench.tables tests/bench/results
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table: its first column is text, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def middle(figure: Report, digits: int = 2) -> str:
    """A median and its range over rounds."""
    return f"{figure['median']:.{digits}f} ({figure['from']:.{digits}f} to {figure['to']:.{digits}f})"


def engines(report: Report) -> list[str]:
    """CPU milliseconds of an image by level with one thread, and shares of the peak at the deepest level."""
    threads, levels = report["arguments"]["threads"], report["arguments"]["levels"]
    rows = {(row["engine"], row["level"], row["threads"]): row for row in report["engines"]}
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in report["engines"]):
        alone = [rows[engine, level, 1] for level in levels]
        cells = [f"{row['cpu_ms']:.1f} ({row['over_eager']['median']:.2f}x)" for row in alone]
        both = rows[engine, levels[-1], threads]
        lines.append(
            [
                engine,
                *cells,
                f"{both['wall_ms']:.0f} ({both['over_eager']['median']:.2f}x)",
                f"{both['share_of_peak']:.0%}" if "share_of_peak" in both else "",
            ]
        )
    header = [
        "CPU ms an image",
        *(f"L{level}" for level in levels),
        f"L{levels[-1]}, {threads} threads, wall",
        "of the peak",
    ]
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in report["peak_gops"].items())
    return [*table(header, lines), "", f"Peaks, billions of operations a second, by threads: {peaks}."]


def peers(report: Report) -> list[str]:
    """What an image costs with each program, and how many times that is of each of ours."""
    programs = [row["program"] for row in report["programs"]]
    mine = [name for name in programs if name.startswith("unetpp")]
    lines = []
    for row in report["programs"]:
        times = [report["ratios"].get(f"{row['program']} / {name}") for name in mine]
        cells = [f"{ratio['cpu_s']['median']:.1f}x" if ratio else "" for ratio in times]
        figures = ("cpu_s_per_image", "wall_s_per_image", "cpu_s_to_start")
        lines.append([row["program"], *(middle(row[figure], 3) for figure in figures), *cells])
    return table(["", "CPU s an image", "wall s an image", "CPU s to start", *(f"over {name}" for name in mine)], lines)


def pipe(report: Report) -> list[str]:
    """Milliseconds of the three computations alone, and what the pipe reaches of their sum."""
    lines = [
        [
            row["variant"],
            *(
                " + ".join(f"{1000 * row[how][stage]['median']:.1f}" for stage in ("decode_s", "engine_s", "encode_s"))
                for how in ("alone", "alone on every core")
            ),
            f"{1000 * row['wall_s_per_image']['median']:.1f}",
            f"{1000 * row['cpu_s_per_image']['median']:.1f}",
            *(middle(row[f"{clock}_share"]["alone"]) for clock in ("wall", "cpu")),
            middle(row["cpu_share"]["alone on every core"]),
        ]
        for row in report["pipe"]
    ]
    header = ["", "decode + engine + encode alone, CPU ms", "on every core at once", "pipe, wall ms", "pipe, CPU ms"]
    return table([*header, "share of the ideal, wall", "CPU", "CPU, of every core at once"], lines)


def split(report: Report) -> list[str]:
    """MiB by number of images."""
    lines = [
        [name, *(f"{max(each[key] for each in samples):.0f}" for key in ("decoded_mib", "peak_mib", "spilled_mib"))]
        for name, samples in report["samples"].items()
    ]
    return table(["", "MiB decoded", "MiB held at most", "MiB spilled"], lines)


def cost(report: Report) -> list[str]:
    """By side what a megapixel costs, and how far from the mean a fed one is; what early and late images cost."""
    lines = [
        [row["side_px"], f"{row['computed_to_kept']:.2f}", f"{row['cpu_s_per_mp']:.3f}", f"{row['off']:+.1%}"]
        for row in report["sides"]
    ]
    late, ends = report["numbers"]["late_to_early"], report["numbers"]["sizes"]
    sentence = f"An image between {ends[1]} and {ends[2]} costs {middle(late)} of one between {ends[0]} and {ends[1]}."
    return [*table(["side, px", "computed / kept", "CPU s / MP", "a fed MP, off"], lines), "", sentence]


def startup(report: Report) -> list[str]:
    """Seconds to the first commit and to the end, and the CPU seconds of it all."""
    figures = ("first_commit_s", "wall_s", "cpu_s")
    lines = [[row["variant"], *(middle(row[figure]) for figure in figures)] for row in report["variants"]]
    return table(["", "s to the first commit", "s to the end", "CPU s"], lines)


def frontier(report: Report) -> list[str]:
    """Quality and cost by engine and level."""
    lines = [
        [
            f"{row['engine']} L{row['level']}",
            f"{row['mean_iou']:.4f}",
            middle(row["cpu_s_per_mp"], 3),
            "yes" if row["is_best"] else "",
        ]
        for row in report["points"]
    ]
    return table(["", "mean IoU", "CPU s / MP", "none as good for less"], lines)


TABLES: dict[str, Callable[[Report], list[str]]] = {
    "engines": engines,
    "peers": peers,
    "pipe": pipe,
    "split": split,
    "cost": cost,
    "startup": startup,
    "frontier": frontier,
}


def main() -> None:
    """Print the tables of the results that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    asked = parser.parse_args()
    for name, lines_of in TABLES.items():
        if (path := asked.results / f"{name}.json").exists():
            report = json.loads(path.read_text())
            print(f"### {name}, {report['date'][:10]}, {report['machine']}", "", *lines_of(report), "", sep="\n")
            for what, target in report.get("targets", {}).items():
                print(f"- {what}: {', '.join(f'{name} {value:.3g}' for name, value in target.items())}")
            for what, reason in report["skipped"].items():
                print(f"- skipped: {what}: {reason}")


if __name__ == "__main__":
    main()

"""From the command to the first mask that is committed: how long, and where the seconds go.

    python -m tests.bench.startup --data <dsb2018> --against 48b6fc1 --out tests/bench/results/startup.json

`unetpp predict` on a folder of 20 images, in this process and on Ray; with --against, an older revision's in turn with
it, each from its own work tree with its own model folder. The first commit is when the first part is there, by its
file. `tests/bench/probe/` notes when imports, planning, loading and shards begin and end in every process; spans may
lie in one another. 48b6fc1 is the last revision before leases, drains and guarded decoders.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.processes import environment, measured, new_output
from tests.bench.rounds import Measured, Sample, interleaved, spread, write
from tests.bench.subjects import PAPER, crops, write_images

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).parent / "probe"
FIGURES = ("first_commit_s", "wall_s", "cpu_s")
WRITE_MODEL = """
import sys, torch
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus
torch.manual_seed(0)
config = ModelConfig(level=int(sys.argv[2]), filters=tuple(map(int, sys.argv[3:])))
save_pretrained(UNetPlusPlus(config).eval(), sys.argv[1])
"""


@dataclass(frozen=True)
class Command:
    """`unetpp predict` of one work tree."""

    tree: Path
    model: Path
    backend: str
    flags: tuple[str, ...] = ()


@contextlib.contextmanager
def work_tree(revision: str, folder: Path) -> Iterator[Path]:
    """A revision checked out in a folder of its own, for as long as the block lasts."""
    tree = folder / f"tree-{revision}"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(tree), revision], check=True, capture_output=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)


def write_model(tree: Path, model: Path, asked: argparse.Namespace) -> None:
    """A network with random weights, written by the work tree's own code."""
    words = [sys.executable, "-c", WRITE_MODEL, model, asked.level, *asked.filters]
    measured(words, environment(1, PYTHONPATH=tree), cwd=tree)


def run(command: Command, images: Path, folder: Path) -> Sample:
    """One start: seconds to the first commit and to the end; spans of the driver and of the worker that was first."""
    output, notes = new_output(folder), folder / "notes"
    notes.unlink(missing_ok=True)
    words = [sys.executable, "-m", "jobs.cli", "predict", "--model", str(command.model)]
    words += ["--input", str(images), "--output", str(output)]
    words += ["--backend", command.backend, "--threads", "1", *command.flags]
    paths = f"{command.tree}:{PROBE}"
    cost = measured(words, environment(1, PYTHONPATH=paths, UNETPP_BENCH_NOTES=notes), cwd=command.tree)
    first = min(path.stat().st_mtime for path in (output / "table").rglob("*.parquet"))
    spans = [json.loads(line) for line in notes.read_text().splitlines()]
    return {"first_commit_s": first - cost.started, **cost.figures(), "spans": told(spans, cost.started)}


def told(notes: list[dict[str, Any]], started: float) -> dict[str, list[float]]:
    """Of each span begin, from the command on, seconds and CPU seconds: driver's and first committing worker's."""
    driver = next(note["pid"] for note in notes if note["span"] == "import jobs.predict")
    commits = sorted((note["end"], note["pid"]) for note in notes if note["span"] == "jobs.sink.commit")
    roles = (
        {driver: "driver"} if not commits or commits[0][1] == driver else {driver: "driver", commits[0][1]: "worker"}
    )
    return {
        f"{roles[note['pid']]}: {note['span']}": [note["begin"] - started, note["end"] - note["begin"], note["cpu_s"]]
        for note in sorted(notes, key=lambda note: note["begin"])
        if note["pid"] in roles
    }


def table(found: Measured, name: str) -> dict[str, Any]:
    """Medians and ranges of a variant; of its spans the median begin, length and CPU time."""
    samples = found.samples[name]
    spans: dict[str, list[float]] = {}
    for span in samples[0]["spans"]:
        each = [sample["spans"][span] for sample in samples if span in sample["spans"]]
        spans[span] = [round(spread([values[n] for values in each])["median"], 3) for n in range(3)]
    figures = {figure: spread(found.values(name, figure)) for figure in FIGURES}
    return {"variant": name, **figures, "begin_seconds_cpu": spans}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--against", metavar="REVISION", help="an older revision to compare with")
    parser.add_argument("--backends", nargs="+", default=["inline", "ray"])
    parser.add_argument(
        "--flags", nargs="+", default=[], help="further flags of this checkout's predict, as --engine=x"
    )
    parser.add_argument("--level", type=int, default=4)
    parser.add_argument("--filters", type=int, nargs=5, default=PAPER)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_images(folder / "images", crops(asked.data, asked.images))
        trees = {"this": ROOT}
        if asked.against:
            trees[asked.against] = stack.enter_context(work_tree(asked.against, folder))
        commands = {}
        for label, tree in trees.items():
            write_model(tree, folder / f"model-{label}", asked)
            for backend in asked.backends:
                flags = tuple(asked.flags) if label == "this" else ()
                commands[f"{label}, {backend}"] = Command(tree, folder / f"model-{label}", backend, flags)
        found = interleaved(commands, asked.rounds, partial(run, images=folder / "images", folder=folder))
    ratios = {
        f"{backend}: {asked.against} / this": {
            figure: found.ratio(f"{asked.against}, {backend}", f"this, {backend}", figure) for figure in FIGURES
        }
        for backend in (asked.backends if asked.against else [])
    }
    variants = [table(found, name) for name in found.samples]
    write(asked.out, vars(asked), found, ("openvino",), ratios=ratios, variants=variants)


if __name__ == "__main__":
    main()

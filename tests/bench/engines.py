"""Engines side by side: time of one image at each level, and which share of the machine's measured peak that is.

    python -m tests.bench.engines --data <dsb2018> --out tests/bench/results/engines.json

A network of the paper's widths with random weights segments 256 x 256 images, one at a time. Each engine at each level
is a process of its own, all in turn with matrix products that tell the peak: CPU time with one thread, wall time with
two. `eager` is torch as everyone writes it (float32, NCHW, nothing folded); `+malloc` is the same with an allocator
that keeps freed memory; all others are engines of `Predictor`. The peak of float32 is the faster of two libraries'.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench.models import engine_model, random_models
from tests.bench.processes import environment, last_line, measured
from tests.bench.rounds import Measured, Sample, interleaved, write
from tests.bench.subjects import PAPER, crops, eager
from unetpp.allocator import KEEP_FREED
from unetpp.checkpoint import read_pretrained
from unetpp.config import Level
from unetpp.engine_names import PRECISION
from unetpp.model import count_gmacs
from unetpp.predictor import Predictor

SIDE_PX, NUM_IMAGES = 256, 4
MATRIX = 2048
PEAKS = {"f32": ("torch.mm", "oneDNN linear"), "bf16": ("torch.mm bf16",), "int8": ("torch._int_mm",)}
"""Products that tell the peak of a precision."""
TARGETS = {"openvino": 0.80, "openvino-int8": 0.70, "torch": 0.68}
"""Shares of the peak at L4 with two threads."""
BASELINE = "eager"


@dataclass(frozen=True)
class Variant:
    """One process: an engine at a level, or a matrix product."""

    name: str
    threads: int
    level: Level | None = None

    def __str__(self) -> str:
        return f"{self.name} L{self.level} x{self.threads}" if self.level else f"{self.name} x{self.threads}"


def one(name: str, threads: int, level: Level | None, model_dir: Path, data: Path, seconds: float) -> Sample:
    """Time one engine, or one matrix product, in this process."""
    torch.set_num_threads(threads)
    if level is None:
        work, num_operations = _product(name), 2 * MATRIX**3
        sample = _timed([work], seconds)
        return sample | {
            key.replace("_ms", "_gops"): num_operations / sample[key] / 1e6 for key in ("cpu_ms", "wall_ms")
        }
    images = crops(data, NUM_IMAGES, SIDE_PX)
    started = time.perf_counter()
    if name.partition("+")[0] == BASELINE:
        segment: Callable[[Any], Any] = eager(model_dir, level)
    else:
        predictor = Predictor.from_pretrained(
            model_dir,
            level=level,
            engine=name.partition("+")[0],  # type: ignore[arg-type]
            threads=threads,
        )
        segment = lambda image: predictor([image])[0]  # noqa: E731
    foreground = sum(int((segment(image) > 0).sum()) for image in images)
    ready_s = time.perf_counter() - started
    sample = _timed([partial(segment, image) for image in images], seconds)
    return sample | {"ready_s": ready_s, "foreground_px": foreground}


def _timed(work: list[Callable[[], Any]], seconds: float) -> Sample:
    """Milliseconds of each piece of work, over at least so many CPU seconds."""
    for piece in work:
        piece()
    num, cpu, wall = 0, time.process_time(), time.perf_counter()
    while num < len(work) or time.process_time() - cpu < seconds:
        work[num % len(work)]()
        num += 1
    cpu_ms, wall_ms = 1000 * (time.process_time() - cpu) / num, 1000 * (time.perf_counter() - wall) / num
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"cpu_ms": cpu_ms, "wall_ms": wall_ms, "num_timed": num, "peak_mib": peak_mib}


def _product(name: str) -> Callable[[], Any]:
    if name == "torch._int_mm":
        one_, other = (torch.randint(-127, 127, (MATRIX, MATRIX), dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(one_, other)
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    left, right = (torch.randn(MATRIX, MATRIX, dtype=dtype) for _ in range(2))
    if name.startswith("torch.mm"):
        return lambda: torch.mm(left, right)
    return lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def in_a_process(variant: Variant, asked: argparse.Namespace, models: dict[str, Path]) -> Sample:
    """Time a variant in a fresh process."""
    model = engine_model(variant.name.partition("+")[0], models) if variant.level else Path("unused")
    words = [sys.executable, "-m", "tests.bench.engines", "--data", asked.data, "--out", "unused"]
    words += ["--seconds", asked.seconds, "--one", variant.name, variant.threads, variant.level or 0, model]
    keep = KEEP_FREED if variant.name.endswith("+malloc") else {}
    return json.loads(last_line(measured(words, environment(variant.threads, **keep))))


def peak_gops(measured: Measured, precision: str, threads: int) -> float:
    """The fastest product of a precision: by CPU time with one thread, by wall time with more."""
    figure = "cpu_gops" if threads == 1 else "wall_gops"
    values = [measured.middle(str(Variant(name, threads)), figure) for name in PEAKS[precision]]
    return max(value for value in values if value is not None)


def table(measured: Measured, asked: argparse.Namespace, gmacs: dict[int, float]) -> list[dict[str, Any]]:
    """A row for every engine and level: milliseconds, share of the peak, times faster than the baseline."""
    rows = []
    for threads in (1, asked.threads):
        figure = "cpu_ms" if threads == 1 else "wall_ms"
        for level in asked.levels:
            for name in asked.engines:
                if (time_ms := measured.middle(key := str(Variant(name, threads, level)), figure)) is None:
                    continue
                precision = PRECISION.get(name, "f32")
                row = {"engine": name, "level": level, "threads": threads, figure: time_ms, "precision": precision}
                row["share_of_peak"] = 2 * gmacs[level] * 1000 / time_ms / peak_gops(measured, precision, threads)
                for peer in (BASELINE, f"{BASELINE}+malloc"):
                    row[f"over_{peer}"] = measured.ratio(str(Variant(peer, threads, level)), key, figure)
                rows.append(row)
    return rows


def targets(rows: list[dict[str, Any]], threads: int) -> dict[str, dict[str, Any]]:
    """What was wanted of the engines at L4, and what was seen."""
    at_l4 = [row for row in rows if row["level"] == 4 and row["threads"] == threads]
    seen = {row["engine"]: row["share_of_peak"] for row in at_l4}
    return {
        f"{name}, share of the peak": {"wanted": wanted, "seen": seen[name], "met": seen[name] >= wanted}
        for name, wanted in TARGETS.items()
        if name in seen
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    names = [
        BASELINE,
        f"{BASELINE}+malloc",
        "reference",
        "torch",
        "compiled",
        "openvino",
        "openvino-bf16",
        "openvino-int8",
    ]
    parser.add_argument("--engines", nargs="+", default=names)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--filters", type=int, nargs=5, default=PAPER)
    parser.add_argument("--threads", type=int, default=2, help="of the runs that are timed by the clock on the wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds of one timing")
    parser.add_argument("--one", nargs=4, metavar=("ENGINE", "THREADS", "LEVEL", "MODEL"), help="in this process")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.one:
        name, threads, level, model = asked.one
        print(json.dumps(one(name, int(threads), int(level) or None, Path(model), asked.data, asked.seconds)))
        return
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as folder:
        models, absent = random_models(Path(folder), asked.filters, asked.data, asked.engines)
        variants = [
            Variant(name, threads) for names in PEAKS.values() for name in names for threads in (1, asked.threads)
        ]
        variants += [
            Variant(name, threads, level)
            for name in asked.engines
            if name not in absent
            for level in asked.levels
            for threads in (1, asked.threads)
        ]
        found = interleaved(
            {str(variant): variant for variant in variants},
            asked.rounds,
            lambda each: in_a_process(each, asked, models),
        )
        found.skipped |= absent
        config = read_pretrained(models["float32"]).model.model_copy(update={"deep_supervision": False})
        gmacs = {n: count_gmacs(config.model_copy(update={"level": n}), SIDE_PX, SIDE_PX) for n in asked.levels}
    rows = table(found, asked, gmacs)
    peaks = {
        f"{precision} x{threads}": peak_gops(found, precision, threads)
        for precision in PEAKS
        for threads in (1, asked.threads)
    }
    packages = ("openvino", "nncf")
    write(asked.out, vars(asked), found, packages, peak_gops=peaks, targets=targets(rows, asked.threads), engines=rows)


if __name__ == "__main__":
    main()

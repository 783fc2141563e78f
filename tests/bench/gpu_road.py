"""How idle a GPU is over an archive, end to end, in both topologies and with several workers on it.

    python -m tests.bench.gpu_road --out tests/bench/results/gpu_road.json

`unetpp predict` on Ray, L4 of the paper's widths with random weights, from PNG to committed mask, each image a file of
its own. Counted is from the first tenth of the images committed to the last tenth: images a second, the share of the
time in which the GPU had no kernel (as nvidia-smi samples it), and the machine's idle CPUs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from PIL import Image

from tests.bench.gpu import tiles_of
from tests.bench.processes import environment, measured, new_output
from tests.bench.rounds import Sample, interleaved, write
from tests.bench.subjects import PAPER, write_random_model
from unetpp.synth import synthesize

UNIQUE = 32
MOST_IDLE = 0.1


class Looks:
    """Inside the block: what share of the time the GPU and the CPUs are at work, by the clock."""

    def __init__(self) -> None:
        self.gpu: list[tuple[float, float]] = []
        self.cpu: list[tuple[float, float]] = []

    def __enter__(self) -> "Looks":
        words = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        self._asked = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self) -> None:
        assert self._asked.stdout is not None
        psutil.cpu_percent()
        for line in self._asked.stdout:
            now = time.time()
            self.gpu.append((now, float(line) / 100))
            self.cpu.append((now, psutil.cpu_percent() / 100))

    def __exit__(self, *_: Any) -> None:
        self._asked.terminate()
        self._thread.join()


def images_in(folder: Path, num: int, side: int) -> Path:
    """So many names of a few synthetic images."""
    folder.mkdir()
    for n in range(UNIQUE):
        image_HWC = synthesize(n, size=side, modality=("fluorescence", "brightfield")[n % 2])[0]
        Image.fromarray(image_HWC).save(folder.parent / f"{side}-{n}.png")
    for n in range(num):
        os.link(folder.parent / f"{side}-{n % UNIQUE}.png", folder / f"{n:06d}.png")
    return folder


def run(model: Path, images: Path, flags: list[str], shard: int) -> Sample:
    """One run over a folder."""
    output = new_output(images.parent)
    words = [sys.executable, "-m", "jobs.cli", "predict", "--model", str(model), "--input", str(images)]
    words += ["--output", str(output), "--shard-images", str(shard), *flags]
    with Looks() as looks:
        cost = measured(words, environment(1))
    parts = sorted((part.stat().st_mtime, pq.read_metadata(part).num_rows) for part in output.rglob("part-*.parquet"))
    total, committed, times = sum(rows for _, rows in parts), 0, []
    for at, rows in parts:
        committed += rows
        times.append((at, committed))
    start_at, start = next((at, done) for at, done in times if done >= total / 10)
    end_at, end = next((at, done) for at, done in times if done >= total * 9 / 10)

    def mean(seen: list[tuple[float, float]]) -> float:
        return statistics.fmean([value for at, value in seen if start_at < at <= end_at] or [0.0])

    return {
        "images_per_s": (end - start) / (end_at - start_at),
        "gpu_idle": 1 - mean(looks.gpu),
        "cpu_idle": 1 - mean(looks.cpu),
        "steady_s": end_at - start_at,
        "num_images": total,
        "wall_s": cost.wall_s,
        "first_commit_s": parts[0][0] - cost.started,
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, nargs=5, default=PAPER)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 12], help="that share the GPU")
    parser.add_argument("--topologies", nargs="+", default=["fused", "split"])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--shard", type=int, default=64, help="images")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engine", default="compiled")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name:
        folder = Path(name)
        write_random_model(folder / "model", asked.filters, list(tiles_of(4)))
        images = images_in(folder / "images", asked.images, asked.side)
        variants = {
            f"{topology}, {workers} workers": partial(
                run,
                folder / "model",
                images,
                [f"--topology={topology}", f"--workers-per-gpu={workers}", f"--engine={asked.engine}"],
                asked.shard,
            )
            for workers in asked.workers
            for topology in asked.topologies
        }
        found = interleaved(variants, asked.rounds, lambda variant: variant())
    rows = {
        name: {figure: statistics.median(found.values(name, figure)) for figure in samples[0] if figure != "round"}
        for name, samples in found.samples.items()
    }
    least = min((row["gpu_idle"] for row in rows.values()), default=1.0)
    target = {"wanted": MOST_IDLE, "seen": least, "met": least < MOST_IDLE}
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write(asked.out, vars(asked), found, gpu=gpu, targets={"GPU idle": target}, road=rows)


if __name__ == "__main__":
    main()

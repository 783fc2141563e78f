"""From a folder of PNGs to masks: what an image costs here, and with what people would use instead.

    python -m tests.bench.peers --data <dsb2018> --peers .venv-peers --out tests/bench/results/peers.json

Every program is measured whole, in a process of its own, on n and on 4n images of 256 x 256 pixels; an image costs the
difference over 3n, so that start-up cancels, and start-up is what is left. CPU time is that of all processes with one
thread for the network; wall time stands beside it. All in turn. `tests/bench/programs/` has the others as their users
write them; smp's network is another one (an encoder of its own), all others are UNet++ of the paper's widths.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from tests.bench.models import engine_model, random_models
from tests.bench.processes import CommandError, environment, measured, new_output
from tests.bench.rounds import Measured, Sample, interleaved, spread, write
from tests.bench.subjects import PAPER, crops, write_images

PEERS = {
    "Ray Data, smp UnetPlusPlus resnet34": "ray_smp",
    "MONAI BasicUNetPlusPlus": "monai_loader",
    "torch DataLoader, eager": "torch_loader",
    "Daft, eager": "daft_loop",
}
TARGETS = dict(zip(PEERS, (3.0, 8.0, 6.5, 6.5), strict=True))
"""How many times cheaper an image was to be at L4 in int8."""
FIGURES = ("cpu_s", "wall_s")


@dataclass(frozen=True)
class Program:
    """One process: a program over so many images; `words` are what follows the Python interpreter."""

    python: Path
    words: tuple[str, ...]
    num_images: int
    threads: int


def ours(engine: str, backend: str, model: Path, level: int, threads: int) -> tuple[str, ...]:
    """The words of `unetpp predict`, without input and output. On Ray, `threads` are workers of one thread each."""
    words = ["-m", "jobs.cli", "predict", "--model", str(model), "--level", str(level), "--engine", engine]
    on_ray = ["--threads", "1", "--num-workers", str(threads)]
    return (*words, "--backend", backend, *(on_ray if backend == "ray" else ["--threads", str(threads)]), "--input")


def run(program: Program, folder: Path) -> Sample:
    """Run it; CommandError where a mask is missing."""
    output = new_output(folder)
    images = folder / f"images-{program.num_images}"
    words = [str(program.python), *program.words, str(images), "--output", str(output)]
    cost = measured(words, environment(program.threads))
    if (num_masks := _num_masks(output)) != program.num_images:
        raise CommandError(f"{num_masks} masks of {program.num_images} images")
    return cost.figures()


def _num_masks(output: Path) -> int:
    pngs = sum(1 for _ in output.rglob("*.png"))
    return pngs or ds.dataset([str(path) for path in output.rglob("*.parquet")]).count_rows()


def slopes(measured: Measured, name: str, sizes: Sequence[int], figure: str) -> list[float]:
    """Seconds an image, round by round."""
    few, many = (measured.values(f"{name}, {size} images", figure) for size in sizes)
    return [(more - less) / (sizes[1] - sizes[0]) for less, more in zip(few, many, strict=False)]


def table(found: Measured, sizes: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """A row for every program: seconds an image, and seconds of start-up."""
    rows = []
    for name, pair in sizes.items():
        row: dict[str, Any] = {"program": name, "num_images": pair}
        for figure in FIGURES:
            if not (each := slopes(found, name, pair, figure)):
                break
            row[f"{figure}_per_image"] = spread(each)
            few = found.values(f"{name}, {pair[0]} images", figure)
            row[f"{figure}_to_start"] = spread([whole - pair[0] * one for whole, one in zip(few, each, strict=True)])
        else:
            rows.append(row)
    return rows


def ratios(found: Measured, sizes: dict[str, tuple[int, int]], level: int) -> dict[str, dict[str, Any]]:
    """How many times dearer an image is with each peer than with each of ours, and what was wanted of int8 at L4."""
    report: dict[str, dict[str, Any]] = {}
    for peer in PEERS:
        for name in (name for name in sizes if name not in PEERS):
            each = {
                figure: (slopes(found, peer, sizes[peer], figure), slopes(found, name, sizes[name], figure))
                for figure in FIGURES
            }
            if not all(theirs and ours for theirs, ours in each.values()):
                continue
            row: dict[str, Any] = {
                figure: spread([one / other for one, other in zip(*pair, strict=False)])
                for figure, pair in each.items()
            }
            if level == 4 and "int8" in name:
                row |= {"wanted": TARGETS[peer], "met": row["cpu_s"]["median"] >= TARGETS[peer]}
            report[f"{peer} / {name}"] = row
    return report


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True, help="virtual environment: see peers-requirements.txt")
    parser.add_argument("--engines", nargs="+", default=["openvino-int8", "openvino", "torch"])
    parser.add_argument("--backends", nargs="+", default=["inline", "ray"])
    parser.add_argument("--level", type=int, default=4)
    parser.add_argument("--filters", type=int, nargs=5, default=PAPER)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=48, help="n of ours; it must be larger where images are cheaper")
    parser.add_argument("--peer-images", type=int, default=12, help="n of the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name:
        folder = Path(name)
        models, absent = random_models(folder, asked.filters, asked.data, asked.engines)
        programs: dict[str, tuple[Path, tuple[str, ...]]] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for engine in (engine for engine in asked.engines if engine not in absent):
            for backend in asked.backends:
                words = ours(engine, backend, engine_model(engine, models), asked.level, asked.threads)
                programs[f"unetpp predict, {engine}, {backend}"] = Path(sys.executable), words
                sizes[f"unetpp predict, {engine}, {backend}"] = asked.images, 4 * asked.images
        for peer, module in PEERS.items():
            own = ("--model", str(models["float32"]), "--level", str(asked.level))
            words = ("-m", f"tests.bench.programs.{module}", *own, "--images")
            programs[peer] = asked.peers.absolute() / "bin" / "python", words
            sizes[peer] = asked.peer_images, 4 * asked.peer_images
        for size in {size for pair in sizes.values() for size in pair}:
            write_images(folder / f"images-{size}", crops(asked.data, size))
        variants = {
            f"{name}, {size} images": Program(*programs[name], size, asked.threads)
            for name, pair in sizes.items()
            for size in pair
        }
        found = interleaved(variants, asked.rounds, partial(run, folder=folder))
    found.skipped |= absent
    lines = (Path(__file__).parent / "peers-requirements.txt").read_text().splitlines()
    versions = [line for line in lines if "==" in line]
    report = {"peer_versions": versions, "ratios": ratios(found, sizes, asked.level), "programs": table(found, sizes)}
    write(asked.out, vars(asked), found, ("openvino", "nncf"), **report)


if __name__ == "__main__":
    main()

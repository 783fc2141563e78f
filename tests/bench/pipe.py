"""What the road around the engine costs: archive prediction on Ray against its three computations, each alone.

    python -m tests.bench.pipe --data <dsb2018> --out tests/bench/results/pipe.json

Ideal: cores / (CPU seconds an image of decoding, engine and encoding, each alone in a process with one thread). Seen:
images a second between n and 4n images of `unetpp predict` on Ray, with a worker of one thread for every core, so that
starts cancel. By the clock on the wall, which other programs slow down, and by the CPU time of all processes, which
they hardly do. Cores of one machine share caches, memory and maybe execution units, so the same is said of a second
ideal, whose computations are alone in a process on every core at once. A round has every run once, in turn with the
computations alone. 256 x 256 pixels, networks of the paper's widths with random weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.models import engine_model, random_models
from tests.bench.processes import environment, measured, new_output
from tests.bench.rounds import Measured, Sample, interleaved, spread, write
from tests.bench.subjects import PAPER, crops, write_images
from unetpp.images import encode_mask, read_image
from unetpp.predictor import Predictor

TARGETS = {4: 0.93, 1: 0.85}
"""Shares of the ideal by the wall's clock, of int8 at a level."""
SIDE = 256
NUM_ALONE = 48
ENGINE_S = 5.0
"""CPU time of the engine's computation alone; it is the larger part by far."""
STAGES = ("decode_s", "engine_s", "encode_s")


def alone(model: Path, level: Any, engine: Any, folder: Path) -> Sample:
    """CPU seconds an image of each computation, in this process."""
    predictor = Predictor.from_pretrained(model, level=level, engine=engine, threads=1)
    core = (slice(0, SIDE), slice(0, SIDE))
    contents = [path.read_bytes() for path in sorted(folder.iterdir())[:NUM_ALONE]]
    images = [read_image(content).image_HWC for content in contents]
    masks = [predictor.engine(image_HWC[None], core)[0][0] for image_HWC in images]
    return {
        "decode_s": _cpu_s(read_image, contents),
        "engine_s": _cpu_s(lambda image_HWC: predictor.engine(image_HWC[None], core), images, ENGINE_S),
        "encode_s": _cpu_s(encode_mask, masks),
    }


def _cpu_s(work: Callable[[Any], Any], things: Sequence[Any], at_least_s: float = 0.0) -> float:
    started, num = time.process_time(), 0
    while not num or time.process_time() - started < at_least_s:
        for thing in things:
            work(thing)
        num += len(things)
    return (time.process_time() - started) / num


def alone_in_processes(num: int, model: Path, level: int, engine: str, folder: Path) -> Sample:
    """`alone` in so many fresh processes at once: their mean."""
    words = [sys.executable, "-m", "tests.bench.pipe", "--data", "unused", "--out", "unused"]
    words += ["--one", str(model), str(level), engine, str(folder)]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | environment(1)) for _ in range(num)]
    found = [json.loads(process.communicate()[0]) for process in processes]
    return {stage: statistics.fmean(each[stage] for each in found) for stage in STAGES}


def run(model: Path, level: int, engine: str, cores: int, folder: Path, flags: Sequence[str]) -> Sample:
    """One run over a folder."""
    words = [sys.executable, "-m", "jobs.cli", "predict", "--model", str(model), "--level", str(level)]
    words += ["--engine", engine, "--threads", "1", "--num-workers", str(cores)]
    words += ["--input", str(folder), "--output", str(new_output(folder.parent)), *flags]
    return measured(words, environment(1)).figures()


def shares(found: Measured, name: str, sizes: tuple[int, int], cores: int) -> dict[str, Any]:
    """The ideal and what was seen of it, round by round."""
    few, many = (f"{name}, {size} images" for size in sizes)
    row: dict[str, Any] = {"variant": name, "num_images": sizes}
    ideals = {}
    for how in ("alone", "alone on every core"):
        samples = found.samples[f"{name}, {how}"]
        row[how] = {stage: spread([sample[stage] for sample in samples]) for stage in STAGES}
        ideals[how] = [sum(sample[stage] for stage in STAGES) for sample in samples]
    for figure, width in (("wall_s", cores), ("cpu_s", 1)):
        pairs = zip(found.values(few, figure), found.values(many, figure), strict=True)
        slopes = [(more - less) / (sizes[1] - sizes[0]) for less, more in pairs]
        row[f"{figure}_per_image"] = spread(slopes)
        row[f"{figure[:-2]}_share"] = {
            how: spread([one / width / slope for one, slope in zip(ideal, slopes, strict=True)])
            for how, ideal in ideals.items()
        }
    return row


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--filters", type=int, nargs=5, default=PAPER)
    parser.add_argument("--engine", default="openvino-int8")
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--images", type=int, nargs="+", default=[192, 1024], help="n of each level")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", nargs="+", default=[], help="further flags of predict, as --topology=split")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "LEVEL", "ENGINE", "FOLDER"), help="alone, in this process")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.one:
        model, level, engine, images = asked.one
        print(json.dumps(alone(Path(model), int(level), engine, Path(images))))
        return
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name:
        folder = Path(name)
        models, absent = random_models(folder, asked.filters, asked.data, [asked.engine])
        assert not absent, absent
        model = engine_model(asked.engine, models)
        pairs = {level: (num, 4 * num) for level, num in zip(asked.levels, asked.images, strict=True)}
        for num in sorted({num for pair in pairs.values() for num in pair}):
            write_images(folder / f"images-{num}", crops(asked.data, num, SIDE))
        variants: dict[str, Callable[[], Sample]] = {}
        for level, pair in pairs.items():
            for num in pair:
                images = folder / f"images-{num}"
                variants[f"L{level}, {num} images"] = partial(
                    run, model, level, asked.engine, cores, images, asked.flags
                )
            images = folder / f"images-{pair[0]}"
            for how, num in (("alone", 1), ("alone on every core", cores)):
                variants[f"L{level}, {how}"] = partial(alone_in_processes, num, model, level, asked.engine, images)
        found = interleaved(variants, asked.rounds, lambda variant: variant())
    rows = [shares(found, f"L{level}", pair, cores) for level, pair in pairs.items() if found.samples]
    targets = {
        f"L{level}, share of the ideal": {
            "wanted": TARGETS[level],
            "seen": row["wall_share"]["alone"]["median"],
            "met": row["wall_share"]["alone"]["median"] >= TARGETS[level],
        }
        for level, row in zip(pairs, rows, strict=True)
        if level in TARGETS and asked.engine == "openvino-int8"
    }
    write(asked.out, vars(asked), found, ("openvino", "nncf"), targets=targets, cores=cores, pipe=rows)


if __name__ == "__main__":
    main()

"""What the road around the engine costs: archive prediction on Ray against its three computations, each alone.

    python -m tests.bench.pipe --data <dsb2018> --model nuclei --engine openvino --out tests/bench/results/pipe.json

Images: the test images of the set, tiled to 256 x 256, as PNG on the local disk. The ideal is cores / (CPU seconds an
image of decoding, engine and encoding, each alone, one thread, in the same run). What the pipe does is the slope of a
run's time between n and 4n images, so that starts cost nothing: of the clock on the wall, which other programs of the
machine slow down, and of the CPU time of every process, which they hardly do. Pairs of runs are interleaved with the
measurements of the ideal.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jobs import models, predict
from jobs.cluster import local_ray
from jobs.contract import PredictConfig
from jobs.shard import load_predictor
from tests.bench.setting import setting
from tests.bench.tree import TreeTime
from unetpp.images import encode_mask, read_image
from unetpp.predictor import Predictor

SIDE = 256
ALONE_IMAGES = 48
"""Images of a measurement of the three computations alone."""

Pixels = NDArray[np.uint8]


def images_of(data: Path) -> Iterator[Pixels]:
    """The test images of the set as squares of SIDE pixels, RGB: cut, and repeated where they are smaller."""
    with (data / "splits.csv").open() as file:
        ids = sorted(row["id"] for row in csv.DictReader(file) if row["split"] == "test")
    for id_ in ids:
        whole = np.asarray(Image.open(data / "images" / f"{id_}.png").convert("RGB"))
        repeats = [-(-SIDE // size) for size in whole.shape[:2]]
        yield np.tile(whole, (*repeats, 1))[:SIDE, :SIDE]


def write_images(images: list[Pixels], folder: Path, num: int) -> None:
    """`num` files, the images over and over."""
    folder.mkdir()
    for number in range(num):
        path = folder / f"{number:06d}.png"
        if number < len(images):
            Image.fromarray(images[number]).save(path)
        else:
            shutil.copy(folder / f"{number % len(images):06d}.png", path)


def alone(predictor: Predictor, folder: Path) -> dict[str, float]:
    """CPU seconds an image of decoding, engine and encoding, one thread, nothing else in the way."""
    contents = [path.read_bytes() for path in sorted(folder.iterdir())[:ALONE_IMAGES]]
    images = [read_image(content).image_HWC for content in contents]
    core = (slice(0, SIDE), slice(0, SIDE))
    predictor.engine(images[0][None], core)
    masks = [predictor.engine(image[None], core)[0][0] for image in images]
    return {
        "decode_s": _cpu_s(read_image, contents),
        "engine_s": _cpu_s(lambda image: predictor.engine(image[None], core), images),
        "encode_s": _cpu_s(encode_mask, masks),
    }


def _cpu_s(work: Callable[[Any], Any], each: Iterable[Any]) -> float:
    things = list(each)
    started = time.process_time()
    for thing in things:
        work(thing)
    return (time.process_time() - started) / len(things)


def run(config: PredictConfig, folder: Path, num: int) -> TreeTime:
    """One run over the images of a folder, its output thrown away."""
    output = Path(config.output)
    with TreeTime() as used:
        result = predict.run(config.model_copy(update={"input": (str(folder),)}))
    assert (result.status, result.num_predicted) == ("complete", num), result
    shutil.rmtree(output)
    return used


def measure(config: PredictConfig, folders: dict[int, Path], num_pairs: int, cores: int) -> dict[str, Any]:
    """Pairs of runs of n and 4n images, the three computations alone before and after each."""
    predictor = load_predictor(models.canonical(config.model), config, 1)
    small, large = sorted(folders)
    pairs = []
    for number in range(num_pairs):
        costs = [alone(predictor, folders[large])]
        runs = {}
        for num in (small, large) if number % 2 else (large, small):
            runs[num] = run(config, folders[num], num)
            costs.append(alone(predictor, folders[large]))
        each = {name: statistics.fmean(cost[name] for cost in costs) for name in costs[0]}
        ideal_s = sum(each.values())
        slopes = {
            name: (getattr(runs[large], name) - getattr(runs[small], name)) / (large - small)
            for name in ("wall_s", "cpu_s")
        }
        pairs.append(
            {
                **each,
                "wall_s_an_image": slopes["wall_s"],
                "cpu_s_an_image": slopes["cpu_s"],
                "wall_share": ideal_s / cores / slopes["wall_s"],
                "cpu_share": ideal_s / slopes["cpu_s"],
                "load_average": os.getloadavg()[0],
            }
        )
        print(json.dumps(pairs[-1]), flush=True)
    medians = {f"{name}_median": statistics.median(pair[name] for pair in pairs) for name in pairs[0]}
    return {"num_images": [small, large], **medians, "pairs": pairs}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--level", type=int, action="append")
    parser.add_argument("--engine", action="append")
    parser.add_argument("--images", type=int, default=256, help="n; the other run of a pair has 4n")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--backend", default="ray")
    parser.add_argument("--shard-images", type=int)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = len(os.sched_getaffinity(0)) if asked.backend == "ray" else 1
    measured = []
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name, local_ray(cores):
        images = list(images_of(asked.data))
        folders = {num: Path(name) / str(num) for num in (asked.images, 4 * asked.images)}
        for num, folder in folders.items():
            write_images(images, folder, num)
        for engine in asked.engine or ["auto"]:
            for level in asked.level or [None]:
                settings = {"model": asked.model, "level": level, "engine": engine, "backend": asked.backend}
                places = {"input": str(folders[asked.images]), "output": str(Path(name) / "out"), "threads": 1}
                shards = {} if asked.shard_images is None else {"shard_images": asked.shard_images}
                config = PredictConfig.model_validate({**settings, **places, **shards})
                found = measure(config, folders, asked.pairs, cores)
                measured.append({"model": asked.model, "level": level, "engine": engine, **found})
                print(json.dumps({key: value for key, value in measured[-1].items() if key != "pairs"}), flush=True)
                report = {**setting(), "backend": asked.backend, "cores": cores, "measured": measured}
                asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

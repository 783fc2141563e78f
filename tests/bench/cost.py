"""Does cost grow with the work, and with nothing else?

    python -m tests.bench.cost --data <dsb2018> --out tests/bench/results/cost.json

sides: CPU time a megapixel of square images, against what their tiles say (`TilePlan.computed_to_kept`: pixels that the
network is fed for each that is kept). What a fed pixel costs should be the same at every size.
numbers: CPU time of `unetpp predict`, all its processes, over n, 4n and 16n images of 256 x 256 pixels. The images
between n and 4n should cost what those between 4n and 16n cost.
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.processes import CommandError, environment, last_line, measured, new_output
from tests.bench.rounds import Measured, Sample, interleaved, spread, write
from tests.bench.subjects import crops, mosaic, write_images
from unetpp.checkpoint import read_pretrained
from unetpp.predictor import Predictor, tile_plan

TILE_PX = 512
WITHIN = 0.10
NUM_PICTURES = 64


def one(side_px: int, asked: argparse.Namespace) -> Sample:
    """CPU seconds a megapixel of one image, seen a second time: a new shape of tiles costs something once."""
    predictor = Predictor.from_pretrained(
        asked.model, level=asked.level, engine=asked.engine, tile_px=TILE_PX, threads=1
    )
    image_HWC = mosaic(crops(asked.data, NUM_PICTURES), side_px)
    predictor([image_HWC])
    cpu, wall = time.process_time(), time.perf_counter()
    predictor([image_HWC])
    megapixels = side_px**2 / 1e6
    return {
        "cpu_s_per_mp": (time.process_time() - cpu) / megapixels,
        "wall_s_per_mp": (time.perf_counter() - wall) / megapixels,
    }


def side_in_a_process(side_px: int, asked: argparse.Namespace) -> Sample:
    """`one` in a fresh process."""
    words = ["--data", asked.data, "--model", asked.model, "--engine", asked.engine, "--out", "unused"]
    words += ["--one", side_px] + (["--level", asked.level] if asked.level else [])
    return json.loads(last_line(measured([sys.executable, "-m", "tests.bench.cost", *words], environment(1))))


def run_of(num_images: int, asked: argparse.Namespace, folder: Path) -> Sample:
    """Cost of `unetpp predict` over so many images."""
    words = ["predict", "--model", asked.model, "--engine", asked.engine, "--threads", "1", "--backend", asked.backend]
    words += ["--num-workers", "1"] if asked.backend == "ray" else []
    words += ["--level", asked.level] if asked.level else []
    words += ["--input", folder / f"images-{num_images}", "--output", new_output(folder)]
    return measured([sys.executable, "-m", "jobs.cli", *words], environment(1)).figures()


def sides(found: Measured, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """By side: seconds a megapixel, tiles, seconds a megapixel that was fed, and how far that is from their mean."""
    config = read_pretrained(asked.model).model
    config = config.model_copy(update={"level": asked.level or config.level})
    rows = []
    for side_px in asked.sides:
        plan = tile_plan((side_px, side_px), config, TILE_PX)
        seconds = found.middle(f"{side_px} px", "cpu_s_per_mp")
        assert seconds is not None
        row = {"side_px": side_px, "num_tiles": len(plan.tiles), "computed_to_kept": plan.computed_to_kept}
        rows.append(row | {"cpu_s_per_mp": seconds, "cpu_s_per_fed_mp": seconds / plan.computed_to_kept})
    mean = sum(row["cpu_s_per_fed_mp"] for row in rows) / len(rows)
    return [row | {"off": row["cpu_s_per_fed_mp"] / mean - 1} for row in rows]


def numbers(found: Measured, asked: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds an image between the first two numbers of images, and between the last two; their ratio."""
    few, some, many = sizes(asked)
    values = {size: found.values(f"{size} images", "cpu_s") for size in (few, some, many)}
    early, late = (
        [(high - low) / (more - less) for low, high in zip(values[less], values[more], strict=True)]
        for less, more in ((few, some), (some, many))
    )
    ratio = spread([after / before for before, after in zip(early, late, strict=True)])
    return {"sizes": [few, some, many], "cpu_s_per_image": [spread(early), spread(late)], "late_to_early": ratio}


def sizes(asked: argparse.Namespace) -> tuple[int, int, int]:
    """Numbers of images."""
    return asked.images, 4 * asked.images, 16 * asked.images


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--level", type=int)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--backend", default="inline")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 768, 1024, 1536, 2048, 3072, 4096])
    parser.add_argument("--images", type=int, default=32, help="n")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, metavar="SIDE", help="in this process")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one, asked)))
        return
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name:
        folder = Path(name)
        variants = {f"{side_px} px": partial(side_in_a_process, side_px, asked) for side_px in asked.sides}
        for size in sizes(asked):
            write_images(folder / f"images-{size}", crops(asked.data, size))
            variants[f"{size} images"] = partial(run_of, size, asked, folder)
        found = interleaved(variants, asked.rounds, lambda variant: variant())
    if found.skipped:
        raise CommandError(str(found.skipped))
    rows, linear = sides(found, asked), numbers(found, asked)
    targets = {
        "a fed pixel costs the same at every size": {"within": WITHIN, "seen": max(abs(row["off"]) for row in rows)},
        "an image costs the same however many": {"within": WITHIN, "seen": abs(linear["late_to_early"]["median"] - 1)},
    }
    targets = {name: target | {"met": target["seen"] <= target["within"]} for name, target in targets.items()}
    write(asked.out, vars(asked), found, ("openvino",), targets=targets, numbers=linear, sides=rows)


if __name__ == "__main__":
    main()

"""Quality against cost: every level of a trained model with every engine, and what others cost.

    python -m tests.bench.frontier --model <runs>/<run>/model --data <dsb2018> \\
        --peers tests/bench/results/peers.json --out tests/bench/results/frontier.json

Each engine at each level is a process of its own, all in turn: CPU time a megapixel with one thread over the images of
a split, one at a time, decoded before; and the mean IoU of their masks. The picture is written beside the result, as
SVG and PNG. Others are drawn by their cost alone: they were not trained here.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from tests.bench.models import engine_model, with_int8
from tests.bench.processes import environment, last_line, measured
from tests.bench.rounds import Measured, Sample, interleaved, spread, write
from unetpp.checkpoint import read_pretrained
from unetpp.config import Level
from unetpp.metrics import bootstrap_interval, confusion_counts, iou
from unetpp.predictor import Predictor

COLOURS = {
    "eager": "#8a8a8a",
    "reference": "#8a8a8a",
    "torch": "#d9730d",
    "compiled": "#b0549c",
    "openvino": "#1f6fb4",
    "openvino-int8": "#1a7f37",
}
PEER_MP = 256 * 256 / 1e6
"""Megapixels of an image of `tests.bench.peers`."""


def labelled(data: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """RGB images and their masks, 0 and 1."""
    with (data / "splits.csv").open() as file:
        ids = sorted(row["id"] for row in csv.DictReader(file) if row["split"] == split)
    return [
        (
            np.array(Image.open(data / "images" / f"{id_}.png").convert("RGB")),
            (np.array(Image.open(data / "masks" / f"{id_}.png")) > 0).astype(np.uint8),
        )
        for id_ in ids
    ]


def one(engine: str, level: Level, model: Path, data: Path, split: str) -> Sample:
    """Cost and quality of one engine at one level, in this process."""
    import torch

    from tests.bench.subjects import eager

    torch.set_num_threads(1)
    if engine == "eager":
        segment: Callable[[Any], Any] = eager(model, level)
    else:
        predictor = Predictor.from_pretrained(model, level=level, engine=engine, threads=1)  # type: ignore[arg-type]
        segment = lambda image: predictor([image])[0]  # noqa: E731
    images = labelled(data, split)
    segment(images[0][0])
    cpu, wall = time.process_time(), time.perf_counter()
    masks = [segment(image_HWC) for image_HWC, _ in images]
    used = time.process_time() - cpu, time.perf_counter() - wall
    megapixels = sum(mask_HW.size for mask_HW in masks) / 1e6
    scores = [
        iou(confusion_counts(mask_HW, target_HW, 1)) for mask_HW, (_, target_HW) in zip(masks, images, strict=True)
    ]
    return {"cpu_s_per_mp": used[0] / megapixels, "wall_s_per_mp": used[1] / megapixels, "image_iou": scores}


def in_a_process(engine: str, level: Level, asked: argparse.Namespace, models: dict[str, Path]) -> Sample:
    """`one` in a fresh process."""
    words = [
        sys.executable,
        "-m",
        "tests.bench.frontier",
        "--model",
        engine_model(engine, models),
        "--data",
        asked.data,
    ]
    words += ["--split", asked.split, "--out", "unused", "--one", engine, level]
    return json.loads(last_line(measured(words, environment(1))))


def points(found: Measured, variants: dict[str, tuple[str, Level]]) -> list[dict[str, Any]]:
    """A row for every engine and level; `is_best`: no other one is as good for less."""
    rows: list[dict[str, Any]] = []
    for name, (engine, level) in variants.items():
        if samples := found.samples.get(name):
            scores = samples[0]["image_iou"]
            low, high = bootstrap_interval(scores, num_bootstrap=5000, seed=0)
            row: dict[str, Any] = {"engine": engine, "level": level}
            row |= {"mean_iou": float(np.mean(scores)), "interval": [low, high]}
            costs = {figure: spread(found.values(name, figure)) for figure in ("cpu_s_per_mp", "wall_s_per_mp")}
            rows.append(row | costs)
    for one in rows:
        one["is_best"] = not any(
            other["cpu_s_per_mp"]["median"] < one["cpu_s_per_mp"]["median"] and other["mean_iou"] >= one["mean_iou"]
            for other in rows
        )
    return rows


def peers(path: Path | None) -> dict[str, float]:
    """CPU seconds a megapixel of the other programs, from the result of `tests.bench.peers`."""
    if path is None or not path.exists():
        return {}
    rows = json.loads(path.read_text())["programs"]
    return {
        row["program"]: row["cpu_s_per_image"]["median"] / PEER_MP
        for row in rows
        if not row["program"].startswith("unetpp")
    }


def draw(rows: list[dict[str, Any]], others: dict[str, float], title: str) -> Figure:
    """Points by engine, joined from level to level; the best of all joined behind; others as lines at their cost."""
    figure = Figure(figsize=(9, 5.4), dpi=130, layout="constrained")
    axes = figure.subplots()
    best = sorted((row["cpu_s_per_mp"]["median"], row["mean_iou"]) for row in rows if row["is_best"])
    axes.plot(*zip(*best, strict=True), "-", color="#c9d8c9", lw=9, solid_capstyle="round", zorder=0)
    for number, engine in enumerate(dict.fromkeys(row["engine"] for row in rows)):
        beside = ((5, -10), (-13, 5))[number % 2]
        own = [row for row in rows if row["engine"] == engine]
        costs, scores = [row["cpu_s_per_mp"]["median"] for row in own], [row["mean_iou"] for row in own]
        axes.plot(costs, scores, "o-", color=COLOURS.get(engine, "#444444"), lw=1.3, ms=5, label=engine)
        for row, cost, score in zip(own, costs, scores, strict=True):
            axes.annotate(f"L{row['level']}", (cost, score), textcoords="offset points", xytext=beside, fontsize=7)
    low, high = (of_all(row["mean_iou"] for row in rows) for of_all in (min, max))
    for number, (peer, cost) in enumerate(others.items()):
        axes.axvline(cost, color="#999999", lw=0.9, ls="--", zorder=0)
        place = (cost, low + (high - low) / 2 * (number % 2))
        axes.annotate(peer, place, textcoords="offset points", xytext=(-3, 0), rotation=90, ha="right", fontsize=7)
    _style(axes, title)
    figure.legend(fontsize=8, loc="outside right upper")
    axes.set_xlabel("CPU seconds per megapixel, one thread" + ("; dashed: others, by cost alone" if others else ""))
    return figure


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("mean IoU over images", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.margins(y=0.08)


def main() -> None:
    """Measure, and write the result and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with a head at every level")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--engines", nargs="+", default=["eager", "torch", "openvino", "openvino-int8"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="result of tests.bench.peers")
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "LEVEL"), help="in this process")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one[0], int(asked.one[1]), asked.model, asked.data, asked.split)))
        return
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as folder:
        models, absent = with_int8(asked.model, Path(folder), asked.data, asked.engines)
        config = read_pretrained(asked.model).model
        variants = {
            f"{engine} L{level}": (engine, level)
            for engine in asked.engines
            if engine not in absent
            for level in config.head_levels
        }
        runs = {name: partial(in_a_process, *variant, asked, models) for name, variant in variants.items()}
        found = interleaved(runs, asked.rounds, lambda run: run())
    found.skipped |= absent
    rows, others = points(found, variants), peers(asked.peers)
    figure = draw(rows, others, f"UNet++ of {config.filters[0]} to {config.filters[-1]} filters, {asked.split} images")
    for suffix in (".svg", ".png"):
        figure.savefig(asked.out.with_suffix(suffix))
    write(asked.out, vars(asked), found, ("openvino", "nncf"), peers_cpu_s_per_mp=others, points=rows)


if __name__ == "__main__":
    main()

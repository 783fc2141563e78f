"""Does it pay to go deeper only for tiles that are still undecided? Against the levels themselves, at equal cost.

    python -m tests.bench.adaptive_depth --model <runs>/<run>/model --data <dsb2018> \
        --out tests/bench/results/adaptive_depth.json

A tile is predicted by a shallow level; where a criterion, read off that level's probabilities, is above a threshold,
by a deeper one. Two ways of paying for it, in multiply-adds: `step`, the deeper level goes on from the shallow one's
nodes, and `cascade`, it starts anew, as separate networks of a compiled engine do. What stands against it is the
frontier of the levels: the upper hull of (cost, mean per-image IoU), since any point between two levels is had by
giving each a part of the images. Pair of levels, criterion and threshold are chosen on validation images, each way by
itself; the test images are looked at once, with what was chosen. `oracle` knows the true gain: none can do better.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.dataset import LabelledImage, load, open_labelled_set
from jobs.models import fetch_model
from tests.bench.against_unet import mean_with_interval
from tests.bench.setting import setting
from unetpp import tiles
from unetpp.checkpoint import arrays_of, from_pretrained
from unetpp.metrics import Counts, confusion_counts, iou
from unetpp.model import UNetPlusPlus, count_gmacs
from unetpp.predictor import load_engine, prepare, tile_plan
from unetpp.prune import prune

Values = NDArray[np.float64]
SHARES = tuple(share / 20 for share in range(1, 20))
"""Of validation tiles that go deeper: where thresholds are tried."""
WAYS = ("step", "cascade")


@dataclass(frozen=True, slots=True)
class TileSeen:
    """One tile of an image by every level: counts against its target, GMAC, and what its probabilities say."""

    image: int
    counts: dict[int, Counts]
    gmacs: dict[int, float]
    signs: dict[int, dict[str, float]]


def signs_of(probability_HW: NDArray[np.uint8], shallower_HW: NDArray[np.uint8] | None) -> dict[str, float]:
    """Every criterion of a tile: larger is less decided. `shallower_HW`: the probability by the level above, if any."""
    p_HW = probability_HW / 255.0
    mask_HW = p_HW > 0.5
    undecided = int(np.count_nonzero((p_HW > 0.2) & (p_HW < 0.8)))
    sure, missed = float(p_HW[mask_HW].sum()), float(p_HW[~mask_HW].sum())
    num_foreground = int(mask_HW.sum())
    signs = {
        "uncertainty": 1 - float(np.abs(2 * p_HW - 1).mean()),
        "pixels undecided": undecided / p_HW.size,
        "pixels undecided, of the foreground": undecided / (num_foreground + 1),
        "IoU lost by expectation": 1 - (sure + 1) / (num_foreground + missed + 1),
    }
    if shallower_HW is not None:
        signs["the two heads differ"] = 1 - iou(confusion_counts(mask_HW * np.uint8(1), _mask(shallower_HW), 1))
    return signs


def _mask(probability_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return (probability_HW > 127).astype(np.uint8)


def seen(model: UNetPlusPlus, images: Sequence[LabelledImage], tile_px: int) -> list[TileSeen]:
    """Every tile of all images by every level."""
    levels = {level: prune(model, level) for level in model.config.head_levels}
    engines = {
        level: load_engine("openvino", network.config, arrays_of(network), "fast", probability=True)
        for level, network in levels.items()
    }
    found = []
    for number, image in enumerate(images):
        padded_HWC = prepare(image.image_HWC, model.config)
        plan = tile_plan(image.image_HWC.shape[:2], model.config, tile_px)
        for tile in plan.tiles:
            pixels_BHWC = tiles.cut(padded_HWC, tile)[None]
            shown = {level: engine(pixels_BHWC, tile.core_slices) for level, engine in engines.items()}
            rows, columns = tile.core.slices
            target_HW = image.target_HW[rows, columns]
            height, width = target_HW.shape  # the core may reach into the padding
            probability = {
                level: each_HW[:height, :width]
                for level, (_, stats) in shown.items()
                if (each_HW := stats[0].probability_HW) is not None
            }
            found.append(
                TileSeen(
                    number,
                    {
                        level: confusion_counts(masks[0, :height, :width], target_HW, 1)
                        for level, (masks, _) in shown.items()
                    },
                    {level: count_gmacs(network.config, *tile.shape) for level, network in levels.items()},
                    {level: signs_of(each, probability.get(level - 1)) for level, each in probability.items()},
                )
            )
    return found


class Split:
    """Tiles of one split, and what a choice of a level for each makes of them."""

    def __init__(self, tiles_seen: Sequence[TileSeen]) -> None:
        self.tiles = tiles_seen
        self.image = np.array([tile.image for tile in tiles_seen])
        self.counts = {level: np.stack([t.counts[level] for t in tiles_seen]) for level in tiles_seen[0].counts}
        self.gmacs = {level: np.array([tile.gmacs[level] for tile in tiles_seen]) for level in self.counts}
        self.iou = {level: self.image_iou({level: np.ones(len(tiles_seen), bool)}) for level in self.counts}
        self.cost = {level: float(gmacs.sum()) for level, gmacs in self.gmacs.items()}

    def image_iou(self, chosen: dict[int, NDArray[np.bool_]]) -> Values:
        """IoU of every image, of masks put together from the levels' tiles."""
        counts = np.sum([self.counts[level] * where[:, None, None] for level, where in chosen.items()], axis=0)
        whole = np.zeros((self.image.max() + 1, *counts.shape[1:]), counts.dtype)
        np.add.at(whole, self.image, counts)
        return np.array([iou(each) for each in whole])

    def sign(self, level: int, name: str) -> Values:
        """A criterion of every tile."""
        return np.array([tile.signs[level][name] for tile in self.tiles])

    def signs(self, level: int) -> Values:
        """All of them: tiles x criteria, with a column of ones."""
        return np.array([[*tile.signs[level].values(), 1.0] for tile in self.tiles])

    def gain(self, shallow: int, deep: int) -> Values:
        """What every tile's own IoU gains."""
        pairs = zip(self.counts[shallow], self.counts[deep], strict=True)
        return np.array([iou(one) - iou(other) for other, one in pairs])

    def adaptive(self, shallow: int, deep: int, deeper: NDArray[np.bool_], way: str) -> tuple[float, Values]:
        """Cost in GMAC and IoU of every image, where `deeper` says which tiles are predicted by the deep level."""
        again = self.gmacs[deep] - (self.gmacs[shallow] if way == "step" else 0.0)
        cost = float((self.gmacs[shallow] + again * deeper).sum())
        return cost, self.image_iou({shallow: ~deeper, deep: deeper})

    def frontier(self, cost: float) -> Values:
        """IoU of every image on the levels' upper hull at a cost: of the two levels beside it, by parts."""
        levels = _hull({level: (self.cost[level], float(self.iou[level].mean())) for level in self.iou})
        for cheap, dear in itertools.pairwise(levels):
            if cost <= self.cost[dear]:
                part = max(0.0, (cost - self.cost[cheap]) / (self.cost[dear] - self.cost[cheap]))
                return self.iou[cheap] * (1 - part) + self.iou[dear] * part
        return self.iou[levels[-1]]


def _hull(points: dict[int, tuple[float, float]]) -> list[int]:
    """Levels on the upper hull of (cost, quality), from the cheapest to the best."""
    levels = [min(points, key=lambda level: points[level][0])]
    while better := [level for level in points if points[level][1] > points[levels[-1]][1]]:
        cost, quality = points[levels[-1]]
        levels.append(max(better, key=lambda level: (points[level][1] - quality) / (points[level][0] - cost)))
    return levels


def learnt(split: Split, shallow: int, deep: int) -> Callable[[Split], Values]:
    """A criterion made of all others: the gain that least squares foresee from them."""
    signs, gain = split.signs(shallow), split.gain(shallow, deep)
    scale = signs.std(axis=0) + 1e-9
    scaled = signs / scale
    weights = np.linalg.solve(scaled.T @ scaled + np.eye(scaled.shape[1]), scaled.T @ gain)
    return lambda other: other.signs(shallow) / scale @ weights


def criteria(split: Split, shallow: int, deep: int) -> dict[str, Callable[[Split], Values]]:
    """By name; what is learnt is learnt from `split`."""

    def of(name: str) -> Callable[[Split], Values]:
        return lambda other: other.sign(shallow, name)

    named = {name: of(name) for name in split.tiles[0].signs[shallow]}
    named |= {"learnt from all of them": learnt(split, shallow, deep)}
    return named | {"oracle": lambda other: other.gain(shallow, deep)}


@dataclass(frozen=True, slots=True)
class Choice:
    """Tiles of which the criterion says more than the threshold are predicted by the deep level."""

    shallow: int
    deep: int
    criterion: Callable[[Split], Values]
    threshold: float

    def _adaptive(self, split: Split, way: str) -> tuple[float, Values]:
        return split.adaptive(self.shallow, self.deep, self.criterion(split) > self.threshold, way)

    def ahead(self, split: Split, way: str) -> Values:
        """IoU of every image, less the frontier's at the same cost."""
        cost, image_iou = self._adaptive(split, way)
        return image_iou - split.frontier(cost)

    def told(self, split: Split, way: str) -> dict[str, Any]:
        """For the report: the part of tiles that go deeper, cost, quality and how far it is above the frontier."""
        cost, image_iou = self._adaptive(split, way)
        return {
            "deeper": float((self.criterion(split) > self.threshold).mean()),
            "gmac": cost,
            "iou": float(image_iou.mean()),
            "ahead": mean_with_interval(self.ahead(split, way)),
        }


def main() -> None:
    """Choose on validation images, look at the test images once, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="with a head for every level")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tile-px", type=int, default=512)
    parser.add_argument("--about", default="", help="which model this is")
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    model = from_pretrained(fetch_model(asked.model))
    labelled = open_labelled_set(asked.data)
    val = Split(seen(model, load(labelled.split("val"), model.config), asked.tile_px))
    test = Split(seen(model, load(labelled.split("test"), model.config), asked.tile_px)) if asked.test else None
    report: dict[str, Any] = {
        **setting("openvino"),
        "model": asked.about,
        "filters": model.config.filters,
        "tile_px": asked.tile_px,
        "levels": {name: levels_of(split) for name, split in (("val", val), ("test", test)) if split is not None},
        "best_on_val": {},
    }
    for way in WAYS:
        for name, choice in best_on(val, way).items():
            told = {where: choice.told(split, way) for where, split in (("val", val), ("test", test)) if split}
            levels = [choice.shallow, choice.deep]
            report["best_on_val"][f"{way}, {name}"] = {"levels": levels, "threshold": choice.threshold, **told}
            print(f"{way}, {name}", json.dumps(report["best_on_val"][f"{way}, {name}"]), flush=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def levels_of(split: Split) -> dict[str, Any]:
    """Each level alone."""
    return {
        f"L{level}": {"gmac": split.cost[level], **mean_with_interval(split.iou[level])} for level in sorted(split.iou)
    }


def best_on(split: Split, way: str) -> dict[str, Choice]:
    """By criterion, the pair of levels and the threshold that are furthest above the frontier."""
    best: dict[str, tuple[float, Choice]] = {}
    for shallow, deep in itertools.combinations(sorted(split.iou), 2):
        for name, criterion in criteria(split, shallow, deep).items():
            for share in SHARES:
                choice = Choice(shallow, deep, criterion, float(np.quantile(criterion(split), 1 - share)))
                ahead = float(choice.ahead(split, way).mean())
                if name not in best or ahead > best[name][0]:
                    best[name] = ahead, choice
    return {name: choice for name, (_, choice) in sorted(best.items())}


if __name__ == "__main__":
    main()

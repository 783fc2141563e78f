"""The nuclei protocol of the UNet++ paper, as far as it is known: IoU over patches of 96 x 96 pixels, cut, not resized.

    python -m tests.bench.patch_protocol --data <dsb2018> --model <model> --out tests/bench/results/patch_protocol.json

Zhou et al. report 0.9077 (U-Net) and 0.9263 (UNet++). What they leave open, and what is done here, is in CHOICES, which
the result repeats.
"""

import argparse
import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jobs import evaluate
from jobs.contract import EvaluateConfig
from tests.bench.setting import setting

SIDE = 96
CHOICES = {
    "images": "the 664 of BBBC038v1 stage1_train with mended labels; the paper: 670, as published",
    "split": "by field of view, 129 test images of which no field was trained on; the paper does not say how it split",
    "patches": "side by side, the last of a row or column moved back into the image; the paper: strides that overlap",
    "context": "each patch is an image of its own: nothing beyond it is seen",
    "mask": "probability above 1/2, no smoothing, nothing removed",
    "score": "IoU of the foreground: mean over patches, mean over patches with foreground in the target, and of all "
    "pixels together; a patch without foreground in target and mask counts 1. The paper does not say which",
}


def starts(side: int) -> list[int]:
    """Where patches begin along a side of an image."""
    return sorted({*range(0, side - SIDE + 1, SIDE), side - SIDE})


def cut(data: Path, target: Path, split: str) -> None:
    """Write the set of the patches of a split: every patch an image with its mask."""
    rows = [row for row in csv.DictReader(io.StringIO((data / "splits.csv").read_text())) if row["split"] == split]
    for folder in ("images", "masks"):
        (target / folder).mkdir(parents=True)
    with (target / "splits.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "split", "modality", "foreground"])
        for row in rows:
            for name, image, mask in _patches(data, row["id"]):
                image.save(target / "images" / f"{name}.png")
                mask.save(target / "masks" / f"{name}.png")
                table.writerow([name, split, row["modality"], "yes" if mask.getextrema() != (0, 0) else "no"])


def _patches(data: Path, name: str) -> Iterator[tuple[str, Image.Image, Image.Image]]:
    image = Image.open(data / "images" / f"{name}.png").convert("RGB")
    mask = Image.open(data / "masks" / f"{name}.png").convert("L")
    for top in starts(image.height):
        for left in starts(image.width):
            box = (left, top, left + SIDE, top + SIDE)
            yield f"{name}_{top}_{left}", image.crop(box), mask.crop(box)


def main() -> None:
    """Cut, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "patches"
        cut(asked.data, data, asked.split)
        config = EvaluateConfig(model=asked.model, data=str(data), split=asked.split, group_by="foreground")
        measured = evaluate.run(config)
    report: dict[str, Any] = {**setting(), "choices": CHOICES, "digest": measured.digest, "test": {}}
    for each in measured.reports:
        report["test"][each.name] = {
            "patches": each.score.num_images,
            "mean_iou": each.score.mean_iou,
            "mean_iou_interval": each.score.mean_iou_interval,
            "mean_iou_with_foreground": each.groups["yes"].mean_iou,
            "pooled_iou": each.score.pooled_iou,
        }
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["test"], indent=1))


if __name__ == "__main__":
    main()

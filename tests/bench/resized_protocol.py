"""The protocol of public re-implementations: images resized to 96 x 96, a random split, probability above 1/2.

    python -m tests.bench.resized_protocol --data <dsb2018> --out tests/bench/results/resized_protocol.json

Neighbouring crops of one field lie in training and test images of this split, so that its scores are optimistic; they
are comparable with each other, and with nothing else. As those do, images and masks are resized by reading between
four pixels, without a filter (OpenCV's INTER_LINEAR), and a mask is what is above 1/2 then. Their IoU is that of 16
images together, averaged over such batches; the mean over images and the IoU of all pixels, which stand here, lie
beside it. The test images are looked at once: choices are made with `--split val`.
"""

import argparse
import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from jobs import evaluate, train
from jobs.config_file import load_config
from jobs.contract import EvaluateConfig, TrainConfig
from tests.bench.setting import setting

SIDE = 96
SETTINGS = (
    "epochs=16",
    "foreground=0",
    "group_weights={fluorescence: 0.8, colour_light: 0.16, brightfield_grey: 0.04}",
    "augment.rotate_degrees=15",
    "augment.scale=[0.8,1.25]",
    "augment.elastic_px=1",
    "augment.blur_sigma=0",
    "augment.invert=0",
    "augment.noise_std=0.01",
    "augment.drop_colour=0",
    "augment.stain_jitter=0.02",
    "augment.channel_jitter=0.05",
)
"""Other than the recipe's: images of both sides are alike here, so they are changed less, and drawn as they are."""


def resized(pixels_HWC: np.ndarray) -> np.ndarray:
    """SIDE x SIDE pixels, each between the four nearest of the original, as float32."""
    pixels_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels_1CHW, (SIDE, SIDE), mode="bilinear")[0].permute(1, 2, 0).numpy()


def resize(data: Path, target: Path) -> None:
    """Write the set again, every image and mask SIDE pixels wide and high, split as `split_random` says."""
    rows = list(csv.DictReader(io.StringIO((data / "splits.csv").read_text())))
    for folder in ("images", "masks"):
        (target / folder).mkdir(parents=True)
    for row in rows:
        name = f"{row['id']}.png"
        with Image.open(data / "images" / name) as picture:
            image_HWC = resized(np.array(picture.convert("RGB")))
        Image.fromarray(image_HWC.round().astype(np.uint8)).save(target / "images" / name)
        with Image.open(data / "masks" / name) as picture:
            mask_HW1 = resized(np.array(picture)[..., None] > 0)
        Image.fromarray((mask_HW1[..., 0] > 0.5).astype(np.uint8) * 255).save(target / "masks" / name)
    with (target / "splits.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "split", "modality"])
        table.writerows([row["id"], row["split_random"], row["modality"]] for row in rows)


def main() -> None:
    """Resize, train, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", default="infra/recipes/nuclei_cpu.yaml")
    parser.add_argument("--set", nargs="*", default=[], help="key=value: other settings yet")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "resized"
        resize(asked.data, data)
        places = [f"data={data}", f"output={folder}/runs"]
        config = load_config(TrainConfig, asked.config, [*places, *SETTINGS, *asked.set])
        trained = train.run(config)
        torch.set_num_threads(os.cpu_count() or 1)
        measured = evaluate.run(EvaluateConfig(model=trained.model_uri, data=str(data), split=asked.split))
    report: dict[str, Any] = {
        **setting(),
        "config": config.model_dump(mode="json", exclude={"data", "output"}),
        "steps": trained.steps,
        "seconds": trained.seconds,
        asked.split: {each.name: each.score.model_dump() for each in measured.reports},
        "groups": {
            each.name: {name: score.mean_iou for name, score in each.groups.items()} for each in measured.reports
        },
    }
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report[asked.split], indent=1))


if __name__ == "__main__":
    main()

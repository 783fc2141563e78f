"""The protocol of public re-implementations: images resized to 96 x 96, a random split, probability above 1/2.

    python -m tests.bench.resized_protocol --data <dsb2018> --out tests/bench/results/resized_protocol.json

Neighbouring crops of one field lie in training and test images of this split, so that its scores are optimistic; they
are comparable with each other, and with nothing else. Images are resized bilinearly, masks by the nearest pixel; the
IoU is the mean over test images, which are looked at once.
"""

import argparse
import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jobs import evaluate, train
from jobs.config_file import load_config
from jobs.contract import EvaluateConfig, TrainConfig
from tests.bench.setting import setting

SIDE = 96


def resize(data: Path, target: Path) -> None:
    """Write the set again, every image and mask SIDE pixels wide and high, split as `split_random` says."""
    rows = list(csv.DictReader(io.StringIO((data / "splits.csv").read_text())))
    for folder, rule in (("images", Image.Resampling.BILINEAR), ("masks", Image.Resampling.NEAREST)):
        (target / folder).mkdir(parents=True)
        for row in rows:
            with Image.open(data / folder / f"{row['id']}.png") as picture:
                small = picture.convert("RGB" if folder == "images" else "L").resize((SIDE, SIDE), rule)
                small.save(target / folder / f"{row['id']}.png")
    with (target / "splits.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "split", "modality"])
        table.writerows([row["id"], row["split_random"], row["modality"]] for row in rows)


def main() -> None:
    """Resize, train, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", default="infra/recipes/nuclei_cpu.yaml")
    parser.add_argument("--set", nargs="*", default=[], help="key=value: other settings than the recipe's")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "resized"
        resize(asked.data, data)
        config = load_config(TrainConfig, asked.config, [f"data={data}", f"output={folder}/runs", *asked.set])
        trained = train.run(config)
        torch.set_num_threads(os.cpu_count() or 1)
        measured = evaluate.run(EvaluateConfig(model=trained.model_uri, data=str(data), split="test"))
    report: dict[str, Any] = {
        **setting(),
        "config": config.model_dump(mode="json", exclude={"data", "output"}),
        "steps": trained.steps,
        "seconds": trained.seconds,
        "test": {each.name: each.score.model_dump() for each in measured.reports},
        "groups": {
            each.name: {name: score.mean_iou for name, score in each.groups.items()} for each in measured.reports
        },
    }
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["test"], indent=1))


if __name__ == "__main__":
    main()

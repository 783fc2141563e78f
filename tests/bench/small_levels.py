"""What makes L1 and L2 nearly as good as L4? The same model trained on by one setting after the other, and measured.

    python -m tests.bench.small_levels --data <dsb2018> --init <model> --steps 1000 \
        --out tests/bench/results/small_levels.json

Validation images, on which the choice is made; `test` is not looked at.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.config_file import load_config
from jobs.contract import TrainConfig
from jobs.dataset import load, open_labelled_set
from jobs.models import fetch_model
from jobs.training import first_network
from tests.bench.against_unet import mean_with_interval, quality, train
from tests.bench.setting import setting
from unetpp.allocator import keep_freed_memory
from unetpp.checkpoint import from_pretrained

VARIANTS: dict[str, tuple[float, list[str]]] = {
    "joint, equal weights": (1, []),
    "joint, shallow heads weigh twice": (1, ["head_weights={1: 2, 2: 2, 3: 1, 4: 1}"]),
    "joint, distillation 0.3 from the mean of the heads": (1, ["distillation=0.3", "teacher=mean"]),
    "joint, distillation 0.3 from L4": (1, ["distillation=0.3"]),
    "L3 alone, its head only": (1, ["model.level=3", "model.deep_supervision=false"]),
    "L2 alone, both heads": (1, ["model.level=2"]),
    "L2 alone, its head only": (1, ["model.level=2", "model.deep_supervision=false"]),
    "L2 alone, its head only, as much work": (3.3, ["model.level=2", "model.deep_supervision=false"]),
    "L1 alone": (1, ["model.level=1"]),
    "L1 alone, as much work": (8.5, ["model.level=1"]),
}
"""Name -> (times the steps; other settings). "As much work": as many multiply-adds as the joint network's steps."""


def main() -> None:
    """Train every variant from the same weights with the same crops, and write its levels' quality."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--config", default="infra/recipes/nuclei_cpu_192px.yaml")
    parser.add_argument("--init", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(asked.threads)
    labelled = open_labelled_set(asked.data)
    common = [f"data={asked.data}", "output=unused", "epochs=1", "warmup_steps=50"]
    common += [f"learning_rate={asked.learning_rate}", f"init={asked.init}"]
    initial = from_pretrained(fetch_model(asked.init))
    model = load_config(TrainConfig, asked.config, common).model
    train_images, val_images = (load(labelled.split(split), model) for split in ("train", "val"))
    before = quality(initial, val_images)
    report: dict[str, Any] = {**setting(), "steps": asked.steps, "learning_rate": asked.learning_rate, "val": {}}
    scores = {"before": before}
    for name in asked.only:
        factor, settings = VARIANTS[name]
        steps = f"steps_per_epoch={round(asked.steps * factor)}"
        config = load_config(TrainConfig, asked.config, [*common, *settings, steps])
        network = first_network(config, initial)
        print(name, train(network, config, train_images), flush=True)
        scores[name] = quality(network, val_images)
        print({head: round(float(np.mean(values)), 4) for head, values in scores[name].items()}, flush=True)
    for name, heads in scores.items():
        report["val"][name] = {head: mean_with_interval(values) for head, values in heads.items()}
    report["image_iou"] = scores
    asked.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

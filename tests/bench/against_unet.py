"""UNet++ against a U-Net of the same widths: same blocks, crops, schedule, seed and time. Which is better, by how much?

    python -m tests.bench.against_unet --data <dsb2018> --minutes 20 --out tests/bench/results/against_unet.json

The models are trained one after the other on all cores, each for `--minutes` (the cheaper U-Net makes more steps), or
with `--steps` each for so many. Choices were made on `val`; `test` is looked at once, at the end.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.config_file import load_config
from jobs.contract import TrainConfig
from jobs.dataset import CropSampler, LabelledImage, load, open_labelled_set
from jobs.training import TrainingState
from tests.bench.setting import setting
from tests.bench.unet import UNet
from unetpp.engines import keep_freed_memory
from unetpp.metrics import bootstrap_interval, confusion_counts, iou
from unetpp.model import UNetPlusPlus, count_parameters
from unetpp.predictor import masks_by_level

SPLIT_STEPS = 250


def train(network: UNetPlusPlus, config: TrainConfig, images: list[LabelledImage]) -> dict[str, Any]:
    """Train `network` in place by a plain loop; steps and seconds."""
    num_steps = config.epochs * (config.steps_per_epoch or 1)
    state = TrainingState(config, num_steps, network, torch.device("cpu"), lambda alone: alone)
    state.train()
    started, losses = time.monotonic(), []
    for x_BCHW, target_BHW in CropSampler(images, config).batches(0, num_steps, 0, 1):
        losses.append(float(state.step([(x_BCHW, target_BHW)], 1)))
        state.seconds = time.monotonic() - started
        if config.max_seconds is not None and state.seconds >= config.max_seconds:
            break
        if len(losses) % SPLIT_STEPS == 0:
            print(f"{type(network).__name__} step {len(losses)} loss {np.mean(losses[-SPLIT_STEPS:]):.4f}", flush=True)
    network.load_state_dict(state.averaged.state_dict())
    return {"steps": len(losses), "seconds": round(state.seconds, 1), "loss": float(np.mean(losses[-SPLIT_STEPS:]))}


def quality(network: UNetPlusPlus, images: list[LabelledImage]) -> dict[str, list[float]]:
    """Per-image IoU of every head."""
    network.eval()
    scores: dict[str, list[float]] = {}
    for image in images:
        for name, mask_HW in masks_by_level(network, image.image_HWC).items():
            scores.setdefault(name, []).append(iou(confusion_counts(mask_HW, image.target_HW, 1)))
    return scores


def main() -> None:
    """Train both, and write who is ahead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--config", default="infra/recipes/nuclei_cpu.yaml")
    parser.add_argument("--filters", default="16,32,64,128,256")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=2018)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(os.cpu_count() or 1)

    budget = [f"max_time={asked.minutes * 60:g}s"] if asked.minutes else []
    settings = [
        f"data={asked.data}",
        "output=unused",
        f"model.filters=[{asked.filters}]",
        f"seed={asked.seed}",
        "epochs=1",
    ]
    config = load_config(TrainConfig, asked.config, [*settings, f"steps_per_epoch={asked.steps}", *budget])
    labelled = open_labelled_set(config.data)
    images = load(labelled.split("train"), config.model)
    single = config.model.model_copy(update={"deep_supervision": False})
    report: dict[str, Any] = {**setting(), "config": config.model_dump(mode="json"), "models": {}}
    test = load(labelled.split("test"), config.model)
    scores = {}
    for name in ("U-Net", "UNet++"):
        torch.manual_seed(asked.seed)
        network = UNet(single) if name == "U-Net" else UNetPlusPlus(config.model)
        spent = train(network, config, images)
        for head, values in quality(network, test).items():
            scores[f"{name} {head}"] = values
        report["models"][name] = {**spent, "parameters": count_parameters(network)}
        print(name, report["models"][name], flush=True)
    report["test"] = {
        name: {"mean_iou": float(np.mean(values)), "interval": bootstrap_interval(values, num_bootstrap=5000, seed=0)}
        for name, values in scores.items()
    }
    unet = np.array(scores["U-Net L4"])
    report["ahead_of_unet"] = {
        name: {
            "mean": float(np.mean(np.array(values) - unet)),
            "interval": bootstrap_interval(np.array(values) - unet, num_bootstrap=5000, seed=0),
        }
        for name, values in scores.items()
        if name.startswith("UNet++")
    }
    report["image_iou"] = scores
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("models", "test", "ahead_of_unet")}, indent=1))


if __name__ == "__main__":
    main()

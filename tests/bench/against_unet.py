"""UNet++ against a U-Net of the same widths: same blocks, crops, schedule and seed. Which is better, by how much?

    python -m tests.bench.against_unet --data <dsb2018> --steps 2500 --out tests/bench/results/against_unet.json

The U-Net is trained twice: for as many steps, and for as many multiply-adds, which are more steps. Choices were made on
`val`; `test` is looked at once, at the end.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from jobs.config_file import load_config
from jobs.contract import TrainConfig
from jobs.dataset import CropSampler, LabelledImage, load, open_labelled_set
from jobs.training import TrainingState
from tests.bench.setting import setting
from tests.bench.unet import UNet
from unetpp.allocator import keep_freed_memory
from unetpp.measuring import masks_by_level
from unetpp.metrics import bootstrap_interval, confusion_counts, iou
from unetpp.model import UNetPlusPlus, count_parameters

SPLIT_STEPS = 250


def train(network: UNetPlusPlus, config: TrainConfig, images: Sequence[LabelledImage]) -> dict[str, Any]:
    """Train `network` in place by a plain loop; steps and seconds."""
    num_steps = config.epochs * (config.steps_per_epoch or 1)
    state = TrainingState(config, num_steps, network, torch.device("cpu"), lambda alone: alone)
    state.train()
    started, losses = time.monotonic(), []
    for x_BCHW, target_BHW in CropSampler(images, config).batches(0, num_steps, 0, 1):
        losses.append(float(state.step([(x_BCHW, target_BHW)], 1)))
        if len(losses) % SPLIT_STEPS == 0:
            print(f"{type(network).__name__} step {len(losses)} loss {np.mean(losses[-SPLIT_STEPS:]):.4f}", flush=True)
    network.load_state_dict(state.averaged.state_dict())
    seconds = round(time.monotonic() - started, 1)
    return {"steps": num_steps, "seconds": seconds, "loss": float(np.mean(losses[-SPLIT_STEPS:]))}


def gflop(network: UNetPlusPlus, crop_px: int) -> float:
    """Billions of floating-point operations of one forward of one crop."""
    network.eval()
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        network(torch.zeros(1, network.config.in_channels, crop_px, crop_px))
    return counted.get_total_flops() / 1e9


def quality(network: UNetPlusPlus, images: Sequence[LabelledImage]) -> dict[str, list[float]]:
    """Per-image IoU of every head."""
    network.eval()
    scores: dict[str, list[float]] = {}
    for image in images:
        for name, mask_HW in masks_by_level(network, image.image_HWC).items():
            scores.setdefault(name, []).append(iou(confusion_counts(mask_HW, image.target_HW, 1)))
    return scores


def main() -> None:
    """Train all three, and write who is ahead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--config", default="infra/recipes/nuclei_cpu.yaml")
    parser.add_argument("--steps", type=int, required=True, help="of UNet++")
    parser.add_argument("--seed", type=int, default=2018)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(asked.threads)

    settings = [f"data={asked.data}", "output=unused", f"seed={asked.seed}", "epochs=1"]
    config = load_config(TrainConfig, asked.config, [*settings, f"steps_per_epoch={asked.steps}"])
    single = config.model.model_copy(update={"deep_supervision": False})
    ratio = gflop(UNetPlusPlus(config.model), config.crop_px) / gflop(UNet(single), config.crop_px)
    steps = {"UNet++": asked.steps, "U-Net": asked.steps, "U-Net, same compute": round(asked.steps * ratio)}

    labelled = open_labelled_set(config.data)
    images, test = load(labelled.split("train"), config.model), load(labelled.split("test"), config.model)
    report: dict[str, Any] = {**setting(), "config": config.model_dump(mode="json", exclude={"data"}), "models": {}}
    scores: dict[str, list[float]] = {}
    for name, num_steps in steps.items():
        torch.manual_seed(asked.seed)
        network = UNetPlusPlus(config.model) if name == "UNet++" else UNet(single)
        cost = {"parameters": count_parameters(network), "gflop": gflop(network, config.crop_px)}
        spent = train(network, config.model_copy(update={"steps_per_epoch": num_steps}), images)
        scores |= {f"{name} {head}": values for head, values in quality(network, test).items()}
        report["models"][name] = {**cost, **spent}
        print(name, report["models"][name], flush=True)
    report["test"] = {name: mean_with_interval(values) for name, values in scores.items()}
    report["ahead"] = {
        f"{name} over {peer}": mean_with_interval(np.subtract(scores[name], scores[peer]))
        for peer in ("U-Net L4", "U-Net, same compute L4")
        for name in scores
        if name.startswith("UNet++")
    }
    report["image_iou"] = scores
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: report[name] for name in ("models", "test", "ahead")}, indent=1))


def mean_with_interval(values: Sequence[float] | NDArray[np.float64]) -> dict[str, Any]:
    """Of values by image, with the interval that bootstrap over images gives."""
    return {"mean": float(np.mean(values)), "interval": bootstrap_interval(values, num_bootstrap=5000, seed=0)}


if __name__ == "__main__":
    main()

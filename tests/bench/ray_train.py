"""What Ray Train costs: samples a second of one worker against a plain PyTorch loop of the same model and crops, and of
two gloo workers of one thread each against one.

    python -m tests.bench.ray_train --data <dsb2018> --out tests/bench/results/ray_train.json

Each figure is a slope between two lengths of training, so that starts and ends cancel; all in turn, several rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import train
from jobs.config_file import load_config
from jobs.contract import TrainConfig
from jobs.dataset import CropSampler, load, open_labelled_set
from tests.bench.setting import setting
from unetpp.allocator import keep_freed_memory
from unetpp.loss import deep_supervision_loss
from unetpp.model import UNetPlusPlus

SHORT, LONG = 20, 100
VARIANTS = {"plain, 2 threads": (0, 2), "ray, 2 threads": (1, 2), "ray, 1 thread": (1, 1), "ray, 2 workers": (2, 1)}
"""Name -> (workers, 0 for the plain loop; threads of each)."""


def config_of(asked: argparse.Namespace, output: str, steps: int, workers: int, threads: int) -> TrainConfig:
    """The recipe, cut to one epoch of `steps`, validated on few images."""
    settings = [f"data={asked.data}", f"output={output}", "epochs=1", f"steps_per_epoch={steps}", "val_split=val"]
    settings += [f"num_workers={max(1, workers)}", f"threads_per_worker={threads}"]
    return load_config(TrainConfig, asked.config, settings)


def plain(config: TrainConfig, threads: int) -> None:
    """Training as a user would write it without this project's trainer."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    labelled = open_labelled_set(config.data)
    images = load(labelled.split("train"), config.model)
    torch.manual_seed(config.seed)
    model = UNetPlusPlus(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), config.learning_rate)
    half = config.precision == "bfloat16"
    assert config.steps_per_epoch is not None
    for x_BCHW, target_BHW in CropSampler(images, config).batches(0, config.steps_per_epoch, 0, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(x_BCHW)
        loss = deep_supervision_loss(logits, target_BHW)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def seconds(asked: argparse.Namespace, name: str, steps: int) -> float:
    """Wall time of a process that trains so many steps."""
    started = time.perf_counter()
    words = ["--data", asked.data, "--config", asked.config, "--out", "unused", "--one", name, "--steps", str(steps)]
    subprocess.run([sys.executable, "-m", "tests.bench.ray_train", *words], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Time all variants in turn, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--config", default="infra/recipes/nuclei_cpu.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--one", choices=list(VARIANTS), help="train by this variant in this process, and no more")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.one:
        workers, threads = VARIANTS[asked.one]
        with tempfile.TemporaryDirectory() as output:
            config = config_of(asked, output, asked.steps, workers, threads)
            plain(config, threads) if workers == 0 else train.run(config)
        return
    batch = config_of(asked, "unused", 1, 1, 1).batch_size
    rates: dict[str, list[float]] = {name: [] for name in asked.variants}
    for _ in range(asked.rounds):
        for name in asked.variants:
            short, long = seconds(asked, name, SHORT), seconds(asked, name, LONG)
            rates[name].append((LONG - SHORT) * batch / (long - short))
            print(name, f"{rates[name][-1]:.2f} samples/s", flush=True)
    report: dict[str, Any] = {**setting(), "steps": [SHORT, LONG], "samples_per_second": rates}
    pairs = {
        "ray / plain": ("ray, 2 threads", "plain, 2 threads"),
        "2 workers / 1": ("ray, 2 workers", "ray, 1 thread"),
    }
    report["ratios"] = {
        name: {"median": float(np.median(ratio)), "each": ratio.tolist()}
        for name, (one, other) in pairs.items()
        if {one, other} <= set(asked.variants)
        for ratio in [np.array(rates[one]) / np.array(rates[other])]
    }
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratios"], indent=1))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()

"""What int8 costs in quality, and what it saves in time: every level of a model against float32, by OpenVINO.

    python -m tests.bench.int8 --model <runs>/<run>/model --data <dsb2018> --out tests/bench/results/int8.json

The int8 form is made and judged on validation images, as `unetpp quantise` does it, each level by itself; `--test`
looks at the test images, once. Times are CPU time of one thread, of both engines in turn.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jobs.contract import QuantiseConfig
from jobs.dataset import open_labelled_set
from jobs.models import fetch_model
from jobs.quantise import Guard
from jobs.quantise import run as quantise
from tests.bench.setting import setting
from unetpp.card import read_pretrained
from unetpp.engine_names import EngineName
from unetpp.predictor import Predictor

ENGINES: tuple[EngineName, ...] = ("openvino", "openvino-int8")
TILE_PX = 512


def main() -> None:
    """Quantise, measure and write, level by level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--levels", type=int, nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--about", default="", help="which model this is")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    config = read_pretrained(fetch_model(asked.model)).model
    levels = asked.levels or config.head_levels
    outcome: dict[str, Any] = {
        "what": "mean per-image IoU and CPU seconds in float32 and int8, by OpenVINO, one thread",
        "model": asked.about,
        "filters": config.filters,
        "setting": setting("nncf", "openvino"),
        "levels": {f"L{level}": one_level(asked, level) for level in levels},
    }
    asked.out.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(outcome["levels"], indent=2))


def one_level(asked: argparse.Namespace, level: int) -> dict[str, Any]:
    """Quality on each split and seconds of one level; of a refused one what was measured last."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model"
        job = QuantiseConfig(model=asked.model, data=asked.data, level=level, out=str(made), refusal_ok=True, threads=1)
        result = quantise(job)
        found: dict[str, Any] = {
            "accepted": result.accepted,
            "message": result.message,
            "val": result.scores[f"L{level}"].model_dump(),
        }
        if not result.accepted:
            return found
        found["seconds"] = seconds(made, level, asked.rounds)
        if asked.test:
            samples = open_labelled_set(asked.data).split("test")
            kept = read_pretrained(made).model
            found["test"] = Guard(made, kept, (level,), samples, job).scores(made)[f"L{level}"].model_dump()
        return found


def seconds(model_dir: Path, level: int, rounds: int) -> dict[str, float]:
    """CPU seconds of a megapixel (10**6), the median of rounds in which both engines take their turn, and the ratio."""
    tile = np.random.default_rng(0).integers(0, 256, (TILE_PX, TILE_PX, 3), np.uint8)
    predictors = {
        engine: Predictor.from_pretrained(model_dir, level=level, engine=engine, device="cpu", threads=1)
        for engine in ENGINES
    }
    times: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for _ in range(1 + rounds):
        for engine, predictor in predictors.items():
            started = time.process_time()
            predictor([tile])
            times[engine].append((time.process_time() - started) / (tile[..., 0].size / 1e6))
    medians = {engine: float(np.median(each[1:])) for engine, each in times.items()}
    return {**medians, "ratio": medians["openvino"] / medians["openvino-int8"]}


if __name__ == "__main__":
    main()

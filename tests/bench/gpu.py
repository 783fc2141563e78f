"""A GPU: which share of its measured peak a forward of each level reaches, and a step of training; are masks right?

    python -m tests.bench.gpu --out tests/bench/results/gpu.json

Networks of the paper's widths with random weights, batches of 256 x 256 tiles of synthetic nuclei. `eager` is torch as
everyone writes it (NCHW, nothing folded), in float32 and by autocast in bfloat16, its batch on the GPU already. `torch`
and `compiled` are engines of `Predictor`, which are handed file values in memory and give masks in memory: alone, each
call waits for its masks; in flight, a batch is begun before the one before it is read, as in a run. All in turn, in
rounds. The peak is that of a large product of matrices of the same precision; float32 is float32 here, not TF32.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.config_file import load_config
from jobs.contract import TrainConfig
from jobs.training import TrainingState
from tests.bench.rounds import Sample, interleaved, write
from tests.bench.subjects import PAPER, random_network
from unetpp.checkpoint import arrays_of
from unetpp.config import Level
from unetpp.engine_names import EngineName
from unetpp.engines import Pixels
from unetpp.model import UNetPlusPlus, count_gmacs
from unetpp.predictor import load_engine
from unetpp.synth import synthesize
from unetpp.torch_engine import plain_float32
from unetpp.weights import picked, pruned

SIDE = 256
CORE = (slice(0, SIDE), slice(0, SIDE))
PRECISIONS = {
    "eager": "f32",
    "eager autocast": "bf16",
    "torch": "f32",
    "compiled": "bf16",
    "compiled, in flight": "bf16",
}
ENGINES: tuple[EngineName, ...] = ("torch", "compiled")
TARGET = 0.5
"""Share of the peak at L4 by engine compiled."""


def tiles_of(num: int) -> Pixels:
    """Synthetic nuclei, uint8 BHWC."""
    return np.stack([synthesize(n, size=SIDE, modality=("fluorescence", "brightfield")[n % 2])[0] for n in range(num)])


def rate(work: Callable[[], Any], seconds: float, per_call: float) -> Sample:
    """Units of work a second, from the first call's end to the last's on the GPU."""
    done = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    done()
    started, num = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        num += 1
        if num % 8 == 0:
            done()
    done()
    return {"per_s": num * per_call / (time.perf_counter() - started)}


def product(dtype: torch.dtype, side: int, device: str) -> Callable[[], Any]:
    """A large product of matrices."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(left, right)


def eager(model: UNetPlusPlus, level: Level, tiles_BHWC: Pixels, device: str, *, autocast: bool) -> Callable[[], Any]:
    """Inference as everyone writes it, of a batch that is on the GPU."""
    network = UNetPlusPlus(pruned(model.config, level))
    network.load_state_dict({name: model.state_dict()[name] for name in network.state_dict()})
    network = network.to(device).eval()
    x_BCHW = torch.from_numpy(tiles_BHWC).permute(0, 3, 1, 2).float().contiguous().to(device) / 255

    @torch.no_grad()
    def call() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return network(x_BCHW)[level].sigmoid() > 0.5

    return call


def in_flight(engine: Any, tiles_BHWC: Pixels, num: int) -> None:
    """So many calls, each begun before the one before it is read."""
    wait = engine.start(tiles_BHWC, CORE)
    for _ in range(num - 1):
        begun = engine.start(tiles_BHWC, CORE)
        wait()
        wait = begun
    wait()


def training_step(config: TrainConfig, device: str, compile_: bool) -> Callable[[], Any]:
    """A step over a batch that is on the GPU."""
    config = config.model_copy(update={"compile": compile_})
    state = TrainingState(config, 1000, UNetPlusPlus(config.model), torch.device(device), lambda alone: alone)
    state.train()
    shape = (config.batch_size, config.crop_px, config.crop_px)
    x_BCHW = torch.rand(shape[0], 3, *shape[1:], device=device).to(memory_format=torch.channels_last)
    target_BHW = (torch.rand(shape, device=device) > 0.8).to(torch.uint8)
    return lambda: state.step([(x_BCHW, target_BHW)], 1)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, nargs=5, default=PAPER)
    parser.add_argument("--levels", type=int, nargs="+", default=[4, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one timing")
    parser.add_argument("--config", default="infra/recipes/nuclei_gpu.yaml", help="of the training steps")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices whose product tells the peak")
    parser.add_argument("--compile", action="store_true", help="a compiled training step, too: a minute to compile")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    plain_float32()
    tiles_BHWC = tiles_of(asked.batch)
    model = random_network(asked.filters, list(tiles_BHWC))
    variants: dict[str, Callable[[], Sample]] = {}
    for precision, dtype in {"f32": torch.float32, "bf16": torch.bfloat16}.items():
        variants[f"product {precision}"] = partial(
            rate, product(dtype, asked.matrix, asked.device), asked.seconds, 2 * asked.matrix**3 / 1e12
        )
    teraflop, right, ready_s = {}, {}, {}
    for level in asked.levels:
        config = pruned(model.config, level)
        arrays = picked(arrays_of(model), config)
        teraflop[level] = 2 * count_gmacs(config, SIDE, SIDE) * asked.batch / 1000
        timed = partial(rate, seconds=asked.seconds, per_call=asked.batch)
        expected_BHW = load_engine("reference", config, arrays, "fast", "cpu")(tiles_BHWC[:4], CORE)[0]
        for name, autocast in (("eager", False), ("eager autocast", True)):
            work = eager(model, level, tiles_BHWC, asked.device, autocast=autocast)
            variants[f"{name} L{level}"] = partial(timed, work)
        for name in ENGINES:
            started = time.perf_counter()
            engine = load_engine(name, config, arrays, "fast", asked.device)
            for _ in range(3):  # compiled, recorded, replayed
                masks_BHW, _stats = engine(tiles_BHWC, CORE)
            ready_s[f"{name} L{level}"] = time.perf_counter() - started
            right[f"{name} L{level}"] = float((masks_BHW[:4] == expected_BHW).mean())
            variants[f"{name} L{level}"] = partial(timed, partial(engine, tiles_BHWC, CORE))
        variants[f"compiled, in flight L{level}"] = partial(
            rate, partial(in_flight, engine, tiles_BHWC, 32), asked.seconds, 32 * asked.batch
        )
        print(f"L{level}", ready_s, right, flush=True)
    settings = ["data=unused", "output=unused"]
    recipe = load_config(TrainConfig, asked.config, settings)
    for name, compile_ in (("step", False), ("step, compiled", True)):
        if not compile_ or asked.compile:
            with contextlib.suppress(torch.OutOfMemoryError):
                variants[name] = partial(
                    rate, training_step(recipe, asked.device, compile_), asked.seconds, recipe.batch_size
                )
    found = interleaved(variants, asked.rounds, lambda variant: variant())

    def middle(name: str) -> float:
        return statistics.median(found.values(name, "per_s"))

    peaks = {precision: middle(f"product {precision}") for precision in ("f32", "bf16")}
    rows = [
        {
            "engine": name,
            "level": level,
            "images_per_s": middle(f"{name} L{level}"),
            "share_of_peak": middle(f"{name} L{level}") / asked.batch * teraflop[level] / peaks[precision],
            "times_eager": middle(f"{name} L{level}") / middle(f"eager L{level}"),
        }
        for level in asked.levels
        for name, precision in PRECISIONS.items()
    ]
    crop_teraflop = 2 * count_gmacs(recipe.model, recipe.crop_px, recipe.crop_px) / 1000
    training = {
        name: {"crops_per_s": middle(name), "share_of_peak": 3 * crop_teraflop * middle(name) / peaks["bf16"]}
        for name in ("step", "step, compiled")
        if name in found.samples
    }
    seen = next(
        (row["share_of_peak"] for row in rows if (row["engine"], row["level"]) == ("compiled, in flight", 4)), 0
    )
    write(
        asked.out,
        vars(asked),
        found,
        ("triton",),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        peak_tflops=peaks,
        targets={"compiled L4, share of the peak": {"wanted": TARGET, "seen": seen, "met": seen >= TARGET}},
        forwards=rows,
        ready_s=ready_s,
        same_pixels_as_cpu=right,
        training=training,
    )
    for row in rows:
        print(f"L{row['level']} {row['engine']:22} {row['images_per_s']:9.0f}/s {row['share_of_peak']:.3f}", flush=True)


if __name__ == "__main__":
    main()

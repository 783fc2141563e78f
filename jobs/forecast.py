"""How much of an archive makes a shard, by forecast: from what the network costs and what engines do, to 30 seconds.

Nothing is timed: a night's shards are planned where the driver runs, which may be no machine of the workers' kind. A
guess that is wrong makes shards that take longer or shorter, never wrong masks.
"""

from jobs.contract import PredictConfig
from jobs.planning import LARGEST, ShardSize
from unetpp.config import ModelConfig
from unetpp.devices import num_cpus
from unetpp.weights import kmacs_per_pixel

SECONDS, LEAST_SECONDS = 30.0, 2.0
SHARDS_LEFT = 3
"""A shard is at most one in so many, for each worker, of what is left; but not under LEAST_SECONDS for that."""
MACS_PER_S: dict[str, float] = {
    "reference": 30e9,
    "torch": 60e9,
    "openvino": 60e9,
    "openvino-bf16": 120e9,
    "openvino-int8": 240e9,
}
"""Of one thread of a CPU."""
GPU_MACS_PER_S = 20e12
"""Of the engine that GPUs are given."""
PATIENCE = 4
"""So many times what is forecast may pass before work is taken for hanging: CPUs differ, and networks."""
TRAVELLING_BYTES = 64 << 20
"""Of a shard's images where they are decoded in one place and predicted in another."""
MIRRORED = 4
"""Forwards of an image and its mirror images."""


def shard_size(config: PredictConfig, model: ModelConfig) -> ShardSize:
    """The size of a shard for a config whose engine is resolved, and the network as it is computed."""
    cores = num_cpus()
    threads = config.threads or (1 if config.backend == "ray" else cores)
    num_workers = config.num_workers or (1 if config.backend == "inline" else max(1, cores // threads))
    macs_per_s, macs_per_pixel = _macs_per_s(config, threads), _macs_per_pixel(config, model)
    pixels, least_pixels = (int(seconds * macs_per_s / macs_per_pixel) for seconds in (SECONDS, LEAST_SECONDS))
    if config.topology == "split":
        pixels = min(pixels, TRAVELLING_BYTES // model.in_channels)
    return ShardSize(LARGEST.images, pixels, 1 / (SHARDS_LEFT * num_workers), least_pixels)


def seconds_of_a_worker(config: PredictConfig, model: ModelConfig, pixels: float) -> float:
    """What a worker on Ray predicts so many pixels in."""
    return pixels * _macs_per_pixel(config, model) / _macs_per_s(config, config.threads or 1)


def seconds_of_a_thread(config: PredictConfig, model: ModelConfig, pixels: float) -> float:
    """What one thread of a CPU predicts them in: behind a guard, where what ended its workers is predicted."""
    return pixels * _macs_per_pixel(config, model) / MACS_PER_S.get(config.engine, MACS_PER_S["torch"])


def _macs_per_s(config: PredictConfig, threads: int) -> float:
    return MACS_PER_S[config.engine] * threads if config.engine in MACS_PER_S else GPU_MACS_PER_S


def _macs_per_pixel(config: PredictConfig, model: ModelConfig) -> float:
    return 1000 * kmacs_per_pixel(model) * (MIRRORED if config.flips else 1)

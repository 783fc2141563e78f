"""The weights of a network as arrays by name: read, checked, picked for a level, folded, digested. Imports no torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from unetpp.card import CONFIG, WEIGHTS
from unetpp.config import Level, ModelConfig
from unetpp.errors import ConfigError, ModelError

Weights = Mapping[str, NDArray[Any]]
"""A network's state by name, as torch names it."""

BATCH_NORM_EPS = 1e-5


def node_name(i: int, j: int) -> str:
    """The name under which X^{i,j} and its upsampler are stored."""
    return f"x{i}{j}"


def convolutions(config: ModelConfig, i: int, j: int) -> tuple[tuple[str, str | None], ...]:
    """Names of a node's two convolutions, each with that of the BatchNorm after it; None where there is none."""
    node = f"nodes.{node_name(i, j)}"
    if config.norm == "none":
        return (f"{node}.0", None), (f"{node}.2", None)
    return (f"{node}.0", f"{node}.1"), (f"{node}.3", f"{node}.4")


def expected(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every array of a network of this config, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, j in config.nodes:
        filters, channels = config.filters[i], config.node_channels(i, j)
        if j > 0 and config.upsample == "deconv":
            shapes[f"ups.{node_name(i, j)}.weight"] = (config.filters[i + 1], filters, 2, 2)
            shapes[f"ups.{node_name(i, j)}.bias"] = (filters,)
        for convolution, norm in convolutions(config, i, j):
            shapes[f"{convolution}.weight"] = (filters, channels, 3, 3)
            vectors = [f"{convolution}.bias"] if norm is None else list(_of_norm(norm))
            shapes |= dict.fromkeys(vectors, (filters,))
            if norm is not None:
                shapes[f"{norm}.num_batches_tracked"] = ()
            channels = filters
    for level in config.head_levels:
        shapes[f"heads.{level}.weight"] = (config.num_classes, config.filters[0], 1, 1)
        shapes[f"heads.{level}.bias"] = (config.num_classes,)
    return {name: (shape, "float32" if shape else "int64") for name, shape in shapes.items()}


def kmacs_per_pixel(config: ModelConfig) -> float:
    """Thousands of multiply-adds that a forward costs for each pixel of the image; convolutions alone."""
    macs: float = config.filters[0] * config.num_classes * len(config.head_levels)
    for i, j in config.nodes:
        filters, upsampled = config.filters[i], j > 0 and config.upsample == "deconv"
        of_node = 9 * filters * (config.node_channels(i, j) + filters)
        macs += (of_node + (config.filters[i + 1] * filters if upsampled else 0)) / 4**i
    return macs / 1000


def _of_norm(norm: str) -> Iterator[str]:
    return (f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var"))


def read_weights(model_dir: Path, config: ModelConfig) -> dict[str, NDArray[Any]]:
    """The weights of a model folder. ModelError where they are absent, damaged or do not fit the config."""
    path = model_dir / WEIGHTS
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing beside its {CONFIG}; copy the whole model folder") from None
    except (SafetensorError, OSError, KeyError, TypeError) as error:  # the last two: of a type that numpy has not
        raise ModelError(f"{path} is damaged ({error}); copy the model folder again") from None
    wanted = expected(config)
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights or name not in wanted:
            state = "missing from" if name not in weights else "not part of the config's network but in"
            raise ModelError(f"{name} is {state} {path}; weights and {CONFIG} are of different models")
        seen = weights[name].shape, str(weights[name].dtype)
        if seen != wanted[name]:
            raise ModelError(
                f"{name} in {path} is {seen[0]} {seen[1]}, {CONFIG} wants {wanted[name][0]} {wanted[name][1]}; "
                "they are of different models"
            )
        if not np.isfinite(weights[name]).all():
            raise ModelError(f"{name} in {path} has NaN or infinity: its training failed; take another model")
        if name.endswith("running_var") and (weights[name] < 0).any():
            raise ModelError(f"{name} in {path} has variances below 0: it is damaged; copy the model folder again")
    return weights


def pruned(config: ModelConfig, level: Level, *, keep_heads: bool = False) -> ModelConfig:
    """The config of the network of the nodes X^{i,j} with i + j <= `level`: see `unetpp.prune`.

    ConfigError where `level` has no head.
    """
    if level not in config.head_levels:
        raise ConfigError(
            f"level {level} has no supervised head in this model; it has heads at levels {list(config.head_levels)}. "
            "Train with deep_supervision to be able to prune"
        )
    deep_supervision = keep_heads and config.deep_supervision
    heads = tuple(range(1, level + 1)) if deep_supervision else (level,)
    return config.model_copy(
        update={
            "level": level,
            "filters": config.filters[: level + 1],
            "deep_supervision": deep_supervision,
            "temperature": {head: degree for head, degree in config.temperature.items() if head in heads},
        }
    )


def picked(weights: Weights, config: ModelConfig) -> dict[str, NDArray[Any]]:
    """Those of `weights` that a network of `config` has."""
    return {name: weights[name] for name in expected(config)}


def folded(config: ModelConfig, weights: Weights) -> tuple[ModelConfig, dict[str, NDArray[Any]]]:
    """The same network without norms: each is in the convolution before it. Outputs agree to about 1e-6."""
    plain = config.model_copy(update={"norm": "none"})
    if config.norm == "none":
        return plain, dict(weights)
    found = {name: array for name, array in weights.items() if name.startswith(("ups.", "heads."))}
    for i, j in config.nodes:
        for (before, norm), (after, _) in zip(convolutions(config, i, j), convolutions(plain, i, j), strict=True):
            assert norm is not None
            gain, shift, mean, variance = (weights[name].astype(np.float64) for name in _of_norm(norm))
            factor = gain / np.sqrt(variance + BATCH_NORM_EPS)
            found[f"{after}.weight"] = (weights[f"{before}.weight"] * factor[:, None, None, None]).astype(np.float32)
            found[f"{after}.bias"] = (shift - mean * factor).astype(np.float32)
    return plain, found


def digest(config: ModelConfig, weights: Weights, **decision: str) -> str:
    """SHA-256 (hex) of the weights, the architecture and scaling, and what else decides a pixel (mode, precision).

    A full model asked for level L and its pruned export have one digest: they compute the same masks.
    """
    sha = hashlib.sha256()
    stated = config.model_dump(mode="json", exclude={"ignore_index"})  # of the labels: it changes no mask
    if len(config.head_levels) == 1:
        stated["deep_supervision"] = False
    stated["filters"] = stated["filters"][: config.level + 1]
    stated["temperature"] = {level: degree for level, degree in stated["temperature"].items() if degree != 1.0}
    if not stated["temperature"]:
        del stated["temperature"]
    if stated["bands"] is None:
        del stated["bands"]
    sha.update(json.dumps({"model": stated, **decision}, sort_keys=True).encode())
    for name, array in sorted(weights.items()):
        sha.update(f"{name} torch.{array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()

"""The network as an OpenVINO graph, built node by node from the weights. Imports no torch.

`network` is UNet++ alone: x_BCHW -> the logits of every head. `graph` puts around it what makes masks of file values,
whatever network of this interface it is given: in float32, or one that was quantised.
"""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from unetpp.config import ModelConfig
from unetpp.engines import MIRRORS, Mode, levels_read, value_range
from unetpp.weights import Weights, convolutions, folded, node_name

Output = Any
"""An operation with one output, or one of its outputs."""

CHANNELS, ROWS, COLUMNS = 1, 2, 3
NAN = np.float32(np.nan)


def head_name(level: int) -> str:
    """The name of a head's output in a network."""
    return f"head{level}"


def network(config: ModelConfig, weights: Weights) -> ov.Model:
    """x_BCHW float32, as `torch_engine.scale` makes it -> logits_BKHW of every head, under `head_name`.

    H and W are multiples of `ModelConfig.stride`. Operations with weights bear their names in `weights.folded`.
    """
    config, weights = folded(config, weights)
    x_BCHW = ops.parameter([-1, config.in_channels, -1, -1], np.float32, name="x")
    centred = ops.subtract(x_BCHW, _channels(config.mean))
    logits = _heads(ops.divide(centred, _channels(config.std)), weights, config)
    for level, logits_BKHW in logits.items():
        logits_BKHW.output(0).set_names({head_name(level)})
    return ov.Model([ops.result(logits_BKHW) for logits_BKHW in logits.values()], [x_BCHW], "unetpp")


def graph(
    network: ov.Model,
    config: ModelConfig,
    mode: Mode,
    pixel_type: str,
    *,
    flips: bool = False,
    probability: bool = False,
) -> ov.Model:
    """tiles_BHWC -> class ids BHW uint8, margin BHW float32 and, with `probability`, 8 bits BHW of the foreground.

    H and W of tiles are multiples of the stride. The margin is that of `TileStats`, and NaN where a tile or a head that
    was read has NaN or infinity. ConfigError on other pixel types than uint8, uint16 and float32.
    """
    low, high = value_range(config, pixel_type)
    tiles_BHWC = ops.parameter([-1, -1, -1, config.in_channels], ov.Type(np.dtype(pixel_type)), name="tiles")
    x_BCHW = _scaled(tiles_BHWC, low, high, config.gamma)
    mirrors = MIRRORS if flips else MIRRORS[:1]
    heads = _around(network, ops.concat([_mirrored(x_BCHW, axes) for axes in mirrors], 0))
    seen, finite = [], []
    if pixel_type == "float32":  # OpenVINO's ReLU makes 0 of NaN
        finite.append(ops.reduce_logical_and(ops.is_finite(tiles_BHWC), np.int32(-1)))
    for level in levels_read(config, mode):
        each_BKHW = ops.split(heads[head_name(level)], np.int32(0), len(mirrors)).outputs()
        for axes, logits_BKHW in zip(mirrors, each_BKHW, strict=True):
            logits_BKHW = _mirrored(logits_BKHW, axes)
            finite.append(ops.reduce_logical_and(ops.is_finite(logits_BKHW), np.int32(CHANNELS)))
            logits_BKHW = ops.divide(logits_BKHW, np.float32(config.temperature.get(level, 1.0)))
            one_class = config.num_classes == 1
            seen.append(ops.sigmoid(logits_BKHW) if one_class else ops.softmax(logits_BKHW, CHANNELS))
    probability_BKHW = _mean(seen)
    mask_BHW, margin_BHW = _decided(probability_BKHW, config.num_classes)
    is_finite_BHW = finite[0]
    for other in finite[1:]:
        is_finite_BHW = ops.logical_and(is_finite_BHW, other)
    outputs = [mask_BHW, ops.select(is_finite_BHW, margin_BHW, NAN)]
    if probability:
        outputs.append(_eight_bits(probability_BKHW, config.num_classes))
    return ov.Model([ops.result(output) for output in outputs], [tiles_BHWC], "masks")


def _around(network: ov.Model, x_BCHW: Output) -> dict[str, Output]:
    """The outputs by name of a copy of a network that reads `x_BCHW`."""
    copied = network.clone()
    for consumer in copied.input(0).get_target_inputs():
        consumer.replace_source_output(x_BCHW.output(0))
    return {output.get_any_name(): output.get_node().input_value(0) for output in copied.outputs}


def _channels(values: tuple[float, ...]) -> Output:
    return ops.constant(np.array(values, np.float32).reshape(1, -1, 1, 1))


def _scaled(tiles_BHWC: Output, low: float, high: float, gamma: float) -> Output:
    """As `torch_engine.scale`."""
    values_BHWC = ops.subtract(ops.convert(tiles_BHWC, np.float32), np.float32(low))
    x_BHWC = ops.divide(values_BHWC, np.float32(high) - np.float32(low))
    if gamma != 1.0:
        x_BHWC = ops.power(ops.relu(x_BHWC), np.float32(gamma))
    return ops.transpose(x_BHWC, np.array([0, 3, 1, 2]))


def _heads(x_BCHW: Output, weights: Weights, config: ModelConfig) -> dict[int, Output]:
    """Logits of every head: `UNetPlusPlus.heads_of` in the graph's operations."""
    grid: dict[tuple[int, int], Output] = {}
    for i, j in config.nodes:
        if j > 0:
            lifted = _upsampled(grid[i + 1, j - 1], weights, node_name(i, j), config.upsample)
            inputs = ops.concat([*(grid[i, k] for k in range(j)), lifted], CHANNELS)
        elif i > 0:
            inputs = ops.max_pool(grid[i - 1, 0], [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
        else:
            inputs = x_BCHW
        for name, _ in convolutions(config, i, j):
            inputs = ops.relu(_convolved(inputs, weights, name, padding=1))
        grid[i, j] = inputs
    return {level: _convolved(grid[0, level], weights, f"heads.{level}", padding=0) for level in config.head_levels}


def _convolved(x_BCHW: Output, weights: Weights, name: str, *, padding: int) -> Output:
    pads = [padding, padding]
    convolved = ops.convolution(x_BCHW, weights[f"{name}.weight"], [1, 1], pads, pads, [1, 1], name=name)
    return _with_bias(convolved, weights, name)


def _with_bias(x_BCHW: Output, weights: Weights, name: str) -> Output:
    return ops.add(x_BCHW, weights[f"{name}.bias"].reshape(1, -1, 1, 1))


def _upsampled(x_BCHW: Output, weights: Weights, node: str, upsample: str) -> Output:
    """Twice as high and wide, as torch does it."""
    if upsample == "deconv":
        name = f"ups.{node}"
        lifted = ops.convolution_backprop_data(x_BCHW, weights[f"{name}.weight"], [2, 2], name=name)
        return _with_bias(lifted, weights, name)
    how = (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if upsample == "nearest"
        else {"mode": "linear_onnx", "coordinate_transformation_mode": "half_pixel"}
    )
    twice = np.array([2.0, 2.0], np.float32)
    return ops.interpolate(x_BCHW, twice, shape_calculation_mode="scales", axes=np.array([ROWS, COLUMNS]), **how)


def _mirrored(x_BCHW: Output, axes: tuple[int, ...]) -> Output:
    for axis in axes:
        first, beyond, back, along = (np.array([n]) for n in (-1, np.iinfo(np.int64).min, -1, axis))
        x_BCHW = ops.slice(x_BCHW, first, beyond, back, along)
    return x_BCHW


def _mean(probabilities: list[Output]) -> Output:
    total = probabilities[0]
    for other in probabilities[1:]:
        total = ops.add(total, other)
    return ops.divide(total, np.float32(len(probabilities)))


def _decided(probability_BKHW: Output, num_classes: int) -> tuple[Output, Output]:
    """As `torch_engine.decide`."""
    if num_classes == 1:
        probability_BHW = ops.squeeze(probability_BKHW, CHANNELS)
        margin_BHW = ops.absolute(ops.subtract(ops.multiply(probability_BHW, np.float32(2)), np.float32(1)))
        return ops.convert(ops.greater(probability_BHW, np.float32(0.5)), np.uint8), margin_BHW
    best = ops.topk(probability_BKHW, np.int32(2), CHANNELS, "max", "value", stable=True)
    first, second = (ops.gather(best.output(0), np.int32(n), np.int32(CHANNELS)) for n in range(2))
    ids = ops.gather(best.output(1), np.int32(0), np.int32(CHANNELS))
    return ops.convert(ids, np.uint8), ops.subtract(first, second)


def _eight_bits(probability_BKHW: Output, num_classes: int) -> Output:
    """As `torch_engine.eight_bits`."""
    foreground_BHW = ops.gather(probability_BKHW, np.int32(0), np.int32(CHANNELS))
    if num_classes > 1:
        foreground_BHW = ops.subtract(np.float32(1), foreground_BHW)
    rounded = ops.ceiling(ops.subtract(ops.multiply(foreground_BHW, np.float32(255)), np.float32(0.5)))
    return ops.convert(ops.clamp(rounded, 0.0, 255.0), np.uint8)

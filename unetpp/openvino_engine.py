"""The network as an OpenVINO graph, built node by node from the weights: float32 on CPUs.

File values go in and masks come out: scaling, normalisation, heads and threshold are part of the graph.
"""

import threading
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray

from unetpp.config import ModelConfig
from unetpp.engines import MIRRORS, Mode, Pixels, TileStats, fold_batch_norm, value_range
from unetpp.model import UNetPlusPlus, node_name

Output = Any
"""An output of a node of a graph; the types of OpenVINO's operations do not say so much."""

CHANNELS, ROWS, COLUMNS = 1, 2, 3
NAN = np.float32(np.nan)


class OpenVINOEngine:
    """As `TorchEngine` on CPU, in OpenVINO; float32, one graph a pixel type, any number and size of tiles.

    threads: of a forward; None: every core. Masks are those of torch, but for pixels undecided to the last bits.
    """

    def __init__(
        self,
        model: UNetPlusPlus,
        mode: Mode,
        *,
        threads: int | None = None,
        flips: bool = False,
        probability: bool = False,
    ) -> None:
        self.batch_tiles = 1
        self.probability = probability
        self._model = fold_batch_norm(model)
        self._mode: Mode = mode
        self._flips = flips
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            # Two processes would pin themselves to the same core.
            "ENABLE_CPU_PINNING": False,
        } | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
        self._core = ov.Core()
        self._requests: dict[str, ov.InferRequest] = {}
        self._lock = threading.Lock()

    def __call__(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> tuple[NDArray[np.uint8], list[TileStats]]:
        """See `Engine`. ConfigError on pixels that are not uint8, uint16 or float32."""
        with self._lock:
            found = self._request(str(tiles_BHWC.dtype)).infer([np.ascontiguousarray(tiles_BHWC)], share_inputs=True)
            mask_BHW, margin_BHW, *eight_BHW = [np.array(found[n][:, *core]) for n in range(2 + self.probability)]
        finite = np.isfinite(margin_BHW).all((1, 2)).tolist()
        margins = margin_BHW.mean((1, 2), dtype=np.float64).tolist()
        eights = list(eight_BHW[0]) if self.probability else [None] * len(margins)
        return mask_BHW, [TileStats(*each) for each in zip(finite, margins, eights, strict=True)]

    def _request(self, pixel_type: str) -> ov.InferRequest:
        if pixel_type not in self._requests:
            network = graph(self._model, self._mode, pixel_type, flips=self._flips, probability=self.probability)
            self._requests[pixel_type] = self._core.compile_model(network, "CPU", self._settings).create_infer_request()
        return self._requests[pixel_type]


def graph(
    model: UNetPlusPlus, mode: Mode, pixel_type: str, *, flips: bool = False, probability: bool = False
) -> ov.Model:
    """tiles_BHWC -> class ids BHW uint8, margin BHW float32 and, with `probability`, 8 bits BHW of the foreground.

    `model` has its BatchNorms folded. H and W of tiles are multiples of its stride. The margin is that of `TileStats`,
    and NaN where a head that was read gave NaN or infinity.
    """
    config = model.config
    low, high = value_range(config, pixel_type)
    tiles_BHWC = ops.parameter([-1, -1, -1, config.in_channels], ov.Type(np.dtype(pixel_type)), name="tiles")
    x_BCHW = _scaled(tiles_BHWC, low, high, model)
    weights = _constants(model)
    seen, finite = [], []
    for axes in MIRRORS if flips else MIRRORS[:1]:
        heads = _heads(_mirrored(x_BCHW, axes), weights, config)
        read = heads if mode == "accurate" else {config.level: heads[config.level]}
        for level, logits_BKHW in read.items():
            logits_BKHW = _mirrored(logits_BKHW, axes)
            finite.append(ops.reduce_logical_and(ops.is_finite(logits_BKHW), CHANNELS))
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
    return ov.Model([ops.result(output) for output in outputs], [tiles_BHWC], "unetpp")


def _scaled(tiles_BHWC: Output, low: float, high: float, model: UNetPlusPlus) -> Output:
    """As `engines.scale`, then normalised."""
    config = model.config
    x_BHWC = ops.divide(
        ops.subtract(ops.convert(tiles_BHWC, np.float32), np.float32(low)), np.float32(high) - np.float32(low)
    )
    if config.gamma != 1.0:
        x_BHWC = ops.power(ops.relu(x_BHWC), np.float32(config.gamma))
    x_BCHW = ops.transpose(x_BHWC, np.array([0, 3, 1, 2]))
    return ops.divide(ops.subtract(x_BCHW, model.mean.numpy()), model.std.numpy())


def _constants(model: UNetPlusPlus) -> dict[str, Output]:
    """The weights by name, once for all mirror images; biases as 1, C, 1, 1."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {
        name: ops.constant(array.reshape(1, -1, 1, 1) if name.endswith(".bias") else array)
        for name, array in arrays.items()
    }


def _heads(x_BCHW: Output, weights: dict[str, Output], config: ModelConfig) -> dict[int, Output]:
    """Logits of every head: `UNetPlusPlus.heads_of` in the graph's operations."""
    grid: dict[tuple[int, int], Output] = {}
    for depth in range(config.level + 1):
        for j in range(depth + 1):
            i = depth - j
            if j > 0:
                lifted = _upsampled(grid[i + 1, j - 1], weights, node_name(i, j), config.upsample)
                inputs = ops.concat([*(grid[i, k] for k in range(j)), lifted], CHANNELS)
            elif i > 0:
                pooled = ops.max_pool(grid[i - 1, 0], [2, 2], [1, 1], [0, 0], [0, 0], [2, 2])
                inputs = pooled.output(0)
            else:
                inputs = x_BCHW
            node = f"nodes.{node_name(i, j)}"
            convolutions = sorted(name for name in weights if name.startswith(f"{node}.") and name.endswith(".weight"))
            for name in convolutions:
                inputs = ops.relu(_convolved(inputs, weights, name.removesuffix(".weight"), padding=1))
            grid[i, j] = inputs
    return {level: _convolved(grid[0, level], weights, f"heads.{level}", padding=0) for level in config.head_levels}


def _convolved(x_BCHW: Output, weights: dict[str, Output], name: str, *, padding: int) -> Output:
    pads = [padding, padding]
    convolved = ops.convolution(x_BCHW, weights[f"{name}.weight"], [1, 1], pads, pads, [1, 1])
    return ops.add(convolved, weights[f"{name}.bias"])


def _upsampled(x_BCHW: Output, weights: dict[str, Output], node: str, upsample: str) -> Output:
    """Twice as high and wide, as torch does it."""
    if upsample == "deconv":
        name = f"ups.{node}"
        lifted = ops.convolution_backprop_data(x_BCHW, weights[f"{name}.weight"], [2, 2])
        return ops.add(lifted, weights[f"{name}.bias"])
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
    """As `engines.decide`."""
    if num_classes == 1:
        probability_BHW = ops.squeeze(probability_BKHW, CHANNELS)
        margin_BHW = ops.absolute(ops.subtract(ops.multiply(probability_BHW, np.float32(2)), np.float32(1)))
        return ops.convert(ops.greater(probability_BHW, np.float32(0.5)), np.uint8), margin_BHW
    best = ops.topk(probability_BKHW, np.int32(2), CHANNELS, "max", "value", stable=True)
    first, second = (ops.gather(best.output(0), np.int32(n), np.int32(CHANNELS)) for n in range(2))
    ids = ops.gather(best.output(1), np.int32(0), np.int32(CHANNELS))
    return ops.convert(ids, np.uint8), ops.subtract(first, second)


def _eight_bits(probability_BKHW: Output, num_classes: int) -> Output:
    """As `engines.eight_bits`."""
    foreground_BHW = ops.gather(probability_BKHW, np.int32(0), np.int32(CHANNELS))
    if num_classes > 1:
        foreground_BHW = ops.subtract(np.float32(1), foreground_BHW)
    rounded = ops.ceiling(ops.subtract(ops.multiply(foreground_BHW, np.float32(255)), np.float32(0.5)))
    return ops.convert(ops.clamp(rounded, 0.0, 255.0), np.uint8)

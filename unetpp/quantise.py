"""Post-training quantisation: a float32 network and some crops of images -> the same network in int8, by nncf.

nncf is needed here alone (`pip install 'unetpp[quantise]'`): what comes out is read by `unetpp.int8`.
"""

import contextlib
import io
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from numpy.typing import NDArray

from unetpp.augment import augment, random_view
from unetpp.config import AugmentConfig, ModelConfig
from unetpp.errors import ConfigError
from unetpp.torch_engine import scale
from unetpp.weights import convolutions

CROP_PX = 128
VARIED = AugmentConfig(
    scale=(0.7, 1.4), gamma=(0.7, 1.4), brightness=(0.6, 1.5), contrast=(0.8, 1.25), invert=0.2, drop_colour=0.15
)
"""How calibration crops differ from their images: ranges must hold for images that are not quite like them."""

LEVELS = 256
"""Of 8 bits."""

CONVOLUTIONS = ("Convolution", "ConvolutionBackpropData")


def quantise(network: ov.Model, crops: Sequence[NDArray[np.float32]], float_layers: Collection[str]) -> ov.Model:
    """The network in int8, its ranges measured on `crops` (x_BCHW as the network reads them).

    nncf's post-training quantisation: weights by channel, activations by tensor, both symmetric. `float_layers` are the
    names of convolutions that are left in float32. ConfigError where nncf is not installed, or the network has no such
    layer.
    """
    if unknown := sorted(set(float_layers) - set(convolution_names(network))):
        raise ConfigError(f"no convolution is called {unknown[0]}; there are {', '.join(convolution_names(network))}")
    nncf = _nncf()
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        quantised: ov.Model = nncf.quantize(
            network.clone(),
            nncf.Dataset(list(crops)),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(crops),
            ignored_scope=nncf.IgnoredScope(names=sorted(float_layers)),
            # A correction is a mean over crops of every kind: to a dark image it adds what is none of its own, and
            # background becomes foreground.
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    _read_unsigned(quantised)
    return quantised


def _read_unsigned(network: ov.Model) -> None:
    """Give transposed convolutions of ReLU's values these in unsigned 8 bits, by steps of the same size.

    nncf gives all inputs of a concatenation one range, and some have negative values: so all have the signed range,
    also for what else reads them, and OpenVINO computes transposed convolutions of signed values in float32.
    """
    for convolution in network.get_ordered_ops():
        if convolution.get_type_name() != "ConvolutionBackpropData":
            continue
        rounded = convolution.input_value(0).get_node()
        if rounded.get_type_name() != "FakeQuantize" or rounded.input_value(0).get_node().get_type_name() != "Relu":
            continue
        low, high = (float(rounded.input_value(n).get_node().get_data().item()) for n in (3, 4))
        if low < 0:
            least, most = np.float32(0), np.float32(high - low)
            unsigned = ops.fake_quantize(rounded.output(0), least, most, least, most, LEVELS)
            convolution.input(0).replace_source_output(unsigned.output(0))


def float_layers(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Choices of convolutions to leave in float32, the fastest first: later ones have more of those at full resolution.

    The first convolution always is: dark images use few of the steps that 8 bits have for all images, and there is
    nothing before it that could make more of them.
    """
    folded = config.model_copy(update={"norm": "none"})
    first = tuple(name for name, _ in convolutions(folded, 0, 0))
    last = tuple(name for level in config.head_levels for name, _ in convolutions(folded, 0, level))
    heads = tuple(f"heads.{level}" for level in config.head_levels)
    return first[:1], (*first, *heads), (*first, *last, *heads)


def convolution_names(network: ov.Model) -> tuple[str, ...]:
    """Names of the convolutions of a network, the transposed ones too, in the order in which they are computed."""
    return tuple(node.get_friendly_name() for node in network.get_ordered_ops() if node.get_type_name() in CONVOLUTIONS)


def calibration_crops(
    images: Sequence[NDArray[np.generic]], config: ModelConfig, number: int, *, crop_px: int = CROP_PX, seed: int = 0
) -> list[NDArray[np.float32]]:
    """`number` crops x_1CHW of images_HWC of file values, one of each in turn, varied as `VARIED` says."""
    rng = np.random.default_rng(seed)
    crops = []
    for count in range(number):
        image_HWC = images[count % len(images)]
        view = random_view(image_HWC.shape[:2], crop_px, VARIED, rng)
        x_1CHW = scale(torch.from_numpy(np.array(view.cut(image_HWC)))[None], config)
        window_HWC = x_1CHW[0].permute(1, 2, 0).numpy()
        nothing_HW = np.zeros(window_HWC.shape[:2], np.uint8)
        crop_HWC, _ = augment(window_HWC, nothing_HW, view, VARIED, rng)
        crops.append(np.ascontiguousarray(crop_HWC.transpose(2, 0, 1)[None]))
    return crops


def versions() -> dict[str, str]:
    """Of what quantises and of what computes."""
    return {"nncf": _nncf().__version__, "openvino": ov.__version__.split("-")[0]}


def _nncf() -> Any:
    try:
        with _set("NNCF_CI", "1"):  # it sends no telemetry then
            import nncf
    except ImportError:
        raise ConfigError(
            "nncf is not installed, which quantises; pip install 'unetpp[quantise]', or take engine openvino"
        ) from None
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its set_log_level sets the handlers of others as well
    return nncf


@contextlib.contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """An environment variable, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

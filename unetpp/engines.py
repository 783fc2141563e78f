"""Engines: tiles of file values in, masks and statistics out. Only masks leave the device."""

import copy
import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.model import Node, UNetPlusPlus

Mode = Literal["fast", "accurate"]

Pixels = NDArray[np.generic]
"""File values: uint8, uint16 or float32."""


@dataclass(frozen=True, slots=True)
class TileStats:
    """What a tile's logits say about its mask, over the core.

    finite: no NaN or infinity. margin: mean distance of the two best classes' probabilities, 0 (a coin) .. 1 (sure).
    probability_HW: of the foreground, 8 bits (`eight_bits`), of an engine that was asked for it.
    """

    finite: bool
    margin: float
    probability_HW: NDArray[np.uint8] | None = None


class Engine(Protocol):
    """Turns tiles of one shape into masks of their cores."""

    batch_tiles: int
    """Tiles a forward that are worth their memory; 1 on CPU, where a mask then never depends on its neighbours."""

    def __call__(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> tuple[NDArray[np.uint8], list[TileStats]]:
        """Class ids masks_BHW of the core, and one TileStats a tile; values are file values, not yet scaled."""


def value_range(config: ModelConfig, pixel_type: str) -> tuple[float, float]:
    """File values of a pixel type that become 0 and 1. ConfigError on other types than uint8, uint16 and float32."""
    if pixel_type not in ("uint8", "uint16", "float32"):
        raise ConfigError(f"pixels are {pixel_type}; wanted uint8, uint16 or float32: convert the image first")
    low, high = getattr(config.value_range, pixel_type)
    return low, high


def scale(images_BHWC: Tensor, config: ModelConfig) -> Tensor:
    """File values -> x_BCHW float32: the pixel type's `value_range` becomes 0..1, then `gamma` is applied.

    Values outside of the range stay outside, except that a gamma other than 1 lifts negative ones to 0.
    ConfigError on other pixel types.
    """
    low, high = value_range(config, str(images_BHWC.dtype).removeprefix("torch."))
    x_BHWC = (images_BHWC.float() - low) / (high - low)
    if config.gamma != 1.0:
        x_BHWC = x_BHWC.clamp(min=0.0).pow(config.gamma)
    # A permuted BHWC array is channels_last already, which is the layout the convolutions are fastest in.
    return x_BHWC.permute(0, 3, 1, 2)


MIRRORS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""Axes of BCHW that are turned over in each mirror image: none, left-right, up-down, both."""


def mirrored_heads(
    model: UNetPlusPlus, x_BCHW: Tensor, core: tuple[slice, slice], *, flips: bool
) -> Iterator[dict[int, Tensor]]:
    """Logits of every head over the core; with `flips`, of each of the four mirror images of x, turned back.

    A tile's outer box begins and ends on the stride grid, and so does its mirror image's in the mirrored whole, whose
    padding is then at its top or left: what tiles and wholes give agrees as it does without flips.
    """
    for axes in MIRRORS if flips else MIRRORS[:1]:
        heads = model.heads_of(x_BCHW.flip(axes) if axes else x_BCHW)
        yield {level: (head.flip(axes) if axes else head)[:, :, *core] for level, head in heads.items()}


def probabilities(logits: Mapping[int, Tensor], config: ModelConfig) -> dict[int, Tensor]:
    """Probabilities BKHW by level from each head's logits: sigmoid for one logit, softmax for several.

    Logits are divided by their head's temperature (Guo et al. 2017, arXiv 1706.04599, section 4.2), which changes how
    sure a head is and never the class that it prefers.
    """
    found = {}
    for level, logits_BKHW in logits.items():
        if (temperature := config.temperature.get(level, 1.0)) != 1.0:
            logits_BKHW = logits_BKHW / temperature
        found[level] = logits_BKHW.sigmoid() if config.num_classes == 1 else logits_BKHW.softmax(1)
    return found


def mean_of(probabilities_BKHW: Iterable[Tensor]) -> Tensor:
    """Mean over several probabilities of one shape."""
    return torch.stack(list(probabilities_BKHW)).mean(0)


def decide(probability_BKHW: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities -> (class ids uint8 BHW, margin BHW in 0..1). One class: foreground above 1/2."""
    if probability_BKHW.shape[1] == 1:
        probability_BHW = probability_BKHW[:, 0]
        return (probability_BHW > 0.5).to(torch.uint8), (2 * probability_BHW - 1).abs()
    best_B2HW = probability_BKHW.topk(2, dim=1).values
    # The indices of topk are arbitrary among equals; those of argmax are the first.
    return probability_BKHW.argmax(1).to(torch.uint8), best_B2HW[:, 0] - best_B2HW[:, 1]


def eight_bits(probability_BKHW: Tensor) -> Tensor:
    """Probability of the foreground, which is all but class 0, as uint8 BHW: 0 .. 255, rounded, halves down.

    So, with one class, foreground is exactly what is above 127.
    """
    one_class = probability_BKHW.shape[1] == 1
    foreground_BHW = probability_BKHW[:, 0] if one_class else 1.0 - probability_BKHW[:, 0]
    return (foreground_BHW * 255.0 - 0.5).ceil().clamp(0, 255).to(torch.uint8)


class TorchEngine:
    """Eager torch made right: conv-BN folded, channels_last, inference mode, float32.

    fast: the deepest head. accurate: the mean probability of all heads (section 3.2 of the paper; probabilities, since
    averaged logits give other masks); with `flips`, also over the tile's four mirror images, at four times the cost.
    """

    def __init__(
        self, model: UNetPlusPlus, mode: Mode, device: str = "cpu", *, flips: bool = False, probability: bool = False
    ) -> None:
        keep_freed_memory()
        self.probability = probability
        self.config = model.config
        self.mode = mode
        self.flips = flips
        self.device = torch.device(device)
        self.batch_tiles = 1 if self.device.type == "cpu" else 16
        self._model = fold_batch_norm(model).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> tuple[NDArray[np.uint8], list[TileStats]]:
        """See `Engine`."""
        tiles = torch.from_numpy(np.ascontiguousarray(tiles_BHWC)).to(self.device, non_blocking=True)
        seen, finite = [], []
        for logits in mirrored_heads(self._model, scale(tiles, self.config), core, flips=self.flips):
            heads = probabilities(logits, self.config)
            seen.append(heads[self.config.level] if self.mode == "fast" else mean_of(heads.values()))
            finite += [head.isfinite().flatten(1).all(1) for head in logits.values()]
        probability_BKHW = mean_of(seen)
        mask_BHW, margin_BHW = decide(probability_BKHW)
        finite_B = torch.stack(finite).all(0)
        margins = margin_BHW.flatten(1).mean(1).tolist()
        eight_BHW = eight_bits(probability_BKHW).cpu().numpy() if self.probability else [None] * len(margins)
        stats = [TileStats(*each) for each in zip(finite_B.tolist(), margins, eight_BHW, strict=True)]
        return mask_BHW.cpu().numpy(), stats


def fold_batch_norm(model: UNetPlusPlus) -> UNetPlusPlus:
    """A copy in eval mode with its BatchNorms folded into the convolutions before them; outputs agree to about 1e-7."""
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for name, node in folded.nodes.items():
        assert isinstance(node, Node)
        layers: list[nn.Module] = []
        for layer in node:
            if isinstance(layer, nn.BatchNorm2d):
                convolution = layers.pop()
                assert isinstance(convolution, nn.Conv2d)
                layers.append(fuse_conv_bn_eval(convolution, layer))
            else:
                layers.append(layer)
        folded.nodes[name] = nn.Sequential(*layers)
    return folded


def keep_freed_memory() -> None:
    """Let glibc keep freed activations instead of returning them to the kernel after every forward.

    Without it each forward faults its memory in again: 1.2 to 1.8 times the CPU time of eager torch. Takes full effect
    when called in a process's main thread before it starts others; does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    arena_max, mmap_max, trim_threshold, top_pad = -8, -4, -1, -2
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)

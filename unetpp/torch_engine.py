"""Engines of torch, and the arithmetic between file values, logits and masks that they share with training."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from unetpp.allocator import keep_freed_memory
from unetpp.checkpoint import arrays_of, model_of
from unetpp.config import ModelConfig
from unetpp.devices import is_out_of_memory
from unetpp.engines import MIRRORS, Engine, Masks, Mode, Pixels, TileStats, levels_read, value_range
from unetpp.model import UNetPlusPlus
from unetpp.weights import folded

GPU_BATCH_TILES = 16
EVERYWHERE = (slice(None), slice(None))

Result = TypeVar("Result")


def plain_float32() -> None:
    """From now on a GPU computes convolutions of float32 as such. By default torch rounds their inputs to 10 bits."""
    torch.backends.cudnn.allow_tf32 = False


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


class ReferenceEngine(Engine):
    """Eager torch in float32, the network as it was trained. What the other engines are measured against.

    fast: the deepest head. accurate: the mean probability of all heads (section 3.2 of the paper; probabilities, since
    averaged logits give other masks); with `flips`, also over the tile's four mirror images, at four times the cost.
    threads: of a forward on CPU; None: every core.
    """

    def __init__(
        self,
        model: UNetPlusPlus,
        mode: Mode,
        device: str = "cpu",
        *,
        threads: int | None = None,
        flips: bool = False,
        probability: bool = False,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.config = model.config
        self.mode = mode
        self.flips = flips
        self.probability = probability
        self.device = torch.device(device)
        self.batch_tiles = 1 if self.device.type == "cpu" else GPU_BATCH_TILES
        if self.device.type == "cuda":
            plain_float32()
        self.model = self._prepared(model)

    def _prepared(self, model: UNetPlusPlus) -> UNetPlusPlus:
        return copy.deepcopy(model).eval().requires_grad_(False).to(self.device)

    def __call__(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> Masks:
        """See `Engine`."""
        return self.start(tiles_BHWC, core)()

    def start(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> Callable[[], Masks]:
        """See `Engine`."""
        shape = tiles_BHWC.shape
        read = self._in_memory(lambda: self._started(tiles_BHWC, core), shape)
        return lambda: self._in_memory(read, shape)

    def _in_memory(self, work: Callable[[], Result], shape: tuple[int, ...]) -> Result:
        """The result of work on tiles. MemoryError, or DeviceError where the GPU is broken."""
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block nothing holds on to the failed forward's tensors.
        self._free()
        raise MemoryError(f"tiles of shape {shape} on {self.device}")

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _started(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> Callable[[], Masks]:
        tiles = self._uploaded(np.ascontiguousarray(tiles_BHWC))
        mask_BHW, margin_BHW, *eight_BHW = [each[:, *core] for each in self._decided(tiles)]
        wait = self._downloaded([mask_BHW, margin_BHW.flatten(1).mean(1), *eight_BHW], tiles)

        def read() -> Masks:
            masks_BHW, margins_B, *eights_BHW = [each.numpy() for each in wait()]
            margins = margins_B.tolist()
            eights = list(eights_BHW[0]) if self.probability else [None] * len(margins)
            stats = [TileStats(math.isfinite(each), each, eight) for each, eight in zip(margins, eights, strict=True)]
            return masks_BHW, stats

        return read

    def _downloaded(self, found: list[Tensor], tiles: Tensor) -> Callable[[], list[Tensor]]:
        """What waits for tensors that were made of tiles."""
        return lambda: [each.cpu() for each in found]

    def _uploaded(self, tiles_BHWC: Pixels) -> Tensor:
        return torch.from_numpy(tiles_BHWC).to(self.device)

    def _decided(self, tiles_BHWC: Tensor) -> list[Tensor]:
        """mask_BHW, margin_BHW, NaN where a head is not finite, and with `probability` 8 bits of the foreground."""
        seen, finite = [], []
        for heads in mirrored_heads(self.model, self._scaled(tiles_BHWC), EVERYWHERE, flips=self.flips):
            logits = {level: heads[level].float() for level in levels_read(self.config, self.mode)}
            seen.append(mean_of(probabilities(logits, self.config).values()))
            finite += [head.isfinite().all(1) for head in logits.values()]
        probability_BKHW = mean_of(seen)
        mask_BHW, margin_BHW = decide(probability_BKHW)
        margin_BHW = margin_BHW.where(torch.stack(finite).all(0), torch.nan)
        return [mask_BHW, margin_BHW, *([eight_bits(probability_BKHW)] if self.probability else [])]

    def _scaled(self, tiles_BHWC: Tensor) -> Tensor:
        return scale(tiles_BHWC, self.config).contiguous()


class TorchEngine(ReferenceEngine):
    """Eager torch made right: conv-BN folded, channels_last, freed memory kept; float32."""

    def _prepared(self, model: UNetPlusPlus) -> UNetPlusPlus:
        keep_freed_memory()
        plain = model_of(*folded(model.config, arrays_of(model))).requires_grad_(False)
        return plain.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _scaled(self, tiles_BHWC: Tensor) -> Tensor:
        return scale(tiles_BHWC, self.config)

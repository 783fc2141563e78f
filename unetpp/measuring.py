"""Every output of a network in one pass over an image: for measuring and calibrating, with torch."""

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unetpp import tiles
from unetpp.devices import has_gpu
from unetpp.engines import Pixels
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Image, prepare, tile_plan
from unetpp.torch_engine import decide, mean_of, mirrored_heads, plain_float32, probabilities, scale

Name = TypeVar("Name", str, int)


def where_fastest(model: UNetPlusPlus) -> UNetPlusPlus:
    """A copy of the model on the GPU where there is one, to be measured there in plain float32; else the model."""
    if not has_gpu():
        return model
    plain_float32()
    return copy.deepcopy(model).to("cuda")


def masks_by_level(
    model: UNetPlusPlus, image: Image, *, tile_px: int = 512, flips: bool = False
) -> dict[str, NDArray[np.uint8]]:
    """The masks of every head (`L1`..`L4`) and, with several heads, of accurate mode, in one pass over `image`.

    With `flips` also `accurate+flips`, in three passes more. For measuring: one forward serves all levels. The model is
    used as it is, on its own device.
    """

    def masks_of(x_1CHW: Tensor, core: tuple[slice, slice]) -> dict[str, Pixels]:
        means: list[Tensor] = []
        outputs: dict[str, Tensor] = {}
        for logits in mirrored_heads(model, x_1CHW, core, flips=flips):
            heads = probabilities(logits, model.config)
            means.append(mean_of(heads.values()))
            outputs = outputs or {f"L{level}": head for level, head in heads.items()}  # of the image as it is
        if len(outputs) > 1:
            outputs["accurate"] = means[0]
        if flips:
            outputs["accurate+flips"] = mean_of(means)
        return {name: decide(probability)[0][0].cpu().numpy() for name, probability in outputs.items()}

    stitched = _stitched(model, image, tile_px, masks_of)
    return {name: mask_HW.astype(np.uint8, copy=False) for name, mask_HW in stitched.items()}


def logits_by_level(model: UNetPlusPlus, image: Image, *, tile_px: int = 512) -> dict[int, NDArray[np.float32]]:
    """logits_HWK of every head, not divided by any temperature. The model is used as it is, on its own device."""

    def logits_of(x_1CHW: Tensor, core: tuple[slice, slice]) -> dict[int, Pixels]:
        (logits,) = mirrored_heads(model, x_1CHW, core, flips=False)
        return {level: head[0].permute(1, 2, 0).cpu().numpy() for level, head in logits.items()}

    stitched = _stitched(model, image, tile_px, logits_of)
    return {level: logits_HWK.astype(np.float32, copy=False) for level, logits_HWK in stitched.items()}


@torch.inference_mode()
def _stitched(
    model: UNetPlusPlus,
    image: Image,
    tile_px: int,
    outputs_of: Callable[[Tensor, tuple[slice, slice]], dict[Name, Pixels]],
) -> dict[Name, Pixels]:
    """What a function makes of a tile's x_1CHW and core, stitched to the image's size, output by output."""
    device = next(model.parameters()).device
    padded_HWC = prepare(image, model.config)
    plan = tile_plan(image.shape[:2], model.config, tile_px)
    cores: dict[Name, list[Pixels]] = {}
    for tile in plan.tiles:
        tile_1HWC = torch.from_numpy(np.array(tiles.cut(padded_HWC, tile))[None]).to(device)
        for name, core in outputs_of(scale(tile_1HWC, model.config), tile.core_slices).items():
            cores.setdefault(name, []).append(core)
    return {name: tiles.stitch(plan, output_cores) for name, output_cores in cores.items()}

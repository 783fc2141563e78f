"""The torch engine compiled: bfloat16, on a GPU with CUDA graphs and pinned copies; on CPU it needs a C++ compiler."""

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import config as inductor
from torch._inductor.exc import InductorError

from unetpp.engines import Pixels, TileStats
from unetpp.model import UNetPlusPlus
from unetpp.torch_engine import TorchEngine, scale

logger = logging.getLogger(__name__)


class CompiledEngine(TorchEngine):
    """As `TorchEngine`, in bfloat16, by torch.compile: file values go into what is compiled, and masks come out.

    Tiles of the shape that comes first have a form of their own, on a GPU a CUDA graph; other shapes share one. Where
    nothing can be compiled the same is computed without: slower, in the same precision, and the log says so.
    """

    def _prepared(self, model: UNetPlusPlus) -> UNetPlusPlus:
        inductor.triton.cudagraph_skip_dynamic_graphs = True
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self._compiled = torch.compile(super()._decided, mode=mode)
        self._can_compile = True
        return super()._prepared(model).to(torch.bfloat16)

    def _masks(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> tuple[NDArray[np.uint8], list[TileStats]]:
        """Fills the batch up to a power of two: every other number of tiles would be a shape to compile."""
        num_tiles = len(tiles_BHWC)
        missing = (1 << (num_tiles - 1).bit_length()) - num_tiles
        masks_BHW, stats = super()._masks(np.concatenate([tiles_BHWC, *[tiles_BHWC[-1:]] * missing]), core)
        return masks_BHW[:num_tiles], stats[:num_tiles]

    def _uploaded(self, tiles_BHWC: Pixels) -> Tensor:
        tiles = torch.from_numpy(tiles_BHWC)
        return tiles.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tiles

    def _decided(self, tiles_BHWC: Tensor) -> list[Tensor]:
        if self._can_compile:
            try:
                return self._compiled(tiles_BHWC)
            except (TorchDynamoException, InductorError) as error:
                logger.warning("engine compiled goes on without torch.compile: %s", str(error).strip().splitlines()[0])
                self._can_compile = False
        return super()._decided(tiles_BHWC)

    def _scaled(self, tiles_BHWC: Tensor) -> Tensor:
        return scale(tiles_BHWC, self.config).to(torch.bfloat16)

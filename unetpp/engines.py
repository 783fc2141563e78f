"""Engines: tiles of file values in, masks and statistics out. Only masks leave the device. Imports no torch.

`unetpp.engine_names` says which there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from unetpp.config import Level, ModelConfig
from unetpp.errors import ConfigError

Mode = Literal["fast", "accurate"]

Pixels = NDArray[np.generic]
"""File values: uint8, uint16 or float32."""

MIRRORS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""Axes of BCHW that are turned over in each mirror image: none, left-right, up-down, both."""


@dataclass(frozen=True, slots=True)
class TileStats:
    """What a tile's logits say about its mask, over the core.

    finite: no NaN or infinity. margin: mean distance of the two best classes' probabilities, 0 (a coin) .. 1 (sure).
    probability_HW: of the foreground, 8 bits, of an engine that was asked for it.
    """

    finite: bool
    margin: float
    probability_HW: NDArray[np.uint8] | None = None


Masks = tuple[NDArray[np.uint8], list[TileStats]]
"""Class ids masks_BHW of the core, and one TileStats a tile."""


class Engine(Protocol):
    """Turns tiles of one shape into masks of their cores."""

    batch_tiles: int
    """Tiles a forward that are worth their memory; 1 on CPU, where a mask then never depends on its neighbours."""

    def __call__(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> Masks:
        """Masks of tiles of file values, not yet scaled.

        ConfigError on pixels that are not uint8, uint16 or float32; MemoryError where memory runs out.
        """

    def start(self, tiles_BHWC: Pixels, core: tuple[slice, slice]) -> Callable[[], Masks]:
        """Begin a call; what comes back waits for its masks. Errors as of a call, from either. On CPU all is done."""
        masks = self(tiles_BHWC, core)
        return lambda: masks


def levels_read(config: ModelConfig, mode: Mode) -> tuple[Level, ...]:
    """Levels of the heads that a mode makes masks of: the deepest in fast mode, all of them in accurate mode."""
    return config.head_levels if mode == "accurate" else (config.level,)


def value_range(config: ModelConfig, pixel_type: str) -> tuple[float, float]:
    """File values of a pixel type that become 0 and 1. ConfigError on other types than uint8, uint16 and float32."""
    if pixel_type not in ("uint8", "uint16", "float32"):
        raise ConfigError(f"pixels are {pixel_type}; wanted uint8, uint16 or float32: convert the image first")
    low, high = getattr(config.value_range, pixel_type)
    return low, high

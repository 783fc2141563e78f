"""Cutting images into tiles whose seams cannot be seen: pure geometry on numpy arrays.

A pixel of the output depends on input pixels at most `ModelConfig.reach_px` away, and the sampling grid of the network
repeats every `ModelConfig.stride` pixels. So a tile that reaches `halo_px` beyond its core, starts on the stride grid
and is clipped only where the padded image truly ends gives exactly the output of the whole image inside its core.

```
image  --pad once-->  padded image  --cut-->  outer boxes  --network-->  cores  --stitch-->  mask of the image's size
```
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from unetpp.errors import ConfigError

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of pixels: rows y0 <= y < y1, columns x0 <= x < x1."""

    y0: int
    x0: int
    y1: int
    x1: int

    @property
    def height(self) -> int:
        """Rows in the box."""
        return self.y1 - self.y0

    @property
    def width(self) -> int:
        """Columns in the box."""
        return self.x1 - self.x0

    @property
    def num_px(self) -> int:
        """Pixels in the box."""
        return self.height * self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """The box as an index into an array that starts with H, W."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)


@dataclass(frozen=True, slots=True)
class Tile:
    """What is fed to the network (`outer`, in the padded image) and what is kept of its output (`core`)."""

    outer: Box
    core: Box

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what is fed; tiles of one shape can share a batch."""
        return self.outer.height, self.outer.width

    @property
    def core_slices(self) -> tuple[slice, slice]:
        """The core as an index into an array of the outer box: `core_HW = output_HW[tile.core_slices]`."""
        top, left = self.core.y0 - self.outer.y0, self.core.x0 - self.outer.x0
        return slice(top, top + self.core.height), slice(left, left + self.core.width)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """The tiles of one image, row by row. Their cores partition `kept`: the image without its padding, or a part."""

    kept: Box
    padded_height: int
    padded_width: int
    tiles: tuple[Tile, ...]

    @property
    def computed_px(self) -> int:
        """Pixels that the network is fed, halos and padding included."""
        return sum(tile.outer.num_px for tile in self.tiles)

    @property
    def computed_to_kept(self) -> float:
        """Pixels fed for every pixel that is kept: 1.0 is a single tile without padding."""
        return self.computed_px / self.kept.num_px


def check_tile_px(tile_px: int, pad_multiple: int) -> None:
    """ConfigError when `tile_px` is not a positive multiple of `pad_multiple`."""
    if tile_px <= 0 or tile_px % pad_multiple:
        raise ConfigError(
            f"tile_px is {tile_px}, but this model pads images to multiples of {pad_multiple}; "
            f"take a tile_px that is a multiple of {pad_multiple}"
        )


def plan_tiles(
    height: int, width: int, *, tile_px: int, stride: int, halo_px: int, pad_multiple: int, kept: Box | None = None
) -> TilePlan:
    """Tiles for an image of `height` x `width` pixels, each at least 1.

    Cores are `tile_px` squares on a grid; the last one of a row or column is what remains. A remainder of at most
    `halo_px` joins the core before it: its outer box is still no larger than that of a tile in the middle of an image
    (tile_px + 2 * halo_px), and a sliver that is nearly all halo is never computed. An image with both sides up to
    tile_px is therefore always one tile without halo.

    With `kept`, for that part of the image alone: what is fed reaches `halo_px` beyond it, as far as there is image.
    Its corner lies on the stride grid. So a region of a larger image, read with that margin from an origin on the
    `pad_multiple` grid, gives the larger image's output.

    Raises ConfigError where `check_tile_px` does.
    """
    check_tile_px(tile_px, pad_multiple)
    assert min(height, width) >= 1, (height, width)
    assert pad_multiple % stride == 0, (pad_multiple, stride)
    assert halo_px % stride == 0, (halo_px, stride)
    padded_height, padded_width = _round_up(height, pad_multiple), _round_up(width, pad_multiple)
    kept = kept or Box(0, 0, height, width)
    assert 0 <= kept.y0 < kept.y1 <= height, (kept, height)
    assert 0 <= kept.x0 < kept.x1 <= width, (kept, width)
    assert kept.y0 % stride == kept.x0 % stride == 0, (kept, stride)
    rows = _spans(kept.y0, kept.y1, height, padded_height, tile_px, halo_px, stride)
    columns = _spans(kept.x0, kept.x1, width, padded_width, tile_px, halo_px, stride)
    tiles = tuple(
        Tile(outer=Box(oy0, ox0, oy1, ox1), core=Box(cy0, cx0, cy1, cx1))
        for (oy0, cy0, cy1, oy1) in rows
        for (ox0, cx0, cx1, ox1) in columns
    )
    return TilePlan(kept, padded_height, padded_width, tiles)


def pad(image_HWC: Array, pad_multiple: int) -> Array:
    """The image with its last row and column repeated until both sides are multiples of `pad_multiple`.

    Takes HW or HWC of any type; returns the same array when nothing is missing.
    """
    height, width = image_HWC.shape[:2]
    bottom, right = _round_up(height, pad_multiple) - height, _round_up(width, pad_multiple) - width
    if not bottom and not right:
        return image_HWC
    return np.pad(image_HWC, [(0, bottom), (0, right)] + [(0, 0)] * (image_HWC.ndim - 2), mode="edge")


def cut(padded_HWC: Array, tile: Tile) -> Array:
    """A view of the tile's outer box in the padded image (HW or HWC)."""
    return padded_HWC[tile.outer.slices]


def stitch(plan: TilePlan, cores_HW: Iterable[Array]) -> Array:
    """One array of the size of what is kept from the cores of the plan's tiles, in their order.

    Cores are HW (masks) or HWK (logits) of one type, and may come from a generator: only one is needed at a time.
    """
    whole: Array | None = None
    kept = plan.kept
    for tile, core in zip(plan.tiles, cores_HW, strict=True):
        box = tile.core
        assert core.shape[:2] == (box.height, box.width), f"core is {core.shape[:2]}, its tile wants {box}"
        if whole is None:
            whole = np.empty((kept.height, kept.width, *core.shape[2:]), core.dtype)
        whole[Box(box.y0 - kept.y0, box.x0 - kept.x0, box.y1 - kept.y0, box.x1 - kept.x0).slices] = core
    assert whole is not None, "a plan has at least one tile"
    return whole


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _spans(
    first: int, last: int, length: int, padded: int, tile_px: int, halo_px: int, stride: int
) -> list[tuple[int, int, int, int]]:
    """(outer start, core start, core end, outer end) of the tiles along an axis, of which `first` to `last` is kept."""
    outer_last = padded if last == length else min(padded, _round_up(last, stride) + halo_px)
    num_cores = max(1, -(-(min(outer_last - halo_px, last) - first) // tile_px))
    starts = [first + index * tile_px for index in range(num_cores)]
    outer_ends = [min(padded, start + halo_px) for start in starts[1:]]
    return [
        (max(0, start - halo_px), start, end, outer_end)
        for start, end, outer_end in zip(starts, [*starts[1:], last], [*outer_ends, outer_last], strict=True)
    ]

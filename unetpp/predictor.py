"""Images in, masks out: cut, batch, engine, stitch. The only home of the modes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray

from unetpp import packaged, tiles, weights
from unetpp.card import read_pretrained
from unetpp.config import Bands, Level, ModelConfig
from unetpp.devices import cpu_flags, has_gpu
from unetpp.engine_names import ON_CPU_ONLY, PRECISION, EngineChoice, EngineName, Precision, auto_engines
from unetpp.engines import Engine, Masks, Mode, Pixels, TileStats, levels_read, value_range
from unetpp.errors import ConfigError, ImageError
from unetpp.images import to_channels
from unetpp.tiles import Box
from unetpp.weights import Weights

MIN_TILE_PX = 64
"""Smaller tiles would be nearly all halo. A multiple of every pad_multiple."""

Image = Pixels
"""HW or HWC: uint8, uint16 or float32."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The mask of one image.

    mask_HW: class ids, uint8, the image's own size, or that of the part that was predicted. uncertainty: 0 (sure of
    every pixel) .. 1 (a coin for each). finite: False when the network gave NaN or infinity: the mask is then
    worthless. degraded: what was reduced to fit into memory, None for nothing. probability_HW: of the foreground (all
    but class 0), 0 .. 255, of the mask's size, if it was asked for.
    """

    mask_HW: NDArray[np.uint8]
    uncertainty: float
    finite: bool
    degraded: str | None = None
    probability_HW: NDArray[np.uint8] | None = None


class Predictor:
    """Segments images of any size: uint8, uint16 or float32, HW or HWC, sizes mixed."""

    def __init__(self, engine: Engine, config: ModelConfig, *, digest: str, tile_px: int = 512) -> None:
        tiles.check_tile_px(tile_px, config.pad_multiple)
        self.engine = engine
        self.config = config
        self.digest = digest
        self.tile_px = tile_px
        self.on_forward: Callable[[], None] = lambda: None
        """Called after every forward, on a GPU as it begins: a large image takes long, and this tells that it moves."""

    @classmethod
    def from_pretrained(
        cls,
        model_dir: Path | str,
        mode: Mode = "fast",
        level: Level | None = None,
        engine: EngineChoice = "auto",
        tile_px: int = 512,
        device: str | None = None,
        *,
        threads: int | None = None,
        flips: bool = False,
        bands: Bands | None = None,
        probability: bool = False,
    ) -> Self:
        """Load a model folder, or a packaged model by its name, pruned to `level` (default: its deepest).

        With `flips`, accurate mode also averages over the mirror images of what it sees. `bands` are other channels of
        the files than the model names: they do not change what is done with an image, but whose masks these are. With
        `probability`, predictions have `probability_HW`. `engine`: see `unetpp.engine_names`. `device`: a name of
        torch; None: the GPU where there is one and the engine can use it. `threads` compute on CPU; None: every core.

        ModelError for a folder that is no model, or has no int8 form where that is asked for; ConfigError for a level
        without a head, accurate mode with one head, flips in fast mode, as many bands as the network cannot read, an
        engine of CPUs on another device, a tile_px that does not fit, a device that is not there, and names and numbers
        that mean nothing.
        """
        _refuse_unknown(engine, ("auto", *PRECISION), "engine")
        _refuse_unknown(mode, get_args(Mode), "mode")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; wanted 1 or more, or None for every core")
        if engine in ON_CPU_ONLY and device not in (None, "cpu"):
            raise ConfigError(f"engine {engine} computes on CPU, the device is {device}; take engine torch")
        if device is not None and device.startswith("cuda") and not has_gpu():
            raise ConfigError(f"the device is {device}, and torch finds no GPU here; take cpu")
        on_gpu = engine not in ON_CPU_ONLY and (has_gpu() if device is None else device != "cpu")
        name = auto_engines(on_gpu=on_gpu, cpu_flags=cpu_flags())[0] if engine == "auto" else engine
        what = _read(model_dir, PRECISION[name], mode, level, flips, bands)
        loaded = load_engine(
            name,
            what.config,
            what.arrays,
            mode,
            device or ("cuda" if on_gpu else "cpu"),
            threads=threads,
            flips=flips,
            probability=probability,
            network=what.network,
        )
        return cls(loaded, what.config, digest=what.digest, tile_px=tile_px)

    @property
    def level(self) -> Level:
        """The level whose nodes are computed."""
        return self.config.level

    @property
    def num_classes(self) -> int:
        """1 for binary masks, else the number of classes, background included."""
        return self.config.num_classes

    @property
    def in_channels(self) -> int:
        """Channels that the network reads; images are adapted to it."""
        return self.config.in_channels

    @property
    def batch_images(self) -> int:
        """Images that are worth handing over at a time."""
        return self.engine.batch_tiles

    def __call__(self, images: Sequence[Image]) -> list[NDArray[np.uint8]]:
        """Masks of class ids, uint8 HW, each of its image's size."""
        return [prediction.mask_HW for prediction in self.predict(images)]

    def predict(self, images: Sequence[Image], kept: Sequence[Box | None] | None = None) -> list[Prediction]:
        """Masks with their uncertainty. Tiles of one shape share forwards where the engine gains from it.

        `kept` names the part of each image that is predicted, None: all. The rest is its surroundings: for a region of
        a larger image whose mask is to be the larger image's, `ModelConfig.halo_px` on every side that is no border,
        and a corner on the larger image's `pad_multiple` grid (see `tiles.plan_tiles`).

        Where memory runs out, smaller batches are tried, then smaller tiles: that is in `degraded`, and the masks are
        the same ones. ImageError `crash` where nothing helps.
        """
        batch_tiles, tile_px, degraded = self.engine.batch_tiles, self.tile_px, None
        while True:
            try:
                return self._started(images, kept, batch_tiles, tile_px, degraded)()
            except MemoryError:
                pass
            if batch_tiles > 1:
                batch_tiles //= 2
                degraded = f"batch {batch_tiles}"
            elif tile_px > MIN_TILE_PX:
                tile_px = max(MIN_TILE_PX, tile_px // 2 // MIN_TILE_PX * MIN_TILE_PX)
                degraded = f"tile {tile_px} px"
            else:  # `crash` is tried again later, maybe where there is more memory; `too_large` would not be
                raise ImageError("crash", f"out of memory, even for tiles of {tile_px} px")

    def start(
        self, images: Sequence[Image], kept: Sequence[Box | None] | None = None
    ) -> Callable[[], list[Prediction]]:
        """Begin to predict; what comes back waits for what `predict` returns, and raises what it raises.

        A GPU computes meanwhile; on CPU all is done. What fails at first is predicted when it is waited for.
        """
        try:
            read = self._started(images, kept, self.engine.batch_tiles, self.tile_px, None)
        except Exception:
            return lambda: self.predict(images, kept)

        def wait() -> list[Prediction]:
            try:
                return read()
            except MemoryError:
                pass
            return self.predict(images, kept)

        return wait

    def _started(
        self,
        images: Sequence[Image],
        kept: Sequence[Box | None] | None,
        batch_tiles: int,
        tile_px: int,
        degraded: str | None,
    ) -> Callable[[], list[Prediction]]:
        """Each batch is begun before the one before it is read; what comes back reads the last."""
        padded = [prepare(image, self.config) for image in images]
        plans = [
            tile_plan(image.shape[:2], self.config, tile_px, part)
            for image, part in zip(images, kept or [None] * len(images), strict=True)
        ]
        cores: list[list[NDArray[np.uint8] | None]] = [[None] * len(plan.tiles) for plan in plans]
        stats: list[dict[int, tuple[TileStats, int]]] = [{} for _ in plans]

        def read(members: list[tuple[int, int]], wait: Callable[[], Masks]) -> None:
            masks_BHW, tile_stats = wait()
            for (n, t), mask_HW, tile_stat in zip(members, masks_BHW, tile_stats, strict=True):
                cores[n][t] = mask_HW
                stats[n][t] = tile_stat, mask_HW.size

        in_flight: Callable[[], None] | None = None
        for members in _batches(padded, plans, batch_tiles):
            each_HWC = [tiles.cut(padded[n], plans[n].tiles[t]) for n, t in members]
            tiles_BHWC = np.stack(each_HWC) if len(each_HWC) > 1 else each_HWC[0][None]
            first = plans[members[0][0]].tiles[members[0][1]]
            begun = partial(read, members, self.engine.start(tiles_BHWC, first.core_slices))
            self.on_forward()
            if in_flight:
                in_flight()
            in_flight = begun

        def finish() -> list[Prediction]:
            if in_flight:
                in_flight()
            return [
                _prediction(plan, image_cores, [image_stats[t] for t in range(len(image_stats))], degraded)
                for plan, image_cores, image_stats in zip(plans, cores, stats, strict=True)
            ]

        return finish


def _batches(
    padded: Sequence[Image], plans: Sequence[tiles.TilePlan], batch_tiles: int
) -> Iterator[list[tuple[int, int]]]:
    """(image, tile) numbers, at most `batch_tiles` of one shape, core and pixel type at a time."""
    alike: dict[object, list[tuple[int, int]]] = {}
    for n, plan in enumerate(plans):
        for t, tile in enumerate(plan.tiles):
            rows, columns = tile.core_slices
            kind = (tile.shape, rows.start, columns.start, tile.core.height, tile.core.width, padded[n].dtype)
            members = alike.setdefault(kind, [])
            members.append((n, t))
            if len(members) == batch_tiles:
                yield alike.pop(kind)
    yield from alike.values()


def _prediction(
    plan: tiles.TilePlan,
    cores: list[NDArray[np.uint8] | None],
    stats: list[tuple[TileStats, int]],
    degraded: str | None,
) -> Prediction:
    mask_HW = tiles.stitch(plan, (core for core in cores if core is not None))
    margin = sum(stat.margin * num_px for stat, num_px in stats) / sum(num_px for _, num_px in stats)
    probabilities = [stat.probability_HW for stat, _ in stats if stat.probability_HW is not None]
    return Prediction(
        mask_HW.astype(np.uint8, copy=False),
        1.0 - margin,
        all(stat.finite for stat, _ in stats),
        degraded,
        tiles.stitch(plan, probabilities).astype(np.uint8, copy=False) if probabilities else None,
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """What a predictor computes: the network that it takes of a model folder, and whose masks that makes."""

    config: ModelConfig
    arrays: Weights
    network: Any
    digest: str


def _read(
    model_dir: Path | str, precision: Precision, mode: Mode, level: Level | None, flips: bool, bands: Bands | None
) -> _Read:
    if flips and mode != "accurate":
        raise ConfigError(f"flips average over mirror images in accurate mode, the mode is {mode}; take accurate")
    folder = packaged.resolve(model_dir)
    pretrained = read_pretrained(folder)
    full = pretrained.model
    stored = weights.read_weights(folder, full)
    config = _pruned(full if bands is None else _with_bands(full, bands), mode, level)
    arrays = weights.picked(stored, config)
    decision = {"mode": mode, "precision": precision, **({"flips": "mean"} if flips else {})}
    network = None
    if precision == "int8":
        from unetpp.int8 import read_int8

        network, decision["int8"] = read_int8(
            folder, pretrained, weights.digest(full, stored), levels_read(config, mode)
        )
    return _Read(config, arrays, network, weights.digest(config, arrays, **decision))


def mask_digest(
    model_dir: Path | str,
    precision: Precision,
    mode: Mode = "fast",
    level: Level | None = None,
    *,
    flips: bool = False,
    bands: Bands | None = None,
) -> str:
    """The digest of a predictor whose engine is of `precision`, on any machine: it need not be able to compute in it.

    Arguments and errors as of `Predictor.from_pretrained`.
    """
    return _read(model_dir, precision, mode, level, flips, bands).digest


def load_engine(
    name: EngineName,
    config: ModelConfig,
    arrays: Weights,
    mode: Mode,
    device: str = "cpu",
    *,
    threads: int | None = None,
    flips: bool = False,
    probability: bool = False,
    network: Any = None,
) -> Engine:
    """An engine by its name, of a network of these weights. Loads no other library than the engine's.

    `network` is an OpenVINO engine's, where it is not to be made from the weights: a quantised one.
    """
    how: Any = {"threads": threads, "flips": flips, "probability": probability}
    if name in ON_CPU_ONLY:
        from unetpp.openvino_engine import OpenVINOEngine
        from unetpp.openvino_graph import network as network_of

        how["bf16"] = name == "openvino-bf16"
        return OpenVINOEngine(network or network_of(config, arrays), config, mode, **how)
    from unetpp.checkpoint import model_of

    model = model_of(config, arrays)
    if name == "compiled":
        from unetpp.compiled_engine import CompiledEngine

        return CompiledEngine(model, mode, device, **how)
    from unetpp.torch_engine import ReferenceEngine, TorchEngine

    return (TorchEngine if name == "torch" else ReferenceEngine)(model, mode, device, **how)


def _refuse_unknown(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise ConfigError(f"there is no {what} {name}; wanted one of {', '.join(known)}")


def _pruned(config: ModelConfig, mode: Mode, level: Level | None) -> ModelConfig:
    """The config of what a mode computes of a network. ConfigError where it has not the heads for it."""
    if mode == "fast":
        return weights.pruned(config, config.level if level is None else level)
    config = config if level is None else weights.pruned(config, level, keep_heads=True)
    refuse_single_head(config)
    return config


def _with_bands(config: ModelConfig, bands: Bands) -> ModelConfig:
    if not config.can_read(bands):
        raise ConfigError(
            f"bands {', '.join(map(str, bands))} are {len(bands)} channels, the model reads {config.in_channels}; "
            f"name {config.in_channels}"
        )
    return config.model_copy(update={"bands": bands})


def refuse_single_head(config: ModelConfig) -> None:
    """ConfigError where accurate mode has not the heads of every level to average."""
    if config.head_levels != tuple(range(1, config.level + 1)):
        raise ConfigError(
            f"accurate mode averages the heads of every level, this model has {list(config.head_levels)} only; "
            "take the unpruned model, or mode fast"
        )


def prepare(image: Image, config: ModelConfig) -> Image:
    """HW or HWC -> HWC with the model's channels, padded. ConfigError for what is no image."""
    value_range(config, str(image.dtype))
    if image.ndim not in (2, 3) or not image.size:
        raise ConfigError(f"an image has shape {image.shape}; wanted H, W or H, W, C, with pixels")
    image_HWC = image[..., None] if image.ndim == 2 else image
    return tiles.pad(to_channels(image_HWC, config.in_channels), config.pad_multiple)


def tile_plan(size: tuple[int, int], config: ModelConfig, tile_px: int, kept: Box | None = None) -> tiles.TilePlan:
    """The tiles of an image (height, width), or of the part `kept` of it, for a network: see `tiles.plan_tiles`."""
    height, width = size
    return tiles.plan_tiles(
        height,
        width,
        tile_px=tile_px,
        stride=config.stride,
        halo_px=config.halo_px,
        pad_multiple=config.pad_multiple,
        kept=kept,
    )

"""Images in, masks out: tiling cannot be seen, neighbours do not matter, modes do what they say."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unetpp.calibrate import with_temperature
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig, ValueRange
from unetpp.engine_names import EngineName
from unetpp.engines import Engine
from unetpp.errors import ConfigError, ImageError
from unetpp.measuring import logits_by_level, masks_by_level
from unetpp.model import UNetPlusPlus
from unetpp.predictor import Predictor
from unetpp.prune import prune
from unetpp.tiles import Box, cut, pad, plan_tiles, stitch
from unetpp.torch_engine import scale

NARROW = (4, 6, 8, 10, 12)
LEVELS = (1, 2, 3, 4)


def random_model(**fields: object) -> UNetPlusPlus:
    """A model whose BatchNorms have seen data, and whose masks are neither empty nor full."""
    torch.manual_seed(0)
    model = UNetPlusPlus(ModelConfig.model_validate({"filters": NARROW, **fields}))
    model.train()
    with torch.no_grad():
        for _ in range(5):
            heads = model(torch.rand(4, model.config.in_channels, 64, 64))
        for level, head in heads.items():
            model.heads[str(level)].bias -= head.median()
    return model.eval()


def random_image(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def tiled_logits(model: UNetPlusPlus, image_HWC: NDArray[np.uint8], tile_px: int) -> NDArray[np.floating]:
    config = model.config
    padded = pad(image_HWC, config.pad_multiple)
    plan = plan_tiles(
        *image_HWC.shape[:2],
        tile_px=tile_px,
        stride=config.stride,
        halo_px=config.halo_px,
        pad_multiple=config.pad_multiple,
    )

    def core(tile) -> NDArray[np.floating]:  # type: ignore[no-untyped-def]
        x_BCHW = scale(torch.from_numpy(np.array(cut(padded, tile)[None])), config)
        logits = model.heads_of(x_BCHW.to(next(model.parameters()).dtype))[config.level]
        return logits[0].permute(1, 2, 0).numpy()[tile.core_slices]

    return stitch(plan, (core(tile) for tile in plan.tiles))


def exact_model(level: int, upsample: str, *, deep_supervision: bool = False) -> UNetPlusPlus:
    """A model whose arithmetic has no rounding, so that the order of its sums, which kernels choose by shape, is moot.

    Weights are a few of -1, 0, 1, inputs multiples of 1/256, bilinear factors multiples of 1/16.
    """
    torch.manual_seed(level)
    config = {"filters": NARROW, "level": level, "upsample": upsample, "norm": "none"}
    config["deep_supervision"] = deep_supervision
    model = UNetPlusPlus(ModelConfig.model_validate({**config, "value_range": {"uint8": (0, 256)}})).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            # A transposed convolution's output sees each input channel once, a convolution's its whole kernel.
            fan_in = layer.weight[0].numel() if isinstance(layer, torch.nn.Conv2d) else layer.in_channels
            keep = torch.rand_like(layer.weight) < 4 / fan_in
            layer.weight.data = keep * torch.randint_like(layer.weight, 2).mul(2).sub(1)
            torch.nn.init.ones_(layer.bias)
    return model


TILINGS = [((301, 275), 64), ((301, 275), 128), ((64, 401), 96), ((513, 130), 256)]
"""Image size, tile_px: odd sizes, remainders that join their neighbour, sides below one tile."""


@pytest.mark.parametrize(("level", "upsample"), list(itertools.product(LEVELS, ("deconv", "nearest", "bilinear"))))
@pytest.mark.parametrize(("size", "tile_px"), TILINGS)
@torch.no_grad()
def test_tiling_is_invisible(level: int, upsample: str, size: tuple[int, int], tile_px: int) -> None:
    image = random_image(*size)
    exact = exact_model(level, upsample).double()
    whole = tiled_logits(exact, image, 1024)
    assert whole.std() > 0
    assert np.abs(whole).max() < 2**30
    assert np.array_equal(tiled_logits(exact, image, tile_px), whole)

    model = random_model(level=level, upsample=upsample, deep_supervision=False)
    whole = tiled_logits(model, image, 1024)
    tiled = tiled_logits(model, image, tile_px)
    assert tiled.shape == (*size, 1)
    assert np.abs(tiled - whole).max() < 1e-5
    sure = np.abs(whole) > 1e-5
    assert np.array_equal((tiled > 0)[sure], (whole > 0)[sure])


@pytest.mark.parametrize("level", LEVELS)
def test_masks_do_not_depend_on_the_tile_size(tmp_path: Path, level: int) -> None:
    save_pretrained(exact_model(level, "deconv"), tmp_path)
    images = [random_image(333, 210), random_image(40, 500, seed=1)]
    whole = Predictor.from_pretrained(tmp_path, tile_px=1024)(images)
    tiled = Predictor.from_pretrained(tmp_path, tile_px=64)(images)
    assert 0 < whole[0].mean() < 1
    assert all(np.array_equal(a, b) for a, b in zip(whole, tiled, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (16, 16), (17, 31), (700, 3)])
def test_masks_have_the_size_of_their_image(tmp_path: Path, size: tuple[int, int]) -> None:
    save_pretrained(random_model(), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path, tile_px=128)
    mask = predictor([random_image(*size)])[0]
    assert mask.shape == size
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}


def test_a_mask_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path, tile_px=64)
    images = [random_image(100, 80, seed=n) for n in range(3)] + [random_image(64, 64), random_image(30, 200)]
    together = predictor(images)
    alone = [predictor([image])[0] for image in images]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_grey_and_colour_and_two_dimensional_images_are_adapted(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path)
    grey = random_image(50, 60, 1)
    masks = predictor([grey, grey[..., 0], np.repeat(grey, 3, axis=2)])
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


def test_sixteen_bits_are_scaled_by_their_stated_range(tmp_path: Path) -> None:
    model = random_model(value_range=ValueRange(uint16=(0, 4095)).model_dump())
    save_pretrained(model, tmp_path)
    predictor = Predictor.from_pretrained(tmp_path)
    eight = random_image(64, 64)
    twelve = np.round(eight.astype(np.float64) * 4095 / 255).astype(np.uint16)
    unit = eight.astype(np.float32) / 255
    first, second, third = predictor.predict([eight, twelve, unit])
    assert np.mean(first.mask_HW != second.mask_HW) < 0.01
    assert np.mean(first.mask_HW != third.mask_HW) < 0.001
    shifted = predictor([(twelve * 16).astype(np.uint16)])[0]
    assert np.mean(first.mask_HW != shifted) > 0.05


def test_an_unstated_pixel_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="pixels are int16; wanted uint8, uint16 or float32"):
        scale(torch.zeros(1, 2, 2, 3, dtype=torch.int16), ModelConfig())


def test_fast_mode_is_one_head_and_accurate_mode_the_mean_probability(tmp_path: Path) -> None:
    model = random_model()
    save_pretrained(model, tmp_path)
    image = random_image(64, 48)
    with torch.no_grad():
        heads = model(scale(torch.from_numpy(image[None]), model.config))
    for level in LEVELS:
        fast = Predictor.from_pretrained(tmp_path, level=level)([image])[0]
        assert np.array_equal(fast, (heads[level][0, 0] > 0).numpy())
        mean = torch.stack([heads[shallower].sigmoid() for shallower in range(1, level + 1)]).mean(0)
        accurate = Predictor.from_pretrained(tmp_path, mode="accurate", level=level)([image])[0]
        assert np.array_equal(accurate, (mean[0, 0] > 0.5).numpy())


def test_one_pass_gives_every_level_and_accurate_mode(tmp_path: Path) -> None:
    model = random_model()
    save_pretrained(model, tmp_path)
    image = random_image(150, 90)
    masks = masks_by_level(model, image, tile_px=64)
    assert list(masks) == ["L1", "L2", "L3", "L4", "accurate"]
    for level in LEVELS:
        assert np.array_equal(masks[f"L{level}"], Predictor.from_pretrained(tmp_path, level=level)([image])[0])
    assert np.array_equal(masks["accurate"], Predictor.from_pretrained(tmp_path, mode="accurate")([image])[0])


@pytest.mark.parametrize("num_classes", [1, 3])
def test_flips_average_what_the_mirror_images_give(tmp_path: Path, num_classes: int) -> None:
    """The oracle mirrors the image itself, whose sides need no padding."""
    model = random_model(level=2, num_classes=num_classes)
    save_pretrained(model, tmp_path)
    image = random_image(64, 48)
    seen = []
    for turn in (np.s_[:, :], np.s_[:, ::-1], np.s_[::-1, :], np.s_[::-1, ::-1]):
        with torch.no_grad():
            heads = model(scale(torch.from_numpy(image[turn].copy()[None]), model.config))
        one, two = (head.sigmoid() if num_classes == 1 else head.softmax(1) for head in heads.values())
        seen.append(((one + two) / 2).numpy()[0][:, *turn])
    mean_KHW = np.mean(seen, axis=0)
    margin = np.abs(2 * mean_KHW - 1) if num_classes == 1 else -np.diff(np.sort(mean_KHW, 0)[-2:][::-1], axis=0)
    wanted = mean_KHW[0] > 0.5 if num_classes == 1 else mean_KHW.argmax(0)
    assert len(np.unique(wanted)) > 1
    prediction = Predictor.from_pretrained(tmp_path, mode="accurate", flips=True).predict([image])[0]
    sure = margin[0] > 1e-5
    assert np.array_equal(prediction.mask_HW[sure], wanted[sure])
    assert prediction.uncertainty == pytest.approx(1 - margin.mean(), abs=1e-5)
    plain = Predictor.from_pretrained(tmp_path, mode="accurate").predict([image])[0]
    assert not np.array_equal(plain.mask_HW, prediction.mask_HW)
    assert np.array_equal(masks_by_level(model, image, flips=True)["accurate+flips"][sure], wanted[sure])


@pytest.mark.parametrize(("level", "upsample"), [(1, "deconv"), (2, "bilinear"), (3, "deconv"), (4, "nearest")])
def test_tiling_is_invisible_with_flips_too(tmp_path: Path, level: int, upsample: str) -> None:
    save_pretrained(exact_model(level, upsample, deep_supervision=True), tmp_path)
    images = [random_image(301, 275), random_image(40, 401, seed=1)]  # odd sides: the padding is mirrored as well
    whole = Predictor.from_pretrained(tmp_path, mode="accurate", tile_px=1024, flips=True).predict(images)
    tiled = Predictor.from_pretrained(tmp_path, mode="accurate", tile_px=64, flips=True).predict(images)
    for one, other in zip(whole, tiled, strict=True):
        assert 0 < one.mask_HW.mean() < 1
        assert np.array_equal(one.mask_HW, other.mask_HW)
        assert one.uncertainty == pytest.approx(other.uncertainty, abs=1e-6)


def test_flips_are_of_accurate_mode_and_part_of_the_digest(tmp_path: Path) -> None:
    save_pretrained(random_model(level=2), tmp_path)
    with pytest.raises(ConfigError, match="flips average over mirror images in accurate mode, the mode is fast"):
        Predictor.from_pretrained(tmp_path, flips=True)
    with_flips = Predictor.from_pretrained(tmp_path, mode="accurate", flips=True)
    assert with_flips.digest != Predictor.from_pretrained(tmp_path, mode="accurate").digest


@pytest.mark.parametrize("num_classes", [1, 3])
def test_temperature_changes_how_sure_a_head_is_and_not_what_it_says(tmp_path: Path, num_classes: int) -> None:
    model = random_model(level=2, num_classes=num_classes)
    save_pretrained(model, tmp_path / "plain")
    save_pretrained(with_temperature(model, {1: 0.5, 2: 3.0}), tmp_path / "calibrated")
    image = random_image(64, 48)
    with torch.no_grad():
        heads = model(scale(torch.from_numpy(image[None]), model.config))
    for level, degree in ((1, 0.5), (2, 3.0)):
        plain = Predictor.from_pretrained(tmp_path / "plain", level=level).predict([image])[0]
        calibrated = Predictor.from_pretrained(tmp_path / "calibrated", level=level).predict([image])[0]
        assert np.array_equal(plain.mask_HW, calibrated.mask_HW)
        assert (calibrated.uncertainty > plain.uncertainty) == (degree > 1)
    scaled = [heads[1] / 0.5, heads[2] / 3.0]
    mean = sum(head.sigmoid() if num_classes == 1 else head.softmax(1) for head in scaled) / 2
    wanted = (mean[0, 0] > 0.5) if num_classes == 1 else mean[0].argmax(0)
    for masks in (
        Predictor.from_pretrained(tmp_path / "calibrated", mode="accurate")([image])[0],
        masks_by_level(with_temperature(model, {1: 0.5, 2: 3.0}), image)["accurate"],
    ):
        assert np.mean(masks != wanted.numpy()) < 1e-3
        assert np.mean(masks != masks_by_level(model, image)["accurate"]) > 1e-3


@torch.no_grad()
def test_logits_by_level_are_those_of_the_network() -> None:
    model = with_temperature(random_model(num_classes=3), {2: 4.0})
    image = random_image(150, 90)
    whole = model(scale(torch.from_numpy(image[None]), model.config))
    logits = logits_by_level(model, image, tile_px=64)
    assert list(logits) == list(LEVELS)
    for level, logits_HWK in logits.items():
        assert np.abs(logits_HWK - whole[level][0].permute(1, 2, 0).numpy()).max() < 1e-4


def test_accurate_mode_needs_the_heads(tmp_path: Path) -> None:
    save_pretrained(prune(random_model(), 2), tmp_path)
    with pytest.raises(ConfigError, match=r"accurate mode averages .* this model has \[2\] only"):
        Predictor.from_pretrained(tmp_path, mode="accurate")


def test_several_classes_give_class_ids(tmp_path: Path) -> None:
    model = random_model(num_classes=4)
    save_pretrained(model, tmp_path)
    image = random_image(40, 56)
    with torch.no_grad():
        expected = model(scale(torch.from_numpy(image[None]), model.config))[4].argmax(1)[0].numpy()
    prediction = Predictor.from_pretrained(tmp_path).predict([image])[0]
    assert np.array_equal(prediction.mask_HW, expected)
    assert 0 < prediction.uncertainty < 1


def test_uncertainty_is_the_missing_margin(tmp_path: Path) -> None:
    model = random_model()
    save_pretrained(model, tmp_path)
    image = random_image(130, 70)
    with torch.no_grad():
        probability = model(scale(torch.from_numpy(image[None]), model.config))[4].sigmoid()
    expected = 1 - (2 * probability - 1).abs().mean().item()
    assert Predictor.from_pretrained(tmp_path).predict([image])[0].uncertainty == pytest.approx(expected, abs=1e-5)


def test_numbers_that_overflow_are_seen_in_the_prediction(tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        for parameter in model.heads["4"].parameters():
            parameter.fill_(3e38)
    save_pretrained(model, tmp_path)
    assert not Predictor.from_pretrained(tmp_path).predict([random_image(20, 20)])[0].finite
    assert Predictor.from_pretrained(tmp_path, level=3).predict([random_image(20, 20)])[0].finite


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_part_may_end_anywhere(engine: EngineName, tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path, engine=engine, tile_px=64)
    image = random_image(150, 170)
    for part in (Box(0, 0, 17, 19), Box(16, 32, 99, 101)):
        (seen,) = predictor.predict([image], [part])
        assert np.mean(seen.mask_HW != predictor([image])[0][part.slices]) < 1e-3


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_a_pixel_that_is_no_number_is_seen_in_the_prediction(engine: EngineName, tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    image = random_image(90, 150).astype(np.float32) / 255
    predictor = Predictor.from_pretrained(tmp_path, engine=engine, tile_px=64)
    assert predictor.predict([image])[0].finite
    image[70, 3] = np.nan
    assert not predictor.predict([image])[0].finite


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"engine": "onnx"}, "there is no engine onnx; wanted one of auto, reference, torch"),
        ({"mode": "slow"}, "there is no mode slow; wanted one of fast, accurate"),
        ({"threads": 0}, "threads is 0; wanted 1 or more"),
        ({"level": 0}, "level 0 has no supervised head"),
        ({"engine": "torch", "device": "cuda"}, "the device is cuda, and torch finds no GPU here; take cpu"),
    ],
)
def test_names_and_numbers_that_mean_nothing_are_refused(
    how: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unetpp.predictor.has_gpu", lambda: False)
    save_pretrained(random_model(), tmp_path)
    with pytest.raises(ConfigError, match=message):
        Predictor.from_pretrained(tmp_path, **how)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), ">u2"), "pixels are >u2; wanted uint8, uint16 or float32"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"an image has shape \(2, 8, 8, 3\); wanted H, W or H, W, C"),
        (np.zeros(8, np.uint8), r"an image has shape \(8,\)"),
        (np.zeros((0, 8), np.uint8), r"an image has shape \(0, 8\)"),
    ],
)
def test_what_is_no_image_is_refused(engine: EngineName, image: Any, message: str, tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    with pytest.raises(ConfigError, match=message):
        Predictor.from_pretrained(tmp_path, engine=engine)([image])


def test_batches_hold_tiles_of_one_shape_and_lose_none(tmp_path: Path) -> None:
    """What an engine that gains from batches sees: the masks are those of single tiles up to float noise."""
    save_pretrained(random_model(), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path, tile_px=64)
    images = [random_image(150, 90, seed=n) for n in range(3)] + [random_image(64, 64), random_image(1, 1)]
    single = predictor(images)
    predictor.engine.batch_tiles = 4
    batched = predictor(images)
    assert all(np.mean(a != b) < 1e-3 for a, b in zip(single, batched, strict=True))


class SmallEngine(Engine):
    """An engine with room for so many pixels at a time."""

    def __init__(self, engine: Engine, max_px: int) -> None:
        self.batch_tiles = 8
        self._engine, self._max_px = engine, max_px

    def __call__(self, tiles_BHWC, core):  # type: ignore[no-untyped-def]
        if tiles_BHWC[..., 0].size > self._max_px:
            raise MemoryError
        return self._engine(tiles_BHWC, core)


@pytest.mark.parametrize(
    ("max_px", "degraded"),
    [
        (10**9, None),
        (5 * 304 * 208, "batch 4"),
        (304 * 208, "batch 1"),
        (230**2, "tile 128 px"),
        (150**2, "tile 64 px"),
    ],
)
def test_out_of_memory_costs_time_and_no_pixel(tmp_path: Path, max_px: int, degraded: str | None) -> None:
    save_pretrained(exact_model(2, "deconv"), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path, tile_px=512)
    images = [random_image(300, 200, seed=n) for n in range(8)]
    wanted = predictor(images)
    predictor.engine = SmallEngine(predictor.engine, max_px)
    seen = predictor.predict(images)
    assert {prediction.degraded for prediction in seen} == {degraded}
    assert all(np.array_equal(prediction.mask_HW, mask_HW) for prediction, mask_HW in zip(seen, wanted, strict=True))


class NotingEngine(Engine):
    """An engine that computes while others work, and notes when a batch is begun and when it is read."""

    def __init__(self, engine: Engine, fails: Exception | None = None) -> None:
        self.batch_tiles = 2
        self.notes: list[str] = []
        self._engine, self._fails = engine, fails

    def __call__(self, tiles_BHWC, core):  # type: ignore[no-untyped-def]
        return self.start(tiles_BHWC, core)()

    def start(self, tiles_BHWC, core):  # type: ignore[no-untyped-def]
        number = len([note for note in self.notes if "begun" in note])
        self.notes.append(f"{number} begun")

        def read():  # type: ignore[no-untyped-def]
            self.notes.append(f"{number} read")
            if self._fails and number == 1:
                raise self._fails
            return self._engine(tiles_BHWC, core)

        return read


def test_a_batch_is_begun_before_the_last_one_is_read(tmp_path: Path) -> None:
    save_pretrained(exact_model(2, "deconv"), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path)
    images = [random_image(40, 40, seed=n) for n in range(6)]
    wanted = predictor(images)
    engine = predictor.engine = NotingEngine(predictor.engine)
    first = predictor.start(images)
    assert engine.notes == ["0 begun", "1 begun", "0 read", "2 begun", "1 read"]
    second = predictor.start(images[:2])
    assert engine.notes[-1] == "3 begun"
    seen = [prediction.mask_HW for prediction in first()]
    assert engine.notes[-1] == "2 read"
    assert all(np.array_equal(*pair) for pair in zip(seen, wanted, strict=True))
    assert np.array_equal(second()[1].mask_HW, wanted[1])


@pytest.mark.parametrize("num_images", [4, 6])
def test_memory_that_runs_out_after_the_start_costs_time_and_no_pixel(tmp_path: Path, num_images: int) -> None:
    """Batch 1 of 2 fails where it is waited for, of 3 where the next one is begun."""
    save_pretrained(exact_model(2, "deconv"), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path)
    images = [random_image(40, 40, seed=n) for n in range(num_images)]
    wanted = predictor(images)
    predictor.engine = NotingEngine(predictor.engine, MemoryError())
    seen = predictor.start(images)()
    assert all(np.array_equal(each.mask_HW, mask_HW) for each, mask_HW in zip(seen, wanted, strict=True))
    predictor.engine = NotingEngine(predictor.engine, RuntimeError("the device is out of order"))
    if num_images == 4:
        with pytest.raises(RuntimeError, match="out of order"):
            predictor.start(images)()


def test_without_any_memory_the_image_is_to_blame_for_now(tmp_path: Path) -> None:
    save_pretrained(random_model(level=1), tmp_path)
    predictor = Predictor.from_pretrained(tmp_path)
    predictor.engine = SmallEngine(predictor.engine, 0)
    with pytest.raises(ImageError, match="crash: out of memory, even for tiles of 64 px"):
        predictor([random_image(40, 40)])

"""A network in int8: near float32, as stored, and refused where it is not what the folder's config says."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch

from unetpp.card import Int8Output, Int8Score, Pretrained, Quantised, model_card
from unetpp.checkpoint import arrays_of, digest, from_pretrained, save_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError, ModelError
from unetpp.int8 import BIN, XML, save_int8
from unetpp.model import UNetPlusPlus
from unetpp.openvino_graph import head_name, network
from unetpp.predictor import Predictor
from unetpp.quantise import calibration_crops, convolution_names, float_layers, quantise


def small_model(**kind: Any) -> UNetPlusPlus:
    """A small network with normalisation statistics that are not those of a new one."""
    torch.manual_seed(1)
    model = UNetPlusPlus(ModelConfig.model_validate({"level": 2, "filters": (8, 8, 12), **kind}))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(*((0.5, 1.5) if "var" in name else (-0.5, 0.1)))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> list[Any]:
    """Six images of coarse noise, uint8 HWC."""
    coarse = np.random.default_rng(4).integers(0, 256, (6, 9, 9, 3), np.uint8)
    return list(coarse.repeat(8, 1).repeat(8, 2))


@pytest.fixture(scope="module")
def model(images: list[Any]) -> UNetPlusPlus:
    """Of whose heads each finds half of the pixels of `images`."""
    model = small_model()
    with torch.no_grad():
        logits = model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)
        for level, logits_BKHW in logits.items():
            model.heads[str(level)].bias -= logits_BKHW.median()  # type: ignore[operator]
    return model


@pytest.fixture(scope="module")
def crops(model: UNetPlusPlus, images: list[Any]) -> list[Any]:
    return calibration_crops(images, model.config, 12, crop_px=48, seed=5)


@pytest.fixture(scope="module")
def quantised(model: UNetPlusPlus, crops: list[Any]) -> ov.Model:
    return quantise(network(model.config, arrays_of(model)), crops, ("nodes.x00.0", "heads.2"))


@pytest.fixture(scope="module")
def int8_dir(model: UNetPlusPlus, quantised: ov.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model with its int8 form."""
    folder = tmp_path_factory.mktemp("int8")
    write(model, quantised, folder)
    return folder


def write(model: UNetPlusPlus, quantised: ov.Model, folder: Path, **told: Any) -> None:
    about = {
        "weights_digest": digest(model),
        "sha256": save_int8(quantised, folder),
        "levels": model.config.head_levels,
        "float_layers": (),
        "max_iou_drop": 0.002,
        "max_group_drop": 0.005,
    }
    described = Quantised.model_validate(about | told)
    save_pretrained(model, folder, Pretrained(model=model.config, quantised=described))


def test_calibration_crops_are_seeded_and_varied(model: UNetPlusPlus, images: list[Any], crops: list[Any]) -> None:
    assert {crop.shape for crop in crops} == {(1, 3, 48, 48)}
    assert all(crop.dtype == np.float32 and 0 <= crop.min() <= crop.max() <= 1 for crop in crops)
    again = calibration_crops(images, model.config, 12, crop_px=48, seed=5)
    assert all(np.array_equal(one, other) for one, other in zip(crops, again, strict=True))
    assert not np.array_equal(crops[0], crops[6])  # of the same image
    assert not np.array_equal(crops[0], calibration_crops(images, model.config, 1, crop_px=48, seed=6)[0])


def test_logits_in_int8_are_near_those_in_float32(model: UNetPlusPlus, quantised: ov.Model, crops: list[Any]) -> None:
    x_BCHW = np.concatenate(crops)
    core = ov.Core()
    seen, wanted = (
        core.compile_model(each, "CPU")(x_BCHW) for each in (quantised, network(model.config, arrays_of(model)))
    )
    for level in model.config.head_levels:
        one, other = seen[head_name(level)], wanted[head_name(level)]
        assert one.shape == other.shape == (12, 1, 48, 48)
        assert 0 < np.abs(one - other).mean() < 0.1 * other.std()


def test_weights_are_eight_bits_but_where_float32_is_asked_for(quantised: ov.Model) -> None:
    def types_above(node: Any) -> set[str]:
        found = {node.get_element_type().get_type_name()} if node.get_type_name() == "Constant" else set()
        above = [each.get_node() for each in node.input_values()] if node.get_type_name() != "FakeQuantize" else []
        return found.union(*(types_above(each) for each in above)) if above or found else set()

    by_name = {node.get_friendly_name(): node for node in quantised.get_ops()}
    names = convolution_names(quantised)
    assert len(names) == 2 * 6 + 3 + 2
    for name in names:
        weights = types_above(by_name[name].input_value(1).get_node())
        assert ("i8" in weights) == (name not in ("nodes.x00.0", "heads.2")), name


def test_transposed_convolutions_read_unsigned_values_by_the_steps_of_what_else_reads_them(
    quantised: ov.Model,
) -> None:
    def bounds(rounded: Any) -> tuple[float, float]:
        low, high = (float(rounded.input_value(n).get_node().get_data().item()) for n in (1, 2))
        return low, high

    convolutions = [node for node in quantised.get_ops() if node.get_type_name() == "ConvolutionBackpropData"]
    read = [node.input_value(0).get_node() for node in convolutions]
    assert [bounds(rounded)[0] for rounded in read] == [0, 0, 0]
    (before,) = (node for rounded in read if "Fake" in (node := rounded.input_value(0).get_node()).get_type_name())
    (after,) = (rounded for rounded in read if rounded.input_value(0).get_node() == before)
    low, high = bounds(before)
    assert low < 0
    assert bounds(after)[1] == pytest.approx(high - low, rel=1e-6)


def test_equal_crops_make_equal_bytes(
    model: UNetPlusPlus, quantised: ov.Model, crops: list[Any], tmp_path: Path
) -> None:
    again = quantise(network(model.config, arrays_of(model)), crops, ("nodes.x00.0", "heads.2"))
    (tmp_path / "again").mkdir()
    assert save_int8(quantised, tmp_path) == save_int8(again, tmp_path / "again")


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_every_choice_of_float_layers_names_convolutions_of_the_network(norm: str) -> None:
    model = small_model(norm=norm)
    names = convolution_names(network(model.config, arrays_of(model)))
    choices = float_layers(model.config)
    assert all(set(choice) <= set(names) for choice in choices)
    assert all(set(one) < set(other) for one, other in itertools.pairwise(choices))


def test_an_unknown_layer_is_refused(model: UNetPlusPlus, crops: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"no convolution is called heads\.3; there are nodes\.x00\.0"):
        quantise(network(model.config, arrays_of(model)), crops, ("heads.3",))


@pytest.mark.parametrize("pixel_type", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("mode", [{"level": 1}, {"level": 2}, {"mode": "accurate", "flips": True}], ids=str)
def test_masks_are_nearly_those_of_float32(int8_dir: Path, images: list[Any], pixel_type: str, mode: Any) -> None:
    factor = {"uint8": 1.0, "uint16": 257.0, "float32": 1 / 255}[pixel_type]
    pixels = [(image_HWC * factor).astype(pixel_type) for image_HWC in images]
    seen, wanted = (
        np.stack(Predictor.from_pretrained(int8_dir, engine=engine, threads=1, **mode)(pixels))
        for engine in ("openvino-int8", "openvino")
    )
    assert seen.shape == (6, 72, 72)
    assert 0.3 < wanted.mean() < 0.7
    assert (seen != wanted).mean() < 0.1


def test_int8_masks_are_another_models_than_those_of_float32_and_of_another_int8_form(
    model: UNetPlusPlus, int8_dir: Path, crops: list[Any], tmp_path: Path
) -> None:
    write(model, quantise(network(model.config, arrays_of(model)), crops[:3], ("nodes.x00.0", "heads.2")), tmp_path)
    seen = [
        Predictor.from_pretrained(folder, level=1, engine=engine).digest
        for folder, engine in ((int8_dir, "openvino"), (int8_dir, "openvino-int8"), (tmp_path, "openvino-int8"))
    ]
    assert len(set(seen)) == 3
    assert seen[1] == Predictor.from_pretrained(int8_dir, level=1, engine="openvino-int8").digest
    assert seen[0] == digest(from_pretrained(int8_dir, 1), mode="fast", precision="f32")


def test_a_model_without_an_int8_form_says_how_to_make_one(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"has no int8 form; make it: unetpp quantise --model .*or take engine openv"):
        Predictor.from_pretrained(tiny_model, engine="openvino-int8")


def test_an_int8_form_of_other_weights_is_refused(model: UNetPlusPlus, quantised: ov.Model, tmp_path: Path) -> None:
    write(small_model(), quantised, tmp_path, weights_digest=digest(model))
    with pytest.raises(ModelError, match=r"was made of model \w{10}, the folder holds \w{10}; make it"):
        Predictor.from_pretrained(tmp_path, engine="openvino-int8")


@pytest.mark.parametrize("name", [XML, BIN])
def test_a_damaged_or_missing_int8_form_is_refused(int8_dir: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(int8_dir, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"are not those of its config\.json"):
        Predictor.from_pretrained(tmp_path, engine="openvino-int8")
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        Predictor.from_pretrained(tmp_path, engine="openvino-int8")
    assert Predictor.from_pretrained(tmp_path, engine="openvino").level == 2


def test_a_head_that_the_int8_form_lacks_is_refused(crops: list[Any], tmp_path: Path) -> None:
    whole = small_model()
    write(whole, quantise(network(whole.config, arrays_of(whole)), crops, ()), tmp_path, levels=(2,))
    with pytest.raises(ConfigError, match=r"has heads at levels \[2\], wanted \[1\]"):
        Predictor.from_pretrained(tmp_path, engine="openvino-int8", mode="accurate")


def test_int8_predicts_without_nncf_and_torch(int8_dir: Path) -> None:
    program = (
        "import sys, numpy as np; from unetpp.predictor import Predictor;"
        f"p = Predictor.from_pretrained({str(int8_dir)!r}, engine='openvino-int8', device='cpu', threads=1);"
        "p([np.zeros((40, 50), np.uint8)]); print(sorted({'nncf', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_card_says_what_int8_costs(model: UNetPlusPlus, int8_dir: Path) -> None:
    about = Quantised(
        weights_digest=digest(model),
        sha256="0" * 64,
        levels=(1, 2),
        float_layers=("nodes.x00.0",),
        scores={
            "L2": Int8Output(
                num_images=30,
                float32_iou=0.8,
                int8_iou=0.799,
                groups={name: Int8Score(num_images=21, float32_iou=0.7, int8_iou=0.701) for name in ("dim", "all")},
            )
        },
        data="cells",
        split="val",
        max_iou_drop=0.002,
        max_group_drop=0.005,
        versions={"nncf": "1.2.3"},
    )
    card = model_card(Pretrained(model=model.config, quantised=about), 1)
    assert "| L2 | all images | 30 | 0.8000 | 0.7990 | 0.0010 |" in card
    assert "| L2 | dim | 21 | 0.7000 | 0.7010 | -0.0010 |" in card
    assert "| L2 | all | 21 | 0.7000 | 0.7010 | -0.0010 |" in card
    assert "above 0.002 over all images, or above 0.005 in a group of 20 images" in card
    assert "nodes.x00.0" in card
    assert "## Int8" not in model_card(Pretrained(model=model.config), 1)

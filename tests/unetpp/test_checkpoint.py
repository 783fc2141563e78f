"""A model folder holds exactly one model, and says so when it does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unetpp.calibrate import with_temperature
from unetpp.checkpoint import LevelScore, Pretrained, digest, from_pretrained, read_pretrained, save_pretrained
from unetpp.config import ModelConfig, ValueRange
from unetpp.errors import ConfigError, ModelError
from unetpp.model import UNetPlusPlus
from unetpp.prune import prune

CONFIG = ModelConfig(filters=(4, 6, 8, 10, 12), in_channels=1, gamma=0.5, value_range=ValueRange(uint16=(0, 4095)))


@pytest.fixture
def model() -> UNetPlusPlus:
    torch.manual_seed(0)
    return UNetPlusPlus(CONFIG).eval()


@pytest.fixture
def model_dir(model: UNetPlusPlus, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"


def test_what_is_loaded_computes_what_was_saved(model: UNetPlusPlus, model_dir: Path) -> None:
    loaded = from_pretrained(model_dir)
    x = torch.rand(1, 1, 40, 24)
    assert loaded.config == model.config
    assert not loaded.training
    with torch.no_grad():
        for level, head in model(x).items():
            assert torch.equal(loaded(x)[level], head)
            assert torch.equal(from_pretrained(model_dir, level)(x)[level], head)


def test_the_folder_holds_weights_config_and_card_without_pickle(model_dir: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in model_dir.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((model_dir / "config.json").read_text())
    assert config["model"]["value_range"]["uint16"] == [0, 4095]
    (tmp_path / "as any other file").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "as any other file", *model_dir.iterdir())}
    assert len(modes) == 1


def test_the_card_carries_scores_and_history(model: UNetPlusPlus, tmp_path: Path) -> None:
    score = LevelScore(
        split="val", num_images=68, mean_iou=0.8123, mean_iou_interval=(0.79, 0.83), num_parameters=1234,
        gmacs_per_megapixel=5.5, seconds_per_megapixel=0.25,
    )  # fmt: skip
    save_pretrained(model, tmp_path, Pretrained(model=CONFIG, scores={"L2": score}, training={"seed": 7}))
    assert read_pretrained(tmp_path).scores == {"L2": score}
    card = (tmp_path / "README.md").read_text()
    assert "| L2 | 68 (val) | 0.8123 | 0.7900 to 0.8300 | 1,234 | 5.5 | 0.250 |" in card
    assert '"seed": 7' in card


def test_an_absent_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model at .*nowhere"):
        from_pretrained(tmp_path / "nowhere")


def test_a_folder_without_weights_is_a_model_error(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        from_pretrained(model_dir)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5])
def test_cut_weights_are_a_model_error(model_dir: Path, keep: float) -> None:
    path = model_dir / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(ModelError, match="damaged"):
        from_pretrained(model_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("heads.2.bias"), "heads.2.bias is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is not part"),
        (lambda weights: weights.update({"heads.2.bias": torch.zeros(3)}), r"heads.2.bias .* is \(3,\)"),
    ],
)
def test_weights_of_another_model_are_refused(model_dir: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    weights = load_file(model_dir / "model.safetensors")
    change(weights)
    save_file(weights, model_dir / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        from_pretrained(model_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"levle": 3}}', '{"model": {"level": 5}}'])
def test_a_config_that_is_none_is_refused(model_dir: Path, text: str) -> None:
    (model_dir / "config.json").write_text(text)
    with pytest.raises(ModelError, match="not a model's config"):
        from_pretrained(model_dir)


def test_a_level_the_model_lacks_is_the_callers_error(model: UNetPlusPlus, tmp_path: Path) -> None:
    save_pretrained(prune(model, 2), tmp_path)
    with pytest.raises(ConfigError, match="level 3 has no supervised head"):
        from_pretrained(tmp_path, 3)


def test_the_digest_follows_what_decides_a_pixel(model: UNetPlusPlus) -> None:
    plain = digest(model, mode="fast")
    assert plain == digest(model, mode="fast")
    assert plain != digest(model, mode="accurate")
    other_scaling = UNetPlusPlus(CONFIG.model_copy(update={"gamma": 1.0}))
    other_scaling.load_state_dict(model.state_dict())
    assert plain != digest(other_scaling, mode="fast")
    with torch.no_grad():
        model.heads["1"].bias += 1e-3
    assert plain != digest(model, mode="fast")


def test_a_temperature_counts_for_the_digest_where_it_changes_a_probability(model: UNetPlusPlus) -> None:
    plain = digest(model)
    assert digest(with_temperature(model, dict.fromkeys((1, 2, 3, 4), 1.0))) == plain
    assert digest(with_temperature(model, {2: 1.5})) != plain
    assert digest(with_temperature(model, {2: 1.5, 3: 1.0})) == digest(with_temperature(model, {2: 1.5}))
    assert digest(prune(with_temperature(model, {2: 1.5}), 3)) == digest(prune(model, 3))


def test_each_head_takes_its_temperature_along(model: UNetPlusPlus, tmp_path: Path) -> None:
    calibrated = with_temperature(model, {1: 1.1, 2: 1.2, 3: 1.3, 4: 1.4})
    save_pretrained(calibrated, tmp_path / "full")
    save_pretrained(prune(calibrated, 3), tmp_path / "pruned")
    assert from_pretrained(tmp_path / "full").config.temperature == {1: 1.1, 2: 1.2, 3: 1.3, 4: 1.4}
    assert from_pretrained(tmp_path / "pruned").config.temperature == {3: 1.3}
    assert prune(calibrated, 3, keep_heads=True).config.temperature == {1: 1.1, 2: 1.2, 3: 1.3}
    assert digest(from_pretrained(tmp_path / "full", 3)) == digest(from_pretrained(tmp_path / "pruned"))
    with pytest.raises(ValueError, match=r"temperature names levels \[1\], the model has heads \[2\]"):
        ModelConfig(level=2, deep_supervision=False, temperature={1: 2.0})


def test_the_way_of_pruning_does_not_change_the_digest(model: UNetPlusPlus, tmp_path: Path) -> None:
    save_pretrained(prune(model, 3), tmp_path)
    assert digest(prune(model, 2)) != digest(prune(model, 3))
    assert digest(from_pretrained(tmp_path)) == digest(prune(model, 3))

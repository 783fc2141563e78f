"""Training on a real Ray: it learns, resumes by name, starts anew when something changed, and adds up over workers."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from jobs.array_file import cache_dir
from jobs.contract import SynthConfig, TrainConfig
from jobs.dataset import CropSampler, load, open_labelled_set
from jobs.synth import run as synthesise
from jobs.train import run
from unetpp.checkpoint import from_pretrained, read_pretrained
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.loss import deep_supervision_loss
from unetpp.model import UNetPlusPlus

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(folder), num=10, size=64, seed=5))
    return folder


def config(data_dir: Path, output: object, **fields: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "name": "tiny",
            "data": str(data_dir),
            "output": str(output),
            "model": {"level": 2, "filters": [4, 8, 16]},
            "crop_px": 32,
            "batch_size": 4,
            "epochs": 2,
            "steps_per_epoch": 3,
            "warmup_steps": 2,
            "threads_per_worker": 1,
            **fields,
        }
    )


def test_two_workers_train_a_model_that_can_be_pruned_and_a_second_call_does_nothing(
    data_dir: Path, tmp_path: Path
) -> None:
    asked = config(data_dir, tmp_path, num_workers=2, balance_by="modality")
    result = run(asked)
    assert set(result.val_iou) == {1, 2}
    assert result.steps == 6
    pretrained = read_pretrained(result.model_uri)
    assert pretrained.supervised_levels == (1, 2)
    assert pretrained.training["config"]["seed"] == 0  # type: ignore[index]
    assert from_pretrained(result.model_uri, level=1).config.level == 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run(asked) == result
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == written


def test_a_killed_run_resumes_to_the_weights_of_an_undisturbed_one(
    data_dir: Path,
    tmp_path: Path,
    run_unetpp: Callable[..., subprocess.Popen[str]],
    kill_tree: Callable[[subprocess.Popen[str]], None],
) -> None:
    asked = config(data_dir, tmp_path / "disturbed", epochs=12)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(asked.model_dump_json())
    process = run_unetpp("train", "--config", config_file)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("disturbed/*/checkpoints/epoch_0001/state.pt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    kill_tree(process)
    assert not list(tmp_path.glob("disturbed/*/result.json")), "the kill came too late"
    resumed = run(asked)
    undisturbed = run(config(data_dir, tmp_path / "undisturbed", epochs=12))
    assert resumed.digest == undisturbed.digest
    assert resumed.val_iou == undisturbed.val_iou


def test_two_workers_equal_one(data_dir: Path, tmp_path: Path) -> None:
    """Without BatchNorm, whose statistics are a worker's own, the workers' mean gradient is the whole batch's."""
    model = {"level": 1, "filters": [4, 8], "norm": "none"}
    results = [
        run(config(data_dir, tmp_path / str(number), model=model, num_workers=number, epochs=1)) for number in (1, 2)
    ]
    one, two = (from_pretrained(result.model_uri).state_dict() for result in results)
    for name, weights in one.items():
        torch.testing.assert_close(weights, two[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture
def mapped_files() -> Iterator[Callable[[], set[Path]]]:
    """Function: the files of decoded images that this node got since the test began; removed at its end."""
    before = set(cache_dir().iterdir())
    yield lambda: {path for path in set(cache_dir().iterdir()) - before if path.suffix == ".arrays"}
    for path in set(cache_dir().iterdir()) - before:
        path.unlink()


def test_images_mapped_from_disk_train_the_same_model(
    data_dir: Path, tmp_path: Path, mapped_files: Callable[[], set[Path]]
) -> None:
    in_memory, on_disk = (
        run(config(data_dir, tmp_path / cache, cache=cache, epochs=1, num_workers=2)) for cache in ("memory", "disk")
    )
    assert on_disk.digest == in_memory.digest
    assert len(mapped_files()) == 2, "one of the training images, one of the validation images"


def test_changed_settings_or_data_never_resume_old_weights(data_dir: Path, tmp_path: Path) -> None:
    first = config(data_dir, tmp_path)
    names = {first.run_fingerprint()}
    for change in ({"seed": 1}, {"learning_rate": 2e-3}, {"epochs": 3}, {"model": {"level": 1, "filters": [4, 8]}}):
        names.add(config(data_dir, tmp_path, **change).run_fingerprint())
    assert len(names) == 5
    same = config(data_dir, tmp_path / "elsewhere", threads_per_worker=2, cache="disk")
    assert same.run_fingerprint() == first.run_fingerprint()


def test_a_loss_that_is_not_finite_ends_in_a_sentence(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the loss became .*; lower learning_rate"):
        run(config(data_dir, tmp_path, learning_rate=1e30, warmup_steps=0))


def test_a_batch_seen_again_and_again_is_learnt_at_every_head(data_dir: Path) -> None:
    asked = config(data_dir, "unused")
    sampler = CropSampler(load(open_labelled_set(str(data_dir)).samples, asked.model), asked)
    x, target = next(sampler.batches(epoch=0, num_steps=1, rank=0, world_size=1))
    torch.manual_seed(0)
    model = UNetPlusPlus(ModelConfig(level=2, filters=(8, 16, 32)))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses: list[dict[int, float]] = []
    for _ in range(80):
        heads = model(x)
        losses.append({level: deep_supervision_loss({level: head}, target).item() for level, head in heads.items()})
        optimiser.zero_grad()
        deep_supervision_loss(heads, target).backward()
        optimiser.step()
    assert all(losses[-1][level] < 0.6 * losses[0][level] for level in (1, 2)), (losses[0], losses[-1])


def test_the_result_is_json_that_reads_back(data_dir: Path, tmp_path: Path) -> None:
    result = run(config(data_dir, tmp_path, epochs=1, steps_per_epoch=1))
    stored = json.loads((tmp_path / result.run / "result.json").read_text())
    assert type(result).model_validate(stored) == result

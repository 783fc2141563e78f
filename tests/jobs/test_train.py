"""Training on a real Ray: it learns, resumes by name, starts anew when something changed, and adds up over workers."""

import csv
import io
import json
import logging
import multiprocessing
import re
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from tensorboardX.proto import event_pb2

from jobs import checkpoints
from jobs.array_file import cache_dir
from jobs.contract import PruneConfig, SynthConfig, TrainConfig, TrainResult
from jobs.dataset import CropSampler, load, open_labelled_set
from jobs.prune import run as prune
from jobs.synth import run as synthesise
from jobs.train import NEVER_RETRIED, _threads, _uses_gpu, _without_workers, look_for_room, run, tell_other_reading
from jobs.train_records import Progress, RunLog
from jobs.train_worker import Worker, train_worker
from jobs.training import MAX_SKIPPED, DivergedError, TrainingState, first_network, take_weights, trained_network
from tests.fresh import in_a_fresh_process
from unetpp.checkpoint import from_pretrained, read_pretrained
from unetpp.config import ModelConfig, ValueRange
from unetpp.errors import ConfigError, StorageError
from unetpp.loss import deep_supervision_loss
from unetpp.measuring import masks_by_level
from unetpp.metrics import confusion_counts, iou
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


SAME_STEPS = {
    "model": {"level": 2, "filters": [4, 8, 16], "norm": "none"},
    "optimiser": "sgd",
    "learning_rate": 0.01,
    "epochs": 1,
    "steps_per_epoch": 20,
}
"""Without BatchNorm, whose statistics are a worker's own."""


def scalars(result: TrainResult) -> dict[str, dict[int, float]]:
    """What was told to TensorBoard: tag -> step -> value."""
    seen: dict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted((Path(result.model_uri).parent / "records" / "tensorboard").iterdir()):
        for event in read_events(file.read_bytes()):
            for value in event.summary.value:
                seen[value.tag][event.step] = value.simple_value
    return seen


def read_events(content: bytes) -> Iterator[Any]:
    """TensorBoard's records: length, its checksum, the message, its checksum."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def losses(result: TrainResult) -> list[float]:
    return list(scalars(result)["train/loss"].values())


@pytest.fixture(scope="module")
def one_worker(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(config(data_dir, tmp_path_factory.mktemp("one"), **SAME_STEPS))


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 2},
        {"num_workers": 3, "recompute": True},  # of four crops one gets two
        {"num_workers": [1, 2], "micro_batch": 1},
    ],
)
def test_a_batch_is_the_same_however_it_is_shared_out(
    data_dir: Path, tmp_path: Path, one_worker: TrainResult, change: dict[str, object]
) -> None:
    shared_out = run(config(data_dir, tmp_path, **SAME_STEPS, **change))
    assert len(losses(shared_out)) == 20
    np.testing.assert_allclose(losses(shared_out), losses(one_worker), rtol=0, atol=1e-5)
    assert len(set(losses(one_worker))) == 20


def test_two_workers_equal_one_with_frozen_statistics(data_dir: Path, tmp_path: Path) -> None:
    first = run(config(data_dir, tmp_path / "first", epochs=1))
    same = {**SAME_STEPS, "model": {"level": 2, "filters": [4, 8, 16]}, "init": first.model_uri, "freeze_norm": True}
    one, two = (run(config(data_dir, tmp_path / str(n), **same, num_workers=n)) for n in (1, 2))
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-5)
    before, after = from_pretrained(first.model_uri).state_dict(), from_pretrained(two.model_uri).state_dict()
    assert torch.equal(before["nodes.x00.1.running_mean"], after["nodes.x00.1.running_mean"])
    assert not torch.equal(before["nodes.x00.0.weight"], after["nodes.x00.0.weight"])


def test_what_several_workers_validate_is_what_they_save(tmp_path: Path) -> None:
    synthesise(SynthConfig(out=str(tmp_path / "data"), num=40, size=64, seed=5))
    asked = config(tmp_path / "data", tmp_path, epochs=1, steps_per_epoch=10, num_workers=2)
    found = checkpoints.newest(str(tmp_path / run(asked).run))
    assert found is not None
    saved, state = found
    network = trained_network(asked.model, state)
    scores: dict[str, list[float]] = defaultdict(list)
    for image in load(open_labelled_set(asked.data).split("val"), asked.model):
        for name, mask_HW in masks_by_level(network, image.image_HWC).items():
            scores[name].append(iou(confusion_counts(mask_HW, image.target_HW, 1)))
    assert len(scores["L2"]) > 1
    assert saved.metrics.val_iou == pytest.approx({name: np.mean(each) for name, each in scores.items()}, abs=1e-6)


def test_a_pruned_network_is_trained_further(data_dir: Path, tmp_path: Path) -> None:
    full = run(config(data_dir, tmp_path, epochs=1))
    pruned = prune(PruneConfig(model=full.model_uri, out=str(tmp_path / "pruned"), level=1))
    level1 = {"level": 1, "filters": [4, 8]}
    changes = {"model": level1, "epochs": 1, "steps_per_epoch": 1, "warmup_steps": 0, "learning_rate": 1e-9}
    finer = run(config(data_dir, tmp_path, init=pruned.model_uri, ema_decay=0, freeze_norm=True, **changes))
    before, after = from_pretrained(pruned.model_uri), from_pretrained(finer.model_uri)
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    again = prune(PruneConfig(model=finer.model_uri, out=pruned.model_uri, level=1))
    assert again.digest != pruned.digest
    other = run(config(data_dir, tmp_path, init=pruned.model_uri, ema_decay=0, freeze_norm=True, **changes))
    assert other.run != finer.run  # what it begins with is another model, at the same place
    with pytest.raises(ConfigError, match=r"init: the model to start from has filters \(4, 8\), this config filters"):
        run(config(data_dir, tmp_path, init=full.model_uri, model={"level": 1, "filters": [8, 8]}))


INITIAL = ModelConfig(level=2, filters=(4, 8, 16), num_classes=3, gamma=0.5, deep_supervision=False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gamma": 1.0}, "has gamma 0.5, this config gamma 1.0, for which"),
        ({"mean": (0.0,), "std": (1.0,)}, "has mean (0.5,), std (0.25,), this config mean (0.0,), std (1.0,), for"),
        ({"num_classes": 1}, "has num_classes 3, this config num_classes 1, for which"),
        ({"deep_supervision": True}, "has heads at levels (2,), this config heads at levels (1, 2), for which"),
        ({"level": 3, "filters": (4, 8, 16, 32)}, "has heads at levels (2,), this config heads at levels (3,), for"),
    ],
    ids=str,
)
def test_weights_are_taken_for_nothing_that_they_were_not_made_for(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"init: the model to start from {sentence}")):
        take_weights(UNetPlusPlus(INITIAL.model_copy(update=change)), UNetPlusPlus(INITIAL))


def test_images_that_are_read_otherwise_than_the_initial_model_s_are_told(caplog: pytest.LogCaptureFixture) -> None:
    other = INITIAL.model_copy(update={"value_range": ValueRange(uint16=(0, 4095))})
    for ours in (INITIAL, other):
        tell_other_reading(ours, other)
    (message,) = caplog.messages
    assert "uint16=(0.0, 4095.0)" in message
    assert message.endswith("else set model.value_range to the former")


def test_a_budget_of_time_ends_in_a_model(data_dir: Path, tmp_path: Path) -> None:
    result = run(config(data_dir, tmp_path, max_time="4s", epochs=10_000, steps_per_epoch=20))
    assert 0 < result.steps < 20_000
    assert from_pretrained(result.model_uri).config.level == 2
    with (Path(result.model_uri).parent / "records" / "epochs.csv").open() as table:
        *_, last = csv.DictReader(table)
    assert float(last["learning_rate"]) < 2e-4  # it fell in time


def test_an_epoch_without_time_for_a_step_asks_the_other_workers_for_nothing(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(data_dir, "unused", max_time="1h", num_workers=2)
    worker = Worker.__new__(Worker)
    worker.config, worker.rank, worker.world_size, worker.steps_per_epoch = asked, 0, 2, 3
    worker.sampler = CropSampler(load(open_labelled_set(str(data_dir)).samples, asked.model), asked)
    worker.num_processes = 0
    worker.state = TrainingState(asked, 6, first_network(asked), torch.device("cpu"), lambda alone: alone)
    monkeypatch.setattr(worker, "_seconds", lambda: 3600.0)
    assert worker._steps(0) == ([], [])  # there is no process group to ask


def processes_that_make_crops_end_where_a_step_fails(data_dir: Path) -> None:
    asked = config(data_dir, "unused")
    worker = Worker.__new__(Worker)
    worker.config, worker.rank, worker.world_size, worker.steps_per_epoch = asked, 0, 1, 100
    worker.sampler = CropSampler(load(open_labelled_set(str(data_dir)).samples, asked.model), asked)
    worker.num_processes = 2
    worker.state = TrainingState(asked, 6, first_network(asked), torch.device("cpu"), lambda alone: alone)

    def diverge(*_: object) -> None:
        assert len(multiprocessing.active_children()) == 2
        raise DivergedError("no finite gradient")

    worker.state.step = diverge  # type: ignore[assignment, method-assign]
    try:
        worker._steps(0)
    except DivergedError:
        assert not multiprocessing.active_children()  # training goes back to the last checkpoint from here
    else:
        pytest.fail("it went on")


def test_processes_that_make_crops_end_where_a_step_fails(data_dir: Path) -> None:
    in_a_fresh_process(processes_that_make_crops_end_where_a_step_fails, data_dir)


def test_a_worker_says_that_shared_memory_is_too_small(data_dir: Path, tmp_path: Path) -> None:
    worker = Worker.__new__(Worker)
    worker.config, worker.world_size = config(data_dir, "unused", batch_size=10**9), 1
    worker.progress = Progress(RunLog(str(tmp_path)), 1, 1)
    assert worker._with_room(0, 1) == worker._with_room(8, 1) == 0
    (line,) = worker.progress.log.lines()  # type: ignore[union-attr]
    assert "/dev/shm has room for the batches of 0 processes that make crops, not 8: fewer make them" in line


def test_a_worker_on_a_gpu_has_its_share_of_a_node_with_gpus(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = [{"CPU": 64.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}]
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": has} for has in resources])
    asked = config(data_dir, "unused", num_workers=4, threads_per_worker=None)
    assert _threads(asked, use_gpu=True) == 8
    assert _threads(asked, use_gpu=False) == 32
    elastic = config(data_dir, "unused", num_workers=[1, 16], batch_size=16, threads_per_worker=None)
    assert _threads(elastic, use_gpu=True) == 8, "no more than four find a GPU"
    assert _threads(asked.model_copy(update={"cache": "stream"}), use_gpu=True) == 1, "Ray Data needs the others"


@pytest.mark.parametrize("is_cluster", [False, True])
def test_auto_wants_a_torch_that_can_use_the_gpu_of_this_machine(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, is_cluster: bool
) -> None:
    asked = config(data_dir, "unused")
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 1.0})
    if is_cluster:
        monkeypatch.setenv("RAY_ADDRESS", "here")
    assert _uses_gpu(asked) == (is_cluster or torch.cuda.is_available())
    assert _uses_gpu(asked.model_copy(update={"device": "cuda"}))


def test_only_workers_without_room_are_said_to_lack_it() -> None:
    room, nccl = WorkerGroupStartupTimeoutError(2), ValueError("ProcessGroupNCCL is only supported with GPUs")
    said = _without_workers(room, 2, {"CPU": 4, "GPU": 1})
    assert "could not start within 15 minutes: wanted 2 with 4 CPU and 1 GPU each" in said
    for error in (nccl, RayTaskError("on_start", "ray::on_start()\nTraceback", nccl)):
        said = _without_workers(error, 2, {"CPU": 4, "GPU": 1})
        assert said.startswith("Ray Train gave up (ValueError: ProcessGroupNCCL is only supported with GPUs); once")


def test_without_a_better_validation_training_ends_early(data_dir: Path, tmp_path: Path) -> None:
    result = run(config(data_dir, tmp_path, epochs=50, patience=2, learning_rate=1e-12, ema_decay=0))
    assert result.epochs < 10


def test_a_step_without_a_finite_gradient_changes_nothing_and_a_row_of_them_ends(data_dir: Path) -> None:
    asked = config(data_dir, "unused")
    state = TrainingState(asked, 6, first_network(asked), torch.device("cpu"), lambda alone: alone)
    state.train()
    x, target = torch.rand(4, 3, 32, 32), torch.zeros(4, 32, 32, dtype=torch.uint8)
    state.step([(x, target)], 1)
    before = {name: value.clone() for name, value in state.network.state_dict().items()}
    assert state.step([(x * torch.nan, target)], 1).isnan()
    assert all(torch.equal(value, before[name]) for name, value in state.network.state_dict().items())
    assert (state.num_skipped, state.num_steps_done) == (1, 2)
    for _ in range(MAX_SKIPPED - 1):
        state.step([(x * torch.nan, target)], 1)
    with pytest.raises(DivergedError):
        state.step([(x * torch.nan, target)], 1)
    assert all(value.isfinite().all() for value in state.network.state_dict().values())


def test_the_records_hold_every_step(data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jobs.train_records"):
        result = run(config(data_dir, tmp_path))
    assert ["epoch 1/2" in caplog.messages[0], "epoch 2/2" in caplog.messages[1]] == [True, True]
    seen = scalars(result)
    assert list(seen["train/loss"]) == list(seen["train/learning_rate"]) == [0, 1, 2, 3, 4, 5]
    assert list(seen["val_iou/L2"]) == [3, 6]
    with (Path(result.model_uri).parent / "records" / "epochs.csv").open() as table:
        first, second = (float(row["loss"]) for row in csv.DictReader(table))
    whole = losses(result)
    assert [np.mean(whole[:3]), np.mean(whole[3:])] == pytest.approx([first, second], abs=1e-5)


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


def test_two_workers_share_a_stream(data_dir: Path, tmp_path: Path) -> None:
    result = run(config(data_dir, tmp_path, cache="stream", num_workers=2, balance_by="modality"))
    assert result.steps == 6
    assert all(value > 0 for value in losses(result))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"num_workers": 2, "device": "cuda"}, "at least 2 with 1 GPU each, this machine has 0 GPU; ask for fewer, or"),
        ({"num_workers": [3, 4], "threads_per_worker": 2}, "at least 3 with 2 CPU each, this machine has 4 CPU; ask"),
    ],
)
def test_what_the_machine_lacks_is_said_at_once(
    data_dir: Path, tmp_path: Path, asked: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=f"num_workers asks for {sentence}"):
        run(config(data_dir, tmp_path, **asked))


def test_what_the_cluster_lacks_is_said_before_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "here")
    look_for_room(1, {"CPU": 4})
    assert not caplog.messages
    look_for_room(2, {"CPU": 1, "GPU": 1})
    (message,) = caplog.messages
    assert "at least 2 with 1 GPU each, the cluster has 0 GPU; ask for fewer, or set device to cpu; waiting" in message


def test_changed_settings_or_data_never_resume_old_weights(data_dir: Path, tmp_path: Path) -> None:
    first = config(data_dir, tmp_path)
    names = {first.run_fingerprint()}
    for change in ({"seed": 1}, {"learning_rate": 2e-3}, {"epochs": 3}, {"model": {"level": 1, "filters": [4, 8]}}):
        names.add(config(data_dir, tmp_path, **change).run_fingerprint())
    assert len(names) == 5
    same = config(data_dir, tmp_path / "elsewhere", threads_per_worker=2, cache="disk")
    assert same.run_fingerprint() == first.run_fingerprint()


@pytest.mark.parametrize("steps_per_epoch", [20, 3])
def test_a_loss_that_is_not_finite_ends_in_a_sentence(data_dir: Path, tmp_path: Path, steps_per_epoch: int) -> None:
    asked = {"learning_rate": 1e30, "warmup_steps": 0, "epochs": 20, "steps_per_epoch": steps_per_epoch}
    with pytest.raises(ConfigError, match=r"10 steps in a row had no finite gradient, 4 times.*lower learning_rate"):
        run(config(data_dir, tmp_path, **asked))
    (log,) = tmp_path.glob("*/records/log.txt")
    assert log.read_text().count("going back to the last checkpoint") == 3  # no worker was started anew
    assert not list(tmp_path.glob("*/checkpoints/*")), "the same command would go on from broken weights"


def test_training_goes_back_to_before_its_weights_broke(data_dir: Path, tmp_path: Path) -> None:
    asked = config(data_dir, tmp_path, epochs=4, steps_per_epoch=6, keep_checkpoints=4, num_workers=2)
    first = run(asked)
    run_uri = str(tmp_path / first.run)
    shutil.rmtree(first.model_uri)
    second = checkpoints.complete(run_uri)[2]
    state = checkpoints.read_state(run_uri, second)
    assert state is not None
    saved = torch.load(io.BytesIO(state), weights_only=True)
    saved["model"]["nodes.x00.0.weight"].fill_(torch.nan)  # by the last step of its epoch
    broken = io.BytesIO()
    torch.save(saved, broken)
    checkpoints.remove(run_uri, second.metrics.step)
    checkpoints.save(run_uri, broken.getvalue(), second.history)
    again = run(asked)
    assert (again.epochs, again.steps) == (4, 24)
    log = (tmp_path / first.run / "records" / "log.txt").read_text()
    assert log.count("going back to the last checkpoint before them") == 1
    last, *_ = checkpoints.complete(run_uri)
    assert last.metrics.num_skipped == 0


def test_a_gpu_without_memory_is_told_and_never_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("jobs.train_worker.Worker", full)
    with pytest.raises(NEVER_RETRIED, match=r"20.00 GiB.\); lower batch_size or micro_batch, set recompute"):
        train_worker({})


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


def test_a_model_that_was_removed_is_made_again_from_its_checkpoints(data_dir: Path, tmp_path: Path) -> None:
    first = run(config(data_dir, tmp_path, epochs=1, steps_per_epoch=1))
    shutil.rmtree(first.model_uri)
    again = run(config(data_dir, tmp_path, epochs=1, steps_per_epoch=1))
    assert (again.digest, again.steps) == (first.digest, 1)
    assert read_pretrained(again.model_uri).classes == ("background", "foreground")


def test_the_last_epoch_is_trained_again_where_its_checkpoint_is_torn(data_dir: Path, tmp_path: Path) -> None:
    first = run(config(data_dir, tmp_path))
    shutil.rmtree(first.model_uri)
    last, before = checkpoints.complete(str(tmp_path / first.run))
    (tmp_path / first.run / "checkpoints" / last.state).write_bytes(b"torn")
    again = run(config(data_dir, tmp_path))
    found = checkpoints.newest(str(tmp_path / first.run))
    assert found is not None
    assert (found[0].epoch, before.epoch) == (last.epoch, last.epoch - 1)
    assert (again.digest, again.epochs, again.steps) == (first.digest, 2, 6)


@pytest.mark.parametrize("others", [7, 8])
def test_workers_go_on_from_one_checkpoint_or_not_at_all(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker.__new__(Worker)
    worker.world_size, worker.device, worker.run_uri = 2, torch.device("cpu"), "s3://runs/tiny"

    def reduced(ours: torch.Tensor, op: object) -> None:
        ours.copy_(torch.maximum(ours, torch.tensor([others, -others])))

    monkeypatch.setattr("jobs.train_worker.dist.all_reduce", reduced)
    if others == 7:
        worker._agree_on(7)
        return
    with pytest.raises(StorageError, match="workers found different newest checkpoints in s3://runs/tiny"):
        worker._agree_on(7)

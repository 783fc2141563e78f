"""Crops that Ray Data makes as they are needed: the same ones as from memory, each once, images read about once."""

import shutil
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
from torch import Tensor

from jobs import checkpoints, train_worker
from jobs.cli import run_command_line
from jobs.contract import ExitCode, SynthConfig, TrainConfig
from jobs.dataset import CropSampler, LabelledImage, load, open_labelled_set
from jobs.labelled import Sample
from jobs.stream import OPEN_IMAGES, CropMaker, RemoteImages, crop_order, crop_stream
from jobs.synth import run as synthesise
from jobs.train import run as train
from jobs.train_worker import Worker
from tests.fresh import in_a_fresh_process
from tests.jobs.test_checkpoints import metrics
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError

NUM_CROPS = 60
STREAMED = {"cache": "stream", "epochs": 3, "steps_per_epoch": 30, "warmup_steps": 2, "threads_per_worker": 1}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(folder), num=24, size=32, seed=5))
    return folder


def config(data_dir: Path, **fields: object) -> TrainConfig:
    model = {"level": 1, "filters": [2, 4]}
    plain = {"data": str(data_dir), "output": "unused", "model": model, "crop_px": 16, "epochs": 2, "batch_size": 6}
    return TrainConfig.model_validate({**plain, "balance_by": "modality", **fields})


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "and a torn one after it"])
def test_the_crops_are_those_from_memory_of_the_epoch_after_the_newest_checkpoint_in_another_order(
    data_dir: Path, tmp_path: Path, torn: bool
) -> None:
    checkpoints.save(str(tmp_path), b"state", (metrics(0),))
    if torn:
        second = checkpoints.save(str(tmp_path), b"state", (metrics(0), metrics(1)))
        (tmp_path / "checkpoints" / second.state).write_bytes(b"sta")
    asked = config(data_dir, foreground=0.5)
    samples = open_labelled_set(str(data_dir)).split("train")
    made = CropMaker(samples, asked, NUM_CROPS, str(tmp_path))({"id": np.arange(NUM_CROPS)})
    sampler = CropSampler(load(samples, asked.model), asked)
    kept = [sampler.crop(1, number) for number in range(NUM_CROPS)]
    streamed = sorted((x.tobytes(), target.tobytes()) for x, target in zip(made["x"], made["target"], strict=True))
    assert streamed == sorted((x.tobytes(), target.tobytes()) for x, target in kept)
    assert [x.tobytes() for x in made["x"]] != [x.tobytes() for x, _ in kept]


def test_every_image_is_open_once_an_epoch_and_the_order_is_another_one_in_the_next(data_dir: Path) -> None:
    asked = config(data_dir)
    samples = open_labelled_set(str(data_dir)).split("train") * 4
    sampler = CropSampler(RemoteImages(samples, asked.model), asked, samples)
    orders = [crop_order(sampler, epoch, 500) for epoch in (0, 1, 0)]
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    for epoch, order in enumerate(orders[:2]):
        assert np.array_equal(np.sort(order), np.arange(500))
        images = [sampler.image_of(epoch, number) for number in order]
        first = {image: images.index(image) for image in images}
        last = {image: 499 - images[::-1].index(image) for image in images}
        open_at_once = [sum(first[image] <= at <= last[image] for image in first) for at in range(500)]
        assert max(open_at_once) <= OPEN_IMAGES
        assert len(set(images[:40])) > 8  # a batch mixes them


def test_an_image_that_is_closed_leaves_no_target_behind(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[object]] = []

    def noted(samples: Sequence[Sample], model: ModelConfig) -> Sequence[LabelledImage]:
        images = load(samples, model)
        opened.extend(weakref.ref(image.target_HW) for image in images)
        return images

    monkeypatch.setattr("jobs.stream.load", noted)
    samples = open_labelled_set(str(data_dir)).split("train") * 4
    make = CropMaker(samples, config(data_dir, foreground=1.0), 200, str(tmp_path))
    make({"id": np.arange(200)})
    assert len(opened) > 2 * OPEN_IMAGES
    assert sum(target() is not None for target in opened) <= OPEN_IMAGES


def train_and_note(settings: dict[str, Any]) -> None:
    """Train, and note every start and the crops of every epoch; the first worker fails once, in the second epoch."""
    run_dir = Path(settings["run_uri"])

    class Noting(Worker):
        def _batches(self, epoch: int) -> Generator[tuple[Tensor, Tensor]]:
            crops: list[bytes] = []
            for x_BCHW, target_BHW in super()._batches(epoch):
                crops += [target.numpy().tobytes() for target in target_BHW]
                yield x_BCHW, target_BHW
                if epoch == 1 and self.rank == 0 and len((run_dir / "starts").read_text()) == 1:
                    raise RuntimeError("a worker fails in mid-epoch")
            (run_dir / f"epoch_{epoch}_of_{self.rank}").write_bytes(b"".join(crops))

    if ray.train.get_context().get_world_rank() == 0:
        with (run_dir / "starts").open("a") as starts:
            starts.write("+")
    train_worker.Worker = Noting  # type: ignore[misc]
    train_worker.train_worker(settings)


def workers_train_on_the_crops_of_each_epoch_once(data_dir: Path, output: Path, num_workers: int) -> None:
    asked = config(data_dir, output=str(output), num_workers=num_workers, **STREAMED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.train.train_worker", train_and_note)
        run_dir = output / train(asked).run
    assert (run_dir / "starts").read_text() == "++"
    sampler = CropSampler(load(open_labelled_set(str(data_dir)).split("train"), asked.model), asked)
    for epoch in range(3):
        parts = [(run_dir / f"epoch_{epoch}_of_{rank}").read_bytes() for rank in range(num_workers)]
        assert [len(part) for part in parts] == [180 * 16 * 16 // num_workers] * num_workers
        seen = np.frombuffer(b"".join(parts), np.uint8).reshape(180, 16 * 16)
        kept = [sampler.crop(epoch, number)[1].tobytes() for number in range(180)]
        assert sorted(target.tobytes() for target in seen) == sorted(kept), epoch


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_train_on_the_crops_of_each_epoch_once_before_and_after_a_resumption(
    data_dir: Path, tmp_path: Path, num_workers: int
) -> None:
    in_a_fresh_process(workers_train_on_the_crops_of_each_epoch_once, data_dir, tmp_path, num_workers)


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_cannot_be_decoded_ends_the_command_at_once(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.train.train_worker", train_and_note)
    set_dir = shutil.copytree(data_dir, tmp_path / "set")
    broken = open_labelled_set(str(set_dir)).split("train")[0].image_uri
    Path(broken).write_bytes(b"no image")
    asked = config(set_dir, output=str(tmp_path / "out"), num_workers=2, **STREAMED)
    file = tmp_path / "train.yaml"
    file.write_text(asked.model_dump_json())
    assert run_command_line("train", ["--config", str(file)]) == ExitCode.CONFIG
    sentence, *_ = capsys.readouterr().err.splitlines()  # Ray Data adds that it was not tried again
    assert f"{broken} cannot be used" in sentence
    (starts,) = tmp_path.glob("out/*/starts")
    assert starts.read_text() == "+"


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(data_dir: Path, tmp_path: Path) -> None:
    samples = open_labelled_set(str(data_dir)).split("train")
    for num_workers in (4, [1, 2]):
        asked = config(data_dir, cache="stream", num_workers=num_workers)
        with pytest.raises(ConfigError, match="batch_size 6 must be a multiple of num_workers"):
            crop_stream(samples, asked, 10, str(tmp_path))

"""Crops that Ray Data makes as they are needed: the same ones as from memory, each once, images read about once."""

import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jobs import checkpoints
from jobs.contract import SynthConfig, TrainConfig
from jobs.dataset import CropSampler, LabelledImage, load, open_labelled_set
from jobs.labelled import Sample
from jobs.stream import OPEN_IMAGES, CropMaker, RemoteImages, crop_order, crop_stream
from jobs.synth import run as synthesise
from tests.jobs.test_checkpoints import metrics
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError

NUM_CROPS = 60


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(folder), num=24, size=32, seed=5))
    return folder


def config(data_dir: Path, **fields: object) -> TrainConfig:
    model = {"level": 1, "filters": [2, 4]}
    plain = {"data": str(data_dir), "output": "unused", "model": model, "crop_px": 16, "epochs": 2, "batch_size": 6}
    return TrainConfig.model_validate({**plain, "balance_by": "modality", **fields})


def test_an_epoch_s_crops_are_those_from_memory_in_another_order(data_dir: Path, tmp_path: Path) -> None:
    asked = config(data_dir, foreground=0.5)
    samples = open_labelled_set(str(data_dir)).split("train")
    make = CropMaker(samples, asked, NUM_CROPS, str(tmp_path))
    made = make({"id": np.arange(NUM_CROPS, 2 * NUM_CROPS)})  # the second epoch
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


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "and a torn one after it"])
def test_epochs_that_are_done_are_not_made_again(data_dir: Path, tmp_path: Path, torn: bool) -> None:
    checkpoints.save(str(tmp_path), b"state", (metrics(0),))
    if torn:
        second = checkpoints.save(str(tmp_path), b"state", (metrics(0), metrics(1)))
        (tmp_path / "checkpoints" / second.state).write_bytes(b"sta")
    samples = open_labelled_set(str(data_dir)).split("train")
    make = CropMaker(samples, config(data_dir), NUM_CROPS, str(tmp_path))
    assert make({"id": np.arange(NUM_CROPS - 3, NUM_CROPS + 2)})["x"].shape == (2, 16, 16, 3)
    assert make({"id": np.arange(5)})["target"].shape == (0, 16, 16)


def test_a_batch_that_cannot_be_shared_out_evenly_is_refused(data_dir: Path, tmp_path: Path) -> None:
    samples = open_labelled_set(str(data_dir)).split("train")
    for num_workers in (4, [1, 2]):
        asked = config(data_dir, cache="stream", num_workers=num_workers)
        with pytest.raises(ConfigError, match="batch_size 6 must be a multiple of num_workers"):
            crop_stream(samples, asked, 10, str(tmp_path))

"""Labelled sets: what belongs together is paired, what does not is refused, and crops repeat."""

import multiprocessing
import os
import pickle
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import torch
from PIL import Image

from jobs.contract import SynthConfig, TrainConfig
from jobs.dataset import (
    CropSampler,
    LabelledImage,
    MappedImages,
    load,
    node_memory_bytes,
    open_labelled_set,
    processes_with_room,
)
from jobs.synth import run as synthesise
from tests.fresh import in_a_fresh_process
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError

MODEL = ModelConfig(level=1, filters=(2, 4))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    synthesise(SynthConfig(out=str(tmp_path / "data"), num=8, size=48, seed=1))
    return tmp_path / "data"


def train_config(data_dir: Path, **fields: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"data": str(data_dir), "output": "runs", "model": MODEL, "crop_px": 16, "batch_size": 4, **fields}
    )


def test_samples_carry_their_split_and_groups(data_dir: Path) -> None:
    labelled = open_labelled_set(str(data_dir))
    assert [sample.id for sample in labelled.samples] == [f"synth-{n:06d}" for n in range(8)]
    assert Counter(sample.groups["modality"] for sample in labelled.samples) == {"fluorescence": 4, "brightfield": 4}
    splits = [labelled.split(name) for name in ("train", "val", "test")]
    assert sum(map(len, splits)) == 8
    assert all(sample.split == "val" for sample in splits[1])


def test_images_and_masks_are_decoded_to_one_size(data_dir: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    for image in images:
        assert image.image_HWC.shape == (48, 48, 3)
        assert image.target_HW.shape == (48, 48)
        with Image.open(image.sample.mask_uri) as mask:
            assert np.array_equal(image.target_HW, (np.asarray(mask) > 0).astype(np.uint8))


def test_a_set_of_many_channels_is_read_by_its_bands(data_dir: Path) -> None:
    rng = np.random.default_rng(4)
    stacks = {}
    for path in sorted((data_dir / "images").iterdir()):
        stacks[path.stem] = rng.integers(0, 65536, (5, 48, 48), np.uint16)
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), stacks[path.stem], photometric="minisblack")
    model = ModelConfig(level=1, filters=(2, 4), in_channels=2, bands=(4, 1))
    images = load(open_labelled_set(str(data_dir)).samples, model)
    for image in images:
        np.testing.assert_array_equal(image.image_HWC, stacks[image.sample.id][[4, 1]].transpose(1, 2, 0))
    crop, _ = CropSampler(images, train_config(data_dir, model=model)).crop(0, 0)
    assert crop.shape == (16, 16, 2)
    with pytest.raises(ConfigError, match=r"has 5 channel\(s\), 0 to 4, and bands asks for 5"):
        load(open_labelled_set(str(data_dir)).samples, model.model_copy(update={"bands": (0, 5)}))


def test_a_set_in_object_storage_is_the_same_set(data_dir: Path, s3_prefix: str) -> None:
    from jobs import storage

    storage.upload_folder(data_dir, s3_prefix)
    local, remote = (load(open_labelled_set(uri).samples, MODEL) for uri in (str(data_dir), s3_prefix))
    assert [image.sample.id for image in local] == [image.sample.id for image in remote]
    assert all(np.array_equal(a.image_HWC, b.image_HWC) for a, b in zip(local, remote, strict=True))


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this node's files of decoded images go; empty."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"unetpp-{os.getuid()}"


def same(some: Sequence[LabelledImage], others: Sequence[LabelledImage]) -> bool:
    return all(
        a.sample == b.sample and np.array_equal(a.image_HWC, b.image_HWC) and np.array_equal(a.target_HW, b.target_HW)
        for a, b in zip(some, others, strict=True)
    )


def test_images_on_disk_are_those_in_memory(data_dir: Path, cache_folder: Path) -> None:
    samples = open_labelled_set(str(data_dir)).samples
    decoded = load(samples, MODEL)
    mapped = load(samples, MODEL, cache="disk")
    assert isinstance(mapped, MappedImages)
    assert same(mapped, decoded)
    assert same(mapped[1::3], decoded[1::3])
    assert same(mapped[1::3][::-1], decoded[1::3][::-1])
    assert same([mapped[-1]], decoded[-1:])
    assert not mapped[0].image_HWC.flags.writeable
    with pytest.raises(IndexError):
        mapped[8]
    crops = [CropSampler(images, train_config(data_dir)).crop(1, 2) for images in (decoded, mapped)]
    assert np.array_equal(crops[0][0], crops[1][0])


def test_a_set_is_decoded_once_and_its_file_found_again(data_dir: Path, cache_folder: Path) -> None:
    samples = open_labelled_set(str(data_dir)).samples
    decoded = load(samples, MODEL)
    first = load(samples, MODEL, cache="disk", fingerprint="f")
    shutil.rmtree(data_dir / "images")  # from here on nothing can be decoded again
    for images in (
        first,
        load(samples, MODEL, cache="disk", fingerprint="f"),
        load(samples, MODEL, cache="auto", fingerprint="f"),
    ):
        assert same(images, decoded)
    sent = pickle.dumps(first)
    assert len(sent) < 20_000
    assert same(pickle.loads(sent), decoded)
    assert len(list(cache_folder.glob("*.arrays"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "other"},
        {"model": MODEL.model_copy(update={"ignore_index": 255})},
        {"model": ModelConfig(level=1, filters=(2, 4), in_channels=1)},
    ],
    ids=str,
)
def test_what_changes_the_arrays_makes_another_file(
    data_dir: Path, cache_folder: Path, change: dict[str, object]
) -> None:
    samples = open_labelled_set(str(data_dir)).samples
    load(samples, MODEL, cache="disk", fingerprint="f")
    load(samples, **{"model": MODEL, "cache": "disk", "fingerprint": "f", **change})  # type: ignore[arg-type]
    assert len(list(cache_folder.glob("*.arrays"))) == 2


def test_a_node_without_the_file_builds_its_own(data_dir: Path, cache_folder: Path) -> None:
    sent = pickle.dumps(load(open_labelled_set(str(data_dir)).samples, MODEL, cache="disk"))
    (built,) = cache_folder.glob("*.arrays")
    content = built.read_bytes()
    built.unlink()
    assert same(pickle.loads(sent), load(open_labelled_set(str(data_dir)).samples, MODEL))
    assert built.read_bytes() == content


def test_auto_takes_the_disk_above_a_quarter_of_the_memory(data_dir: Path, cache_folder: Path) -> None:
    samples = open_labelled_set(str(data_dir)).samples
    decoded = load(samples, MODEL)
    num_bytes = sum(image.image_HWC.nbytes + image.target_HW.nbytes for image in decoded)
    assert num_bytes == 8 * 48 * 48 * (3 + 1)
    assert node_memory_bytes() > 1e9
    assert isinstance(load(samples, MODEL, cache="auto", memory_bytes=4 * num_bytes), list)
    images = load(samples, MODEL, cache="auto", memory_bytes=4 * num_bytes - 4)
    assert isinstance(images, MappedImages)
    assert same(images, decoded)


def test_bad_labels_are_named_whatever_the_cache_and_leave_no_file(data_dir: Path, cache_folder: Path) -> None:
    damage_mask_size(data_dir)
    samples = open_labelled_set(str(data_dir)).samples
    for cache in ("memory", "disk"):
        with pytest.raises(ConfigError, match="48 x 40 pixels"):
            load(samples, MODEL, cache=cache)  # type: ignore[arg-type]
    assert list(cache_folder.glob("*.arrays")) == list(cache_folder.glob("*.part")) == []


def test_without_splits_a_part_of_the_images_becomes_val(data_dir: Path) -> None:
    (data_dir / "splits.csv").unlink()
    for n in range(60):
        for folder in ("images", "masks"):
            shutil.copy(data_dir / folder / "synth-000000.png", data_dir / folder / f"copy-{n}.png")
    labelled = open_labelled_set(str(data_dir))
    counts = Counter(sample.split for sample in labelled.samples)
    assert set(counts) == {"train", "val"}
    assert 4 <= counts["val"] <= 28
    assert labelled == open_labelled_set(str(data_dir))


def test_the_fingerprint_follows_the_labelled_files_alone(data_dir: Path) -> None:
    before = open_labelled_set(str(data_dir)).fingerprint
    (data_dir / "notes.txt").write_text("nothing to train on")
    assert open_labelled_set(str(data_dir)).fingerprint == before
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(data_dir / "masks" / "synth-000003.png")
    assert open_labelled_set(str(data_dir)).fingerprint != before


def damage_mask_size(data_dir: Path) -> None:
    Image.fromarray(np.zeros((48, 40), np.uint8)).save(data_dir / "masks" / "synth-000002.png")


def damage_image(data_dir: Path) -> None:
    path = data_dir / "images" / "synth-000002.png"
    path.write_bytes(path.read_bytes()[:200])


def drop_mask(data_dir: Path) -> None:
    (data_dir / "masks" / "synth-000002.png").unlink()


def drop_row(data_dir: Path) -> None:
    path = data_dir / "splits.csv"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "000002" not in line))


def blank_split(data_dir: Path) -> None:
    path = data_dir / "splits.csv"
    path.write_text(re.sub("(?<=synth-000002,)[a-z]+", "", path.read_text()))


def drop_image(data_dir: Path) -> None:
    (data_dir / "images" / "synth-000002.png").unlink()


def drop_all_images(data_dir: Path) -> None:
    shutil.rmtree(data_dir / "images")


def rename_split_column(data_dir: Path) -> None:
    path = data_dir / "splits.csv"
    path.write_text(path.read_text().replace("id,split", "id,part"))


def same_id_twice(data_dir: Path) -> None:
    shutil.copy(data_dir / "images" / "synth-000002.png", data_dir / "images" / "synth-000002.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_mask_size, r"mask .*000002.png is 48 x 40 pixels, its image .* is 48 x 48"),
        (damage_image, r"images/synth-000002.png cannot be used"),
        (drop_mask, r"1 image\(s\) have no mask in masks/, the first is 'synth-000002'"),
        (drop_row, r"1 image\(s\) have no 'split' in splits.csv, the first is 'synth-000002'"),
        (blank_split, r"1 image\(s\) have no 'split' in splits.csv, the first is 'synth-000002'"),
        (drop_image, r"splits.csv names 1 id\(s\) without an image, the first is 'synth-000002'"),
        (drop_all_images, "holds no images/"),
        (rename_split_column, "splits.csv has columns id, part, modality; wanted at least id and split"),
        (same_id_twice, "have the same id 'synth-000002'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data_dir: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    damage(data_dir)
    with pytest.raises(ConfigError, match=message):
        load(open_labelled_set(str(data_dir)).samples, MODEL)


def test_a_class_that_the_model_lacks_is_refused(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"masks/.* mask ids must be 0 to 2, this mask has 255"):
        load(open_labelled_set(str(data_dir)).samples, ModelConfig(level=1, filters=(2, 4), num_classes=3))


def test_an_unknown_split_names_those_there_are(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no image in split 'vla'; its splits are test, train, val"):
        open_labelled_set(str(data_dir)).split("vla")


def test_workers_share_a_batch_and_crops_repeat(data_dir: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    sampler = CropSampler(images, train_config(data_dir))
    whole = list(sampler.batches(epoch=3, num_steps=2, rank=0, world_size=1))
    parts = [list(sampler.batches(epoch=3, num_steps=2, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [tuple(x.shape) for x, _ in whole] == [(4, 3, 16, 16)] * 2
    for step, (x, target) in enumerate(whole):
        for rank, part in enumerate(parts):
            assert (part[step][0] == x[rank::2]).all()
            assert (part[step][1] == target[rank::2]).all()
    assert not (next(iter(sampler.batches(4, 1, 0, 1)))[0] == whole[0][0]).all()


def processes_make_the_crops_that_a_thread_makes(data_dir: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    sampler = CropSampler(images, train_config(data_dir, foreground=0.5, augment={"elastic_px": 4}))
    for rank in (0, 1):
        by_a_thread, by_processes = (list(sampler.batches(3, 5, rank, 2, number)) for number in (0, 2))
        assert len(by_processes) == 5
        for (x, target), (same_x, same_target) in zip(by_a_thread, by_processes, strict=True):
            assert same_x.stride() == x.stride()
            assert torch.equal(same_x, x)
            assert torch.equal(same_target, target)


def processes_make_crops_where_asked_for_and_end_with_the_epoch(
    data_dir: Path, num_processes: int, num_steps: int = 1000
) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    batches = CropSampler(images, train_config(data_dir)).batches(0, num_steps, 0, 1, num_processes)
    next(batches)
    assert len(multiprocessing.active_children()) == min(num_processes, num_steps)
    batches.close()
    assert not multiprocessing.active_children()


def processes_end_with_one_that_is_killed(data_dir: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    batches = CropSampler(images, train_config(data_dir)).batches(0, 1000, 0, 1, 2)
    told, tell = multiprocessing.Pipe(duplex=False)

    def train() -> None:
        next(batches)
        tell.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(600)

    worker = multiprocessing.get_context("fork").Process(target=train)
    worker.start()
    children = [psutil.Process(pid) for pid in told.recv()]
    worker.kill()
    assert len(children) == 2
    assert not psutil.wait_procs(children, timeout=60)[1], "they look every 5 s whether it is there"


@pytest.mark.parametrize(
    ("work", "args"),
    [
        (processes_make_the_crops_that_a_thread_makes, ()),
        (processes_make_crops_where_asked_for_and_end_with_the_epoch, (0,)),
        (processes_make_crops_where_asked_for_and_end_with_the_epoch, (2,)),
        (processes_make_crops_where_asked_for_and_end_with_the_epoch, (3, 2)),
        (processes_end_with_one_that_is_killed, ()),
    ],
)
def test_processes_make_crops(data_dir: Path, work: Callable[..., None], args: tuple[int, ...]) -> None:
    in_a_fresh_process(work, data_dir, *args)


def test_no_more_processes_make_crops_than_shared_memory_has_room_for(data_dir: Path) -> None:
    asked = train_config(data_dir)
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    whole, half = (next(CropSampler(images, asked).batches(0, 1, 0, number)) for number in (1, 2))
    batch_bytes, half_bytes = (sum(part.nbytes for part in batch) for batch in (whole, half))
    assert processes_with_room(asked, 1, 1, free_bytes=6 * batch_bytes) == 3
    assert processes_with_room(asked, 1, 1, free_bytes=2 * batch_bytes - 1) == 0
    assert processes_with_room(asked, 2, 1, free_bytes=6 * half_bytes) == 3
    assert processes_with_room(asked, 2, 2, free_bytes=6 * batch_bytes) == 3
    assert processes_with_room(asked.model_copy(update={"batch_size": 10**9}), 1, 1) == 0


def test_groups_are_drawn_by_their_weights(data_dir: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    weights = {"fluorescence": 0.9, "brightfield": 0.1}
    sampler = CropSampler(images, train_config(data_dir, balance_by="modality", group_weights=weights))
    edges = np.concatenate([[0], sampler._cumulative])
    shares = dict.fromkeys(weights, 0.0)
    for image, share in zip(images, np.diff(edges), strict=True):
        shares[image.sample.groups["modality"]] += share
    assert shares == pytest.approx(weights)
    del images[0].sample.groups["modality"]  # as of an entry of a COCO file
    with pytest.raises(
        ConfigError, match=r"the training images have modality \['brightfield', 'fluorescence', 'none'\]"
    ):
        CropSampler(images, train_config(data_dir, balance_by="modality", group_weights=weights))


def test_fields_of_a_group_are_drawn_equally_and_images_of_a_field_share_it(data_dir: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    for number, image in enumerate(images):
        image.sample.groups.update(modality="ab"[number > 2], field="xxyz"[min(number, 3)])
    asked = {"balance_by": "modality", "group_weights": {"a": 0.8, "b": 0.2}, "balance_within": "field"}
    shares = np.diff([0, *CropSampler(images, train_config(data_dir, **asked))._cumulative])
    assert shares == pytest.approx([0.2, 0.2, 0.4] + [0.2 / (len(images) - 3)] * (len(images) - 3))


def disk_at(data_dir: Path, y: int, x: int) -> None:
    """Every mask of the set becomes one small disk, every image shows it."""
    rows, columns = np.mgrid[:48, :48]
    mask = np.where(np.hypot(rows - y, columns - x) < 3, np.uint8(255), np.uint8(0))
    for path in data_dir.glob("*/*.png"):
        Image.fromarray(mask).save(path)


@pytest.mark.parametrize("changes", [{"scale": (1, 1)}, {"rotate_degrees": 180, "elastic_px": 4}])
def test_a_share_of_the_crops_lies_around_foreground(data_dir: Path, changes: dict[str, object]) -> None:
    disk_at(data_dir, 40, 44)
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    seen = {}
    for share in (0.0, 0.5, 1.0):
        sampler = CropSampler(images, train_config(data_dir, foreground=share, augment=changes))
        targets = [sampler.crop(epoch, number)[1] for epoch in range(3) for number in range(50)]
        seen[share] = np.mean([target.any() for target in targets])
        again = CropSampler(images, train_config(data_dir, foreground=share, augment=changes))
        assert np.array_equal(again.crop(2, 49)[1], targets[-1])
    assert seen[0.0] < 0.3
    assert 0.45 < seen[0.5] < 0.75
    assert seen[1.0] == 1


def test_an_image_without_foreground_gives_crops_from_anywhere(data_dir: Path) -> None:
    disk_at(data_dir, 1000, 1000)
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    sampler = CropSampler(images, train_config(data_dir, foreground=1.0))
    assert [sampler.crop(0, number)[1].any() for number in range(5)] == [False] * 5


def test_a_crop_holds_the_values_that_prediction_sees(data_dir: Path) -> None:
    images = load(open_labelled_set(str(data_dir)).samples[:1], MODEL)
    still = {"flip": False, "rotate90": False, "scale": (1, 1), "gamma": (1, 1), "brightness": (1, 1)}
    still |= {"noise_std": 0, "blur_sigma": 0, "channel_jitter": 0}
    model = {**MODEL.model_dump(), "gamma": 0.5}
    sampler = CropSampler(images, train_config(data_dir, model=model, crop_px=48, augment=still))
    crop, target = sampler.crop(0, 0)
    np.testing.assert_allclose(crop, np.sqrt(images[0].image_HWC / 255), atol=1e-6)
    assert np.array_equal(target, images[0].target_HW)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balance_by": "stain"}, "balance_by is 'stain'; the set has the columns modality: name one"),
        ({"balance_within": "field"}, "balance_within is 'field'; the set has the columns modality: name one"),
        ({"balance_by": "modality", "group_weights": {"fluorescence": 1.0}}, "group_weights names"),
    ],
)
def test_groups_that_are_not_there_are_refused(data_dir: Path, fields: dict[str, object], message: str) -> None:
    images = load(open_labelled_set(str(data_dir)).samples, MODEL)
    with pytest.raises(ConfigError, match=message):
        CropSampler(images, train_config(data_dir, **fields))

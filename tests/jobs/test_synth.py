"""The synth job: a labelled set with splits, the same bytes every time."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jobs import synth
from jobs.contract import SynthConfig
from jobs.dataset import load, open_labelled_set
from unetpp.config import ModelConfig, SynthKind
from unetpp.errors import ConfigError
from unetpp.images import decode_image, decode_mask
from unetpp.synth import MODALITIES, NUM_CLASSES, synthesize

NUCLEI = MODALITIES["nuclei"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "splits.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def synthetic_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth")
    result = synth.run(SynthConfig(out=str(folder), num=40, size=32))
    assert result.num_images == 40
    assert result.data_uri == str(folder)
    return folder


def test_every_row_has_an_image_and_its_mask(synthetic_dir: Path) -> None:
    rows = rows_of(synthetic_dir)
    names = {f"{row['id']}.png" for row in rows}
    assert len(names) == 40
    for part in ("images", "masks"):
        assert {path.name for path in (synthetic_dir / part).iterdir()} == names


def test_files_hold_what_was_drawn(synthetic_dir: Path) -> None:
    for index, row in enumerate(rows_of(synthetic_dir)[:6]):
        assert row["modality"] == NUCLEI[index % 2]
        image, mask = synthesize(index, size=32, modality=NUCLEI[index % 2])
        np.testing.assert_array_equal(decode_image((synthetic_dir / "images" / f"{row['id']}.png").read_bytes()), image)
        mask_png = (synthetic_dir / "masks" / f"{row['id']}.png").read_bytes()
        np.testing.assert_array_equal(decode_mask(mask_png), mask)
        assert set(np.unique(decode_image(mask_png))) <= {0, 255}


def test_each_modality_is_split_70_15_15(synthetic_dir: Path) -> None:
    counts = Counter((row["modality"], row["split"]) for row in rows_of(synthetic_dir))
    for modality in NUCLEI:
        assert {split: counts[modality, split] for split in ("train", "val", "test")} == {
            "train": 14,
            "val": 3,
            "test": 3,
        }


@pytest.mark.parametrize("kind", ["cells", "camera16"])
def test_sets_of_other_kinds_hold_what_was_drawn(kind: SynthKind, tmp_path: Path) -> None:
    synth.run(SynthConfig(out=str(tmp_path), num=20, size=32, kind=kind, seed=2))
    rows, (modality,) = rows_of(tmp_path), MODALITIES[kind]
    assert Counter((row["modality"], row["split"]) for row in rows) == {
        (modality, "train"): 14,
        (modality, "val"): 3,
        (modality, "test"): 3,
    }
    model = ModelConfig(in_channels=1 if kind == "camera16" else 3, num_classes=NUM_CLASSES[kind])
    for index, labelled in enumerate(load(open_labelled_set(str(tmp_path)).samples, model)):
        image, mask = synthesize(index, size=32, modality=modality, seed=2)
        np.testing.assert_array_equal(labelled.image_HWC, image)
        np.testing.assert_array_equal(labelled.target_HW, mask)


def test_a_second_run_writes_nothing(synthetic_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in synthetic_dir.rglob("*.*")}
    synth.run(SynthConfig(out=str(synthetic_dir), num=40, size=32))
    assert {path: path.stat().st_mtime_ns for path in synthetic_dir.rglob("*.*")} == before


def test_a_smaller_set_is_the_start_of_a_larger_one(synthetic_dir: Path, tmp_path: Path) -> None:
    synth.run(SynthConfig(out=str(tmp_path), num=8, size=32))
    small, large = files_of(tmp_path), files_of(synthetic_dir)
    assert large.pop("splits.csv").startswith(small.pop("splits.csv"))
    assert small.items() <= large.items()
    assert {row["split"] for row in rows_of(tmp_path)} == {"train", "val", "test"}


def test_an_interrupted_set_is_completed(synthetic_dir: Path, tmp_path: Path) -> None:
    synth.run(SynthConfig(out=str(tmp_path), num=40, size=32))
    (tmp_path / "splits.csv").unlink()
    (tmp_path / "masks" / "synth-000003.png").write_bytes(b"half a fi")
    synth.run(SynthConfig(out=str(tmp_path), num=40, size=32))
    assert files_of(tmp_path) == files_of(synthetic_dir)


def test_another_seed_is_another_set(synthetic_dir: Path, tmp_path: Path) -> None:
    synth.run(SynthConfig(out=str(tmp_path), num=2, size=32, seed=1))
    for name, content in files_of(tmp_path).items():
        assert content != files_of(synthetic_dir)[name]


def test_a_folder_with_other_images_is_refused(synthetic_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds images/synth-0000.*choose another folder"):
        synth.run(SynthConfig(out=str(synthetic_dir), num=39, size=32))

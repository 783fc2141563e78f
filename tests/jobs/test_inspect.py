"""Inspecting a labelled set: every planted fault is found and named, and where there is none nothing is said."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from scipy import ndimage

from jobs.cli import run_command_line
from jobs.contract import ExitCode, Finding, InspectConfig, InspectResult, SynthConfig
from jobs.inspect import run
from jobs.neighbours import borders_of, find_neighbours
from jobs.summary import show
from jobs.synth import run as synthesise
from unetpp.errors import ConfigError
from unetpp.images import decode_image, encode_image, encode_mask

NUM_IMAGES = 16
FIRST = "synth-000000"  # of split train


@pytest.fixture(scope="module")
def clean_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    synthesise(SynthConfig(out=str(folder), num=NUM_IMAGES, size=160, seed=4))
    return folder


@pytest.fixture
def data_dir(clean_dir: Path, tmp_path: Path) -> Path:
    """A clean set to plant a fault in: 16 images of 160 pixels, in train, val and test."""
    return Path(shutil.copytree(clean_dir, tmp_path / "data"))


def inspect(data_dir: Path | str, **fields: object) -> InspectResult:
    return run(InspectConfig.model_validate({"data": str(data_dir), **fields}))


def ids_of(data_dir: Path, split: str) -> list[str]:
    rows = csv.DictReader(io.StringIO((data_dir / "splits.csv").read_text()))
    return [row["id"] for row in rows if row["split"] == split]


def image_of(data_dir: Path, id_: str) -> NDArray[np.uint8]:
    return decode_image((data_dir / "images" / f"{id_}.png").read_bytes())


def write_image(data_dir: Path, id_: str, image_HWC: NDArray[np.generic]) -> None:
    (data_dir / "images" / f"{id_}.png").write_bytes(encode_image(np.ascontiguousarray(image_HWC)))


def write_mask(data_dir: Path, id_: str, mask_HW: NDArray[np.uint8], num_classes: int = 1) -> None:
    (data_dir / "masks" / f"{id_}.png").write_bytes(encode_mask(np.ascontiguousarray(mask_HW), num_classes))


def add_group(data_dir: Path, groups: Callable[[int], str]) -> None:
    header, *rows = (data_dir / "splits.csv").read_text().splitlines()
    lines = [header + ",group", *(f"{row},{groups(number)}" for number, row in enumerate(rows))]
    (data_dir / "splits.csv").write_text("\n".join(lines))


def test_a_clean_set_is_silent(clean_dir: Path) -> None:
    result = inspect(clean_dir)
    assert result.findings == ()
    assert result.exit_code == ExitCode.DONE
    assert result.num_images == NUM_IMAGES
    assert sum(row.num_images for row in result.groups) == NUM_IMAGES
    for row in result.groups:
        assert (row.sizes, row.pixel_types) == ("160 x 160", "uint8 x 3")
        assert row.low is not None
        assert row.mean is not None
        assert row.high is not None
        assert 0 <= row.low < row.mean < row.high <= 255


def test_the_values_of_a_group_are_those_of_its_pixels(clean_dir: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((clean_dir / "splits.csv").read_text())))
    for seen in inspect(clean_dir).groups:
        ids = [row["id"] for row in rows if (row["split"], row["modality"]) == (seen.split, seen.group)]
        pixels = np.stack([image_of(clean_dir, id_) for id_ in ids])
        masks = np.stack([np.asarray(Image.open(clean_dir / "masks" / f"{id_}.png")) for id_ in ids])
        assert (seen.num_images, seen.low, seen.high) == (len(ids), pixels.min(), pixels.max())
        assert seen.mean == pytest.approx(pixels.mean())
        assert seen.foreground == pytest.approx((masks > 0).mean())


# ------------------------------------------------------------------------------------------- planted faults


def unpaired_image(data_dir: Path) -> str:
    (data_dir / "masks" / f"{FIRST}.png").unlink()
    return FIRST


def unpaired_mask(data_dir: Path) -> str:
    write_mask(data_dir, "lonely", np.zeros((160, 160), np.uint8))
    return "lonely"


def image_without_row(data_dir: Path) -> str:
    path = data_dir / "splits.csv"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if FIRST not in line))
    return FIRST


def size_mismatch(data_dir: Path) -> str:
    write_mask(data_dir, FIRST, np.eye(160, 150, dtype=np.uint8))
    return FIRST


def odd_value(data_dir: Path) -> str:
    mask_HW = np.zeros((160, 160), np.uint8)
    mask_HW[5:20, 5:20], mask_HW[30, 30] = 255, 7
    Image.fromarray(mask_HW).save(data_dir / "masks" / f"{FIRST}.png")
    return FIRST


def empty_mask(data_dir: Path) -> str:
    write_mask(data_dir, FIRST, np.zeros((160, 160), np.uint8))
    return FIRST


def unlabelled_mask(data_dir: Path) -> str:
    write_mask(data_dir, FIRST, np.ones((160, 160), np.uint8))
    return FIRST


def full_mask(data_dir: Path) -> str:
    write_mask(data_dir, FIRST, np.ones((160, 160), np.uint8))
    return FIRST


def duplicate_across_splits(data_dir: Path) -> str:
    """The same pixels in another file format."""
    test = ids_of(data_dir, "test")[0]
    (data_dir / "images" / f"{test}.png").unlink()
    Image.fromarray(image_of(data_dir, FIRST)).save(data_dir / "images" / f"{test}.tif")
    return f"{FIRST} + {test}"


def duplicate_in_split(data_dir: Path) -> str:
    second = ids_of(data_dir, "train")[1]
    shutil.copy(data_dir / "images" / f"{FIRST}.png", data_dir / "images" / f"{second}.png")
    return f"{FIRST} + {second}"


def group_across_splits(data_dir: Path) -> str:
    add_group(data_dir, lambda number: f"patient {number // 4}")
    return "patient 0"


def neighbours_across_splits(data_dir: Path) -> str:
    """Two halves of one field, one above the other, in train and test."""
    rng = np.random.default_rng(0)
    field_HWC = ndimage.gaussian_filter(rng.normal(size=(320, 160, 3)), (5, 5, 0))
    field_HWC = np.rint(128 + 60 * field_HWC / field_HWC.std()).clip(0, 255).astype(np.uint8)
    test = ids_of(data_dir, "test")[0]
    for id_, y in ((FIRST, 0), (test, 160)):
        write_image(data_dir, id_, field_HWC[y : y + 160])
    return f"{FIRST} + {test}"


def undecodable_image(data_dir: Path) -> str:
    path = data_dir / "images" / f"{FIRST}.png"
    path.write_bytes(path.read_bytes()[:500])
    return FIRST


def undecodable_mask(data_dir: Path) -> str:
    (data_dir / "masks" / f"{FIRST}.png").write_bytes(b"no image")
    return FIRST


def narrow_range(data_dir: Path) -> str:
    """16 bits of which the image uses 2 %."""
    image_HWC = image_of(data_dir, FIRST).astype(np.uint16)
    write_image(data_dir, FIRST, (image_HWC * (0.02 * 65535 / 255)).astype(np.uint16))
    return FIRST


def beyond_range(data_dir: Path) -> str:
    """Floating point values of 0 to 255, where 0 to 1 is expected."""
    (data_dir / "images" / f"{FIRST}.png").unlink()
    grey_HW = image_of(data_dir, ids_of(data_dir, "train")[1])[..., 0].astype(np.float32)
    Image.fromarray(grey_HW).save(data_dir / "images" / f"{FIRST}.tif")
    return FIRST


@pytest.mark.parametrize(
    ("plant", "code", "exit_code"),
    [
        (unpaired_image, "image_without_mask", 10),
        (unpaired_mask, "mask_without_image", 3),
        (image_without_row, "image_without_row", 10),
        (size_mismatch, "size_mismatch", 10),
        (odd_value, "odd_values", 3),
        (empty_mask, "empty_mask", 0),
        (unlabelled_mask, "unlabelled_mask", 10),
        (full_mask, "full_mask", 3),
        (duplicate_across_splits, "duplicate_across_splits", 3),
        (duplicate_in_split, "duplicate_in_split", 0),
        (group_across_splits, "group_across_splits", 3),
        (neighbours_across_splits, "neighbours_across_splits", 3),
        (undecodable_image, "undecodable_image", 10),
        (undecodable_mask, "undecodable_mask", 10),
        (narrow_range, "narrow_range", 3),
        (beyond_range, "beyond_range", 3),
    ],
)
def test_a_planted_fault_is_found_and_named(
    data_dir: Path, tmp_path: Path, plant: Callable[[Path], str], code: str, exit_code: int
) -> None:
    concerned = plant(data_dir)
    ignored = {"ignore_index": 255} if plant is unlabelled_mask else {}
    result = inspect(data_dir, output=str(tmp_path / "out"), **ignored)
    by_code: dict[str, Finding] = {finding.code: finding for finding in result.findings}
    may_come_along = {"mixed_pixel_types"} if plant in (narrow_range, beyond_range) else set()
    if ignored:  # the foreground of the others is 255
        may_come_along = {"empty_mask"}
    assert set(by_code) - may_come_along == {code}
    assert by_code[code].ids[0] == concerned
    assert by_code[code].advice
    assert result.exit_code == exit_code
    written = InspectResult.model_validate(json.loads((tmp_path / "out" / "inspect.json").read_text()))
    assert written == result
    if plant not in (unpaired_image, unpaired_mask, image_without_row, group_across_splits):
        rows = csv.DictReader(io.StringIO((tmp_path / "out" / "images.csv").read_text()))
        marked = {row["id"] for row in rows if code in row["findings"].split()}
        assert marked == set(concerned.split(" + "))


def test_a_value_that_is_no_class_is_found(data_dir: Path) -> None:
    for id_ in (path.stem for path in sorted((data_dir / "masks").iterdir())):
        mask_HW = (np.asarray(Image.open(data_dir / "masks" / f"{id_}.png")) > 0).astype(np.uint8)
        mask_HW[:20, :20] = 2
        write_mask(data_dir, id_, mask_HW, num_classes=3)
    assert inspect(data_dir, num_classes=3).findings == ()
    odd_value(data_dir)
    (finding,) = inspect(data_dir, num_classes=3).findings
    assert (finding.code, finding.severity, finding.ids) == ("wrong_class", "error", (FIRST,))
    assert "mask ids must be 0 to 2, this mask has 255" in finding.what
    pixels = np.pad(np.full((100, 100), 255, np.uint8), 30)
    Image.fromarray(pixels).save(data_dir / "masks" / f"{FIRST}.png")
    (finding,) = inspect(data_dir, num_classes=3, ignore_index=255).findings
    assert finding.code == "empty_mask"


def test_a_value_range_that_fits_is_silent(data_dir: Path) -> None:
    narrow_range(data_dir)
    found = inspect(data_dir, value_range={"uint16": [0, 1400]}).findings
    assert {finding.code for finding in found} == {"mixed_pixel_types"}


def test_a_split_that_is_left_out_is_not_compared(data_dir: Path) -> None:
    for plant in (neighbours_across_splits, group_across_splits):
        plant(data_dir)
    test = ids_of(data_dir, "test")[0]
    shutil.copy(data_dir / "images" / f"{test}.png", data_dir / "images" / f"{ids_of(data_dir, 'train')[1]}.png")
    assert {"neighbours_across_splits", "group_across_splits", "duplicate_across_splits"} <= {
        finding.code for finding in inspect(data_dir).findings
    }
    found = inspect(data_dir, leave_out=["test", "val"]).findings
    assert {finding.code for finding in found} <= {"duplicate_in_split"}


def test_every_form_of_a_set_is_inspected(data_dir: Path, tmp_path: Path) -> None:
    size_mismatch(data_dir)
    rows = list(csv.DictReader(io.StringIO((data_dir / "splits.csv").read_text())))
    folders = [
        {row["id"]: (data_dir / name / f"{row['id']}.png").read_bytes() for row in rows} for name in ("images", "masks")
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns |= {"image": list(folders[0].values()), "mask": list(folders[1].values())}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    assert inspect(tmp_path / "set.parquet").findings == inspect(data_dir).findings
    assert inspect(tmp_path / "set.parquet").groups == inspect(data_dir).groups

    (tmp_path / "coco").mkdir()
    shutil.copytree(data_dir / "images", tmp_path / "coco" / "images")
    square = [[10, 10, 60, 10, 60, 60, 10, 60]]
    content = {
        "images": [
            {"id": n, "file_name": f"{row['id']}.png", "height": 160, "width": 160, "split": row["split"]}
            | ({"modality": row["modality"]} if n else {})
            for n, row in enumerate(rows)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "segmentation": square if n else [[1, 2]]}
            for n in range(len(rows))
        ],
        "categories": [{"id": 1, "name": "square"}],
    }
    (tmp_path / "coco" / "annotations.json").write_text(json.dumps(content))
    result = inspect(tmp_path / "coco", output=str(tmp_path / "out"))
    (finding,) = result.findings
    assert (finding.code, finding.ids) == ("undecodable_mask", (FIRST,))
    assert {row.group for row in result.groups} == {"none", "fluorescence", "brightfield"}


def test_the_contact_sheet_shows_images_with_their_outlines(data_dir: Path, tmp_path: Path) -> None:
    undecodable_image(data_dir)
    inspect(data_dir, output=str(tmp_path / "out"))
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert (sheet.width, sheet.height) == (6 * 248 + 8, 3 * 278 + 8)
    assert (pixels == (255, 214, 0)).all(axis=2).sum() > 1000


def test_neighbours_are_found_on_every_side_and_only_beside_each_other() -> None:
    """Nine crops of one field, in no order, among as many of another field."""
    rng = np.random.default_rng(1)
    fields = ndimage.gaussian_filter(rng.normal(size=(2, 360, 360, 1)), (0, 6, 6, 0))
    fields = np.rint(1000 + 200 * fields / fields.std() + rng.normal(size=fields.shape)).astype(np.uint16)
    places = [(field, y, x) for field in range(2) for y in (0, 1, 2) for x in (0, 1, 2)]
    order = [places[position] for position in rng.permutation(18)]
    crops = [fields[field][120 * y : 120 * y + 120, 120 * x : 120 * x + 120] for field, y, x in order]
    found = {(order[one], order[other]) for one, other in find_neighbours([borders_of(crop) for crop in crops])}
    beside = {((f, y, x), (f, y, x + 1)) for f, y, x in places if x < 2}
    above = {((f, y, x), (f, y + 1, x)) for f, y, x in places if y < 2}
    assert found == beside | above


def test_images_of_one_colour_and_small_ones_are_no_neighbours() -> None:
    flat, noise = (
        np.full((120, 120, 3), 7, np.uint8),
        np.random.default_rng(2).integers(0, 9, (2, 120, 120, 3), np.uint8),
    )
    assert list(find_neighbours([borders_of(image) for image in (flat, flat, *noise)])) == []
    assert borders_of(flat[:80]) is None


def test_nothing_to_look_at_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no labelled data set"):
        inspect(tmp_path)


def test_the_command_ends_with_the_exit_code_and_says_what_to_do(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(None, ["inspect", str(data_dir)]) == ExitCode.DONE
    assert f"inspected  {NUM_IMAGES} images of {data_dir}: nothing wrong found" in capsys.readouterr().out
    undecodable_image(data_dir)
    unpaired_mask(data_dir)
    assert run_command_line("inspect", ["--data", str(data_dir)]) == ExitCode.CONFIG
    told = capsys.readouterr().out
    assert "error undecodable_image" in told
    assert "warning mask_without_image" in told
    assert "do  replace them, or take them out" in told
    assert "1 error(s), 1 warning(s)" in told


def test_a_summary_needs_no_image_that_can_be_decoded(data_dir: Path) -> None:
    for path in (data_dir / "images").iterdir():
        path.write_bytes(b"no image")
    output = io.StringIO()
    show(inspect(data_dir), Console(file=output, width=100))
    assert f"  {NUM_IMAGES}  images that cannot be decoded" in output.getvalue()


# --------------------------------------------------------------------------------------------- real images


@pytest.mark.parametrize(("column", "is_warned"), [("split", False), ("split_random", True)])
def test_crops_of_one_field_in_two_splits_are_found_in_real_images(
    shared_dir: Path, column: str, is_warned: bool
) -> None:
    result = inspect(shared_dir / "data" / "dsb2018", split_column=column)
    codes = {finding.code for finding in result.findings}
    assert codes == ({"neighbours_across_splits", "group_across_splits"} if is_warned else set())
    assert result.exit_code == (ExitCode.DONE_WITH_FAILED_IMAGES if is_warned else ExitCode.DONE)
    if is_warned:
        (finding,) = [finding for finding in result.findings if finding.code == "neighbours_across_splits"]
        assert "92 of test with" in finding.what  # 104 share a field with a training image

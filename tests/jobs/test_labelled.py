"""The forms of a labelled set: each gives the same samples and pixels, and says by name what does not fit."""

import csv
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from jobs import storage
from jobs.coco import Annotations, Entry, Shape
from jobs.coco_shapes import draw_shapes
from jobs.contract import SynthConfig
from jobs.dataset import load, open_labelled_set
from jobs.labelled import find_set
from jobs.synth import run as synthesise
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError
from unetpp.images import encode_mask

BINARY = ModelConfig(level=1, filters=(2, 4))
THREE = ModelConfig(level=1, filters=(2, 4), num_classes=3)

Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 8 images of 48 pixels with the columns split and modality."""
    data_dir = tmp_path_factory.mktemp("folder")
    synthesise(SynthConfig(out=str(data_dir), num=8, size=48, seed=1))
    return data_dir


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "splits.csv").read_text())))


def mask_of(folder: Path, id_: str) -> NDArray[np.uint8]:
    with Image.open(folder / "masks" / f"{id_}.png") as mask:
        return (np.asarray(mask) > 0).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- COCO


def plain(inside_HW: NDArray[np.bool_]) -> Json:
    """Uncompressed run lengths, made pixel by pixel."""
    counts, value = [0], False
    for pixel in inside_HW.T.ravel():
        if pixel != value:
            counts.append(0)
            value = not value
        counts[-1] += 1
    return {"size": list(inside_HW.shape), "counts": counts}


def compressed(inside_HW: NDArray[np.bool_]) -> Json:
    """COCO's text form, by its own library."""
    encoded = coco_mask.encode(np.asfortranarray(inside_HW.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def box(x0: int, y0: int, x1: int, y1: int) -> list[list[int]]:
    """A polygon around the pixels x0 <= x < x1, y0 <= y < y1."""
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def write_coco(place: Path, folder: Path, encode: Callable[[NDArray[np.bool_]], Json], split_in_json: bool) -> Json:
    """The set of `folder` as COCO: a shape for every connected part of a mask."""
    content: Json = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "nucleus"}]}
    for number, row in enumerate(rows_of(folder)):
        storage.write_bytes(
            place / "images" / f"{row['id']}.png", (folder / "images" / f"{row['id']}.png").read_bytes()
        )
        entry = {"id": number, "file_name": f"{row['id']}.png", "height": 48, "width": 48, "license": 1}
        content["images"].append(
            entry | ({"split": row["split"], "modality": row["modality"]} if split_in_json else {})
        )
        parts, num_parts = ndimage.label(mask_of(folder, row["id"]))
        for part in range(1, num_parts + 1):
            shape = {"id": len(content["annotations"]), "image_id": number, "category_id": 7, "iscrowd": 0}
            content["annotations"].append({**shape, "segmentation": encode(parts == part)})
    if not split_in_json:
        (place / "splits.csv").write_bytes((folder / "splits.csv").read_bytes())
    (place / "annotations.json").write_text(json.dumps(content))
    return content


def drawn(tmp_path: Path, shapes: list[Json], model: ModelConfig) -> NDArray[np.uint8]:
    """The target of one image of 20 x 30 pixels with these shapes, of the categories 5 and 9."""
    storage.write_bytes(tmp_path / "images" / "one.png", encode_mask(np.zeros((20, 30), np.uint8)))
    content = {
        "images": [{"id": "a", "file_name": "one.png", "height": 20, "width": 30, "split": "train"}],
        "annotations": [{"id": number, "image_id": "a", **shape} for number, shape in enumerate(shapes)],
        "categories": [{"id": 9, "name": "cell"}, {"id": 5, "name": "nucleus"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    (image,) = load(open_labelled_set(str(tmp_path)).samples, model)
    return image.target_HW


@pytest.mark.parametrize("encode", [plain, compressed], ids=["plain", "compressed"])
@pytest.mark.parametrize("split_in_json", [True, False], ids=["split in the json", "splits.csv"])
def test_a_coco_set_is_the_same_set_as_its_masks(
    folder: Path, tmp_path: Path, encode: Callable[[NDArray[np.bool_]], Json], split_in_json: bool
) -> None:
    write_coco(tmp_path, folder, encode, split_in_json)
    expected = open_labelled_set(str(folder)).samples
    for uri in (str(tmp_path), str(tmp_path / "annotations.json")):
        samples = open_labelled_set(uri).samples
        assert [(s.id, s.split, s.groups) for s in samples] == [(s.id, s.split, s.groups) for s in expected]
        for image in load(samples, BINARY):
            np.testing.assert_array_equal(image.target_HW, mask_of(folder, image.sample.id))


def test_polygons_cover_the_pixels_inside(tmp_path: Path) -> None:
    target_HW = drawn(tmp_path, [{"category_id": 5, "segmentation": box(3, 2, 10, 8) + box(20, 15, 30, 20)}], BINARY)
    expected = np.zeros((20, 30), np.uint8)
    expected[2:8, 3:10] = expected[15:20, 20:30] = 1
    np.testing.assert_array_equal(target_HW, expected)


def drawn_alone(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """The target of an image with one shape."""
    shape = Shape(image_id=0, category_id=0, segmentation=segmentation)
    entry = Entry(id=0, file_name="a", height=height, width=width)
    return draw_shapes(Annotations({0: entry}, {0: [shape]}, {0: 1}), 0, 1)


COORDINATE = st.floats(-8, 38, width=32) | st.integers(-80, 380).map(lambda tenths: tenths / 10)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@given(st.lists(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=7), min_size=1, max_size=3))
def test_polygons_are_drawn_as_by_cocos_own_library(points: list[list[tuple[float, float]]]) -> None:
    polygons = [[value for point in polygon for value in point] for polygon in points]
    encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, 20, 30))
    np.testing.assert_array_equal(drawn_alone(polygons, 20, 30), coco_mask.decode([encoded])[..., 0])


@pytest.mark.parametrize("place", [(30, 5), (0, 20), (30, 20), (0, 0)])
def test_a_polygon_without_extent_covers_nothing(place: tuple[int, int]) -> None:
    assert not drawn_alone([[*place] * 4], 20, 30).any()


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_are_read_as_they_were_written(height: int, width: int, data: st.DataObject) -> None:
    inside_HW = data.draw(hnp.arrays(bool, (height, width)))
    for encode in (plain, compressed):
        np.testing.assert_array_equal(drawn_alone(encode(inside_HW), height, width), inside_HW)


def test_categories_are_classes_in_the_order_of_their_ids_and_the_smaller_shape_is_on_top(tmp_path: Path) -> None:
    inner = {"category_id": 5, "segmentation": box(8, 8, 12, 12)}
    outer = {"category_id": 9, "segmentation": box(4, 4, 20, 18)}
    expected = np.zeros((20, 30), np.uint8)
    expected[4:18, 4:20] = 2
    expected[8:12, 8:12] = 1
    for shapes in ([inner, outer], [outer, inner]):
        np.testing.assert_array_equal(drawn(tmp_path, shapes, THREE), expected)


def test_a_crowd_lies_below_and_is_ignored_where_pixels_may_be(tmp_path: Path) -> None:
    crowd = {"category_id": 9, "segmentation": plain(np.pad(np.ones((4, 4), bool), ((8, 8), (8, 18)))), "iscrowd": 1}
    cell = {"category_id": 5, "segmentation": box(4, 4, 20, 10)}
    expected = np.zeros((20, 30), np.uint8)
    expected[8:12, 8:12] = 2
    expected[4:10, 4:20] = 1
    np.testing.assert_array_equal(drawn(tmp_path, [cell, crowd], THREE), expected)
    expected[expected == 2] = 255
    np.testing.assert_array_equal(
        drawn(tmp_path, [cell, crowd], THREE.model_copy(update={"ignore_index": 255})), expected
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"segmentation": []}, "annotation 0: it has no segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "three points or more"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "leaves the image, which is 20 x 30"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, "leaves the image, which is 20 x 30"),
        ({"segmentation": {"size": [30, 20], "counts": [600]}}, r"its size is \[30, 20\], the image's \[20, 30\]"),
        ({"segmentation": {"size": [20, 30], "counts": [600, 1]}}, "do not add up to 20 x 30"),
        ({"segmentation": {"size": [20, 30], "counts": [700, -100]}}, "do not add up to 20 x 30"),
        ({"segmentation": {"size": [20, 30], "counts": "12"}}, "do not add up to 20 x 30"),
        ({"segmentation": {"size": [20, 30], "counts": "P"}}, "its counts are cut short"),
        ({"segmentation": {"size": [20, 30], "counts": "é"}}, "its counts are no run lengths"),
        (
            {"segmentation": box(1, 1, 5, 5), "category_id": 9},
            "category 9 is class 2 of 2, the model has classes 0 to 1",
        ),
        ({"segmentation": box(1, 1, 5, 5), "category_id": 6}, "annotation 0 is of the unknown category 6"),
        (
            {"segmentation": box(1, 1, 5, 5), "image_id": "b"},
            "annotation 0 is of image 'b', which images does not have",
        ),
    ],
)
def test_a_shape_that_is_none_is_refused_by_name(tmp_path: Path, shape: Json, message: str) -> None:
    model = ModelConfig(level=1, filters=(2, 4), num_classes=2)
    with pytest.raises(ConfigError, match=message):
        drawn(tmp_path, [{"category_id": 5, **shape}], model)


def drop_file(place: Path, content: Json) -> None:
    (place / "images" / "synth-000002.png").unlink()


def drop_split(place: Path, content: Json) -> None:
    del content["images"][2]["split"]


def blank_split(place: Path, content: Json) -> None:
    content["images"][2]["split"] = ""


def swap_size(place: Path, content: Json) -> None:
    content["images"][2]["height"] = 47
    content["annotations"] = [shape for shape in content["annotations"] if shape["image_id"] != 2]


def name_twice(place: Path, content: Json) -> None:
    content["images"][3]["file_name"] = "synth-000002.png"


def number_twice(place: Path, content: Json) -> None:
    content["images"][3]["id"] = 2


def drop_name(place: Path, content: Json) -> None:
    content["images"][2]["file_name"] = ""


def drop_sizes(place: Path, content: Json) -> None:
    del content["images"][2]["width"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_file, r"1 image\(s\) have no file in images/, the first is 'synth-000002'"),
        (drop_split, r"1 image\(s\) have no 'split' in annotations.json, the first is 'synth-000002'"),
        (blank_split, r"1 image\(s\) have no 'split' in annotations.json, the first is 'synth-000002'"),
        (swap_size, r"mask .*annotations.json#synth-000002.png is 47 x 48 pixels, its image .* is 48 x 48"),
        (name_twice, "has the file_name 'synth-000002' twice"),
        (number_twice, "has the image id 2 twice"),
        (drop_name, r"is no COCO file: images.2.file_name: saw '', wanted the name of a file in images/"),
        (drop_sizes, r"is no COCO file: images.2.width: Field required"),
    ],
)
def test_a_coco_set_that_does_not_fit_is_refused_by_name(
    folder: Path, tmp_path: Path, damage: Callable[[Path, Json], None], message: str
) -> None:
    content = write_coco(tmp_path, folder, plain, split_in_json=True)
    damage(tmp_path, content)
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        load(open_labelled_set(str(tmp_path)).samples, BINARY)


# ------------------------------------------------------------------------------------------------ Parquet


def table_of(folder: Path, ids: list[str]) -> pa.Table:
    rows = {row["id"]: row for row in rows_of(folder)}
    return pa.table(
        {
            "modality": [rows[id_]["modality"] for id_ in ids],
            "id": ids,
            "image": [(folder / "images" / f"{id_}.png").read_bytes() for id_ in ids],
            "mask": [(folder / "masks" / f"{id_}.png").read_bytes() for id_ in ids],
            "split": [rows[id_]["split"] for id_ in ids],
        }
    )


def ids_of(folder: Path) -> list[str]:
    return [row["id"] for row in rows_of(folder)]


def test_a_parquet_set_is_the_same_set_as_its_files_whatever_the_order_of_rows(
    folder: Path, tmp_path: Path, place: str
) -> None:
    ids = ids_of(folder)
    for name, some in (("b.parquet", ids[5::-1]), ("a/c.parquet", ids[6:])):
        pq.write_table(table_of(folder, some), tmp_path / "part.parquet", row_group_size=2)
        storage.write_bytes(storage.join(place, name), (tmp_path / "part.parquet").read_bytes())
    expected = open_labelled_set(str(folder)).samples
    samples = open_labelled_set(place).samples
    assert [(s.id, s.split, s.groups) for s in samples] == [(s.id, s.split, s.groups) for s in expected]
    assert pickle.loads(pickle.dumps(samples)) == samples
    for some, those in ((samples, expected), (samples[5:1:-2], expected[5:1:-2])):
        for image, other in zip(load(some, BINARY), load(those, BINARY), strict=True):
            assert image.sample.id == other.sample.id
            np.testing.assert_array_equal(image.image_HWC, other.image_HWC)
            np.testing.assert_array_equal(image.target_HW, other.target_HW)


def test_one_parquet_file_is_a_set(folder: Path, tmp_path: Path) -> None:
    table = table_of(folder, ids_of(folder)).drop_columns(["split"])
    pq.write_table(table, tmp_path / "set.parquet")
    pq.write_table(table, tmp_path / "another.parquet")
    labelled = open_labelled_set(str(tmp_path / "set.parquet"))
    assert len(labelled.samples) == 8
    assert {sample.split for sample in labelled.samples} <= {"train", "val"}
    with pytest.raises(ConfigError, match=r"the id 'synth-00000\d' is there twice: .*another.parquet.*set.parquet"):
        open_labelled_set(str(tmp_path))


def test_a_row_without_a_split_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    table = table_of(folder, ids_of(folder))
    splits = pa.array([None if number == 2 else value for number, value in enumerate(table["split"].to_pylist())])
    pq.write_table(table.set_column(table.schema.names.index("split"), "split", splits), tmp_path / "set.parquet")
    with pytest.raises(ConfigError, match=r"1 image\(s\) have no 'split' in their rows, the first is 'synth-000002'"):
        open_labelled_set(str(tmp_path))


def test_a_parquet_set_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """128 masks of random pixels are 24 MB; read in row groups of 4, Arrow never holds half of them."""
    rng = np.random.default_rng(0)
    pngs = [encode_mask(rng.integers(0, 200, (256, 768), np.uint8), 200) for _ in range(128)]
    ids = [f"{number:03d}" for number in range(128)]
    pq.write_table(pa.table({"id": ids, "image": pngs, "mask": pngs}), tmp_path / "set.parquet", row_group_size=4)
    code = f"""
import pyarrow as pa
from jobs.labelled import find_set
from jobs.samples import list_samples, readers
samples = list_samples(find_set({str(tmp_path)!r}), "split").samples
sizes = [len(read().mask) for _, read in readers(samples)]
print(len(sizes), sum(sizes), pa.default_memory_pool().max_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    num_masks, num_bytes, most_bytes = map(int, done.stdout.split())
    assert (num_masks, num_bytes) == (128, sum(map(len, pngs)))
    assert most_bytes < num_bytes / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["mask"]), "column mask is not there; wanted binary"),
        (lambda table: table.set_column(2, "image", pa.array(["x"] * 8)), "column image is string; wanted binary"),
        (lambda table: table.drop_columns(["id"]), "has no column id of text or whole numbers"),
        (lambda table: table.set_column(1, "id", pa.array([None] * 8, pa.string())), "has a row without an id"),
        (
            lambda table: table.set_column(2, "image", pa.nulls(8, pa.binary())),
            "/image cannot be used: its image is null",
        ),
        (lambda table: table, "/mask cannot be used: mask ids must be 0 to 1"),
    ],
)
def test_a_parquet_set_that_does_not_fit_is_refused_by_name(
    folder: Path, tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(change(table_of(folder, ids_of(folder))), tmp_path / "set.parquet")
    with pytest.raises(ConfigError, match=message):
        load(
            open_labelled_set(str(tmp_path)).samples, ModelConfig(level=1, filters=(2, 4), in_channels=1, num_classes=2)
        )


def test_what_is_called_parquet_and_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(ConfigError, match=r"set.parquet is no Parquet file"):
        open_labelled_set(str(tmp_path))


def test_a_file_that_was_replaced_after_the_listing_is_refused(folder: Path, tmp_path: Path) -> None:
    pq.write_table(table_of(folder, ids_of(folder)), tmp_path / "set.parquet")
    samples = open_labelled_set(str(tmp_path)).samples
    pq.write_table(table_of(folder, ids_of(folder)[::-1]), tmp_path / "set.parquet")
    with pytest.raises(ConfigError, match="was replaced or deleted after it was listed"):
        load(samples, BINARY)


# ------------------------------------------------------------------------------------- what belongs to a set


def test_masks_are_taken_where_both_are_there_unless_the_json_is_named(folder: Path, tmp_path: Path) -> None:
    write_coco(tmp_path, folder, plain, split_in_json=True)
    storage.upload_folder(folder / "masks", tmp_path / "masks")
    assert find_set(str(tmp_path)).form == "folder"
    assert find_set(str(tmp_path / "annotations.json")).form == "coco"


def test_the_fingerprint_follows_what_belongs_to_the_set_alone(folder: Path, place: str, tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", folder, plain, split_in_json=False)
    storage.upload_folder(tmp_path / "coco", place)
    before = find_set(place).fingerprint
    assert find_set(storage.join(place, "annotations.json")).fingerprint == before
    storage.write_bytes(storage.join(place, "other.json"), b"{}")
    storage.write_bytes(storage.join(place, "set.parquet"), b"")
    assert find_set(place).fingerprint == before
    seen = {before}
    for name in ("annotations.json", "splits.csv", "images/synth-000003.png"):
        content = storage.read_bytes(storage.join(place, name))
        storage.write_bytes(storage.join(place, name), content + b" ")
        seen.add(find_set(place).fingerprint)
    assert len(seen) == 4


def test_a_parquet_set_has_another_fingerprint_when_a_file_is_added_or_changed(folder: Path, tmp_path: Path) -> None:
    seen = set()
    for name, ids in (("a.parquet", [0, 1]), ("b.parquet", [2, 3]), ("b.parquet", [2, 4])):
        pq.write_table(table_of(folder, [ids_of(folder)[id_] for id_ in ids]), tmp_path / name)
        seen.add(find_set(str(tmp_path)).fingerprint)
    assert len(seen) == 3
    (tmp_path / "notes.txt").write_text("no part of the set")
    assert find_set(str(tmp_path)).fingerprint in seen


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        ([], "there is nothing"),
        (["images/a.png"], "there is images/"),
        (["a.png", "annotations.json"], "there is a.png, annotations.json"),
        (["x/1", "x/2", "b", "c", "d", "e", "f"], "there is b, c, d, e, f, ..."),
    ],
)
def test_what_is_no_labelled_set_is_refused_with_what_is_there(tmp_path: Path, names: list[str], seen: str) -> None:
    for name in names:
        storage.write_bytes(tmp_path / name, b"content")
    with pytest.raises(ConfigError, match=r"is no labelled data set: wanted images/ with masks/.*" + seen):
        open_labelled_set(str(tmp_path))


def test_a_json_without_images_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*train.json"):
        open_labelled_set(str(tmp_path / "train.json"))
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"train.json has no images/ beside it"):
        open_labelled_set(str(tmp_path / "train.json"))


# --------------------------------------------------------------------------------------------------- splits


def test_another_column_can_name_the_split(folder: Path, tmp_path: Path) -> None:
    storage.upload_folder(folder, tmp_path)
    text = (tmp_path / "splits.csv").read_text()
    lines = [
        line + (",fold" if line.startswith("id,") else f",{number % 2}")
        for number, line in enumerate(text.splitlines())
    ]
    (tmp_path / "splits.csv").write_text("\n".join(lines))
    labelled = open_labelled_set(str(tmp_path), "fold")
    assert [sample.split for sample in labelled.samples] == ["1", "0"] * 4
    assert set(labelled.samples[0].groups) == {"split", "modality"}
    assert labelled.fingerprint == open_labelled_set(str(tmp_path)).fingerprint
    with pytest.raises(ConfigError, match="wanted at least id and plate"):
        open_labelled_set(str(tmp_path), "plate")


def test_a_column_that_no_one_wrote_is_refused(folder: Path, tmp_path: Path) -> None:
    storage.upload_folder(folder, tmp_path)
    (tmp_path / "splits.csv").unlink()
    with pytest.raises(ConfigError, match="has no 'fold' to split by"):
        open_labelled_set(str(tmp_path), "fold")


def test_a_line_of_splits_csv_without_an_id_is_refused(folder: Path, tmp_path: Path) -> None:
    storage.upload_folder(folder, tmp_path)
    (tmp_path / "splits.csv").write_text("split,id\ntrain,synth-000000\nval\n")
    with pytest.raises(ConfigError, match=r"splits\.csv has no id in line 3"):
        open_labelled_set(str(tmp_path))


def test_an_image_without_a_labelled_pixel_is_refused(folder: Path, tmp_path: Path) -> None:
    storage.upload_folder(folder, tmp_path)
    mask = tmp_path / "masks" / "synth-000001.png"
    mask.write_bytes(encode_mask(np.ones(Image.open(mask).size[::-1], np.uint8)))
    samples = open_labelled_set(str(tmp_path)).samples
    load(samples, BINARY)
    with pytest.raises(ConfigError, match=r"synth-000001\.png has no labelled pixel, but 255 alone"):
        load(samples, BINARY.model_copy(update={"ignore_index": 255}))


def test_an_id_that_splits_csv_names_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    storage.upload_folder(folder, tmp_path)
    with (tmp_path / "splits.csv").open("a") as file:
        file.write("synth-000002,test,other\n")
    with pytest.raises(ConfigError, match="names the id 'synth-000002' twice"):
        open_labelled_set(str(tmp_path))

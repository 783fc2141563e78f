"""The same images, however they are packed: the same masks; and what is asked of a store for them."""

import csv
import io
import json
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import archives, guarded, members, predict, sources, storage
from jobs.contract import PredictConfig, PredictResult
from jobs.manifest import Listed, ManifestRow
from jobs.parquet_images import Columns
from jobs.sources import Listing, Source
from jobs.table import read_masks
from jobs.worker import Worker
from tests.faults.proxy import FaultProxy, Rule, answer
from unetpp.errors import ConfigError, ImageError

LIMITS = members.Limits(10_000, 64 << 20, 200.0)
NAMES = [f"{number:02d}.png" for number in range(8)] + ["plate 1/a.png", "plate 1/b.png", "é/ü.png", "z.png"]


def _png(seed: int) -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24 + seed, 40 - seed, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    """A dozen small PNGs by name."""
    return {name: _png(seed) for seed, name in enumerate(NAMES)}


def tar_of(files: dict[str, bytes], mode: str = "w", **more: Any) -> bytes:
    """A tar of files, as `tarfile` writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **more) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of files, as `zipfile` writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def parquet_of(files: dict[str, bytes], **more: Any) -> bytes:
    """A Parquet file with the columns key and image."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": list(files), "image": list(files.values())}), buffer, **more)
    return buffer.getvalue()


PACKED: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "x.tar": tar_of,
    "x.tar.gz": lambda files: tar_of(files, "w:gz"),
    "x.tar.zst": lambda files: pa.compress(tar_of(files), codec="zstd", asbytes=True),
    "x.zip": zip_of,
    "x.parquet": lambda files: parquet_of(files, row_group_size=5),
}


def listed(place: str, **options: Any) -> list[Listed]:
    """What a run would find in one place."""
    config = PredictConfig.model_validate({"model": "m", "input": place, "output": "o", **options})
    found = sources.resolve(config.input, f"{place}-out")
    return list(Listing(found, config, storage.join(f"{place}-out", "indexes")))


def read(
    place: str,
    found: list[Listed],
    columns: Columns = Columns(),  # noqa: B008
    moved: Callable[[], None] = lambda: None,
) -> list[bytes | ImageError]:
    """The contents of what was listed."""
    zeros = dict.fromkeys(ManifestRow._fields, 0)
    rows = [ManifestRow(**{**zeros, **one._asdict()}) for one in found]
    with ThreadPoolExecutor(4) as threads:
        return [content for _, content in archives.contents([place], rows, threads, LIMITS, columns, moved)]


@pytest.fixture
def segment(tiny_model: Path) -> Callable[..., PredictResult]:
    """Function: (output, inputs) run predict inline, five images a shard."""

    def run(output: str, *inputs: str, **changed: Any) -> PredictResult:
        settings: dict[str, Any] = {"model": str(tiny_model), "input": inputs, "output": output, "backend": "inline"}
        return predict.run(PredictConfig.model_validate({**settings, "threads": 1, "shard_images": 5, **changed}))

    return run


def rows_of(output: str) -> list[dict[str, Any]]:
    return sorted(read_masks(output).to_pylist(), key=lambda row: (row["source_uri"], row["key"]))


# ------------------------------------------------------------------------------------------------ one mask


def test_however_images_are_packed_they_get_the_same_masks(segment, images: dict[str, bytes], s3_prefix: str) -> None:
    for name, content in images.items():
        storage.write_bytes(f"{s3_prefix}/loose/{name}", content)
    for name, pack in PACKED.items():
        storage.write_bytes(f"{s3_prefix}/{name}/{name}", pack(images))
    lines = [{"uri": f"loose/{name}", "stain": f"of {name}"} for name in images]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["uri", "stain"])
    writer.writeheader()
    writer.writerows(lines)
    storage.write_bytes(f"{s3_prefix}/list.csv", text.getvalue().encode())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{**line, "dose": number} for number, line in enumerate(lines)]), buffer)
    storage.write_bytes(f"{s3_prefix}/list.parquet", buffer.getvalue())

    segment(f"{s3_prefix}/out/loose", f"{s3_prefix}/loose")
    wanted = {row["key"]: row["mask_png"] for row in rows_of(f"{s3_prefix}/out/loose")}
    assert set(wanted) == set(images)
    for name in PACKED:
        output = f"{s3_prefix}/out/{name}"
        result = segment(output, f"{s3_prefix}/{name}")
        assert (result.status, result.num_predicted) == ("complete", len(images))
        rows = rows_of(output)
        assert {row["key"]: row["mask_png"] for row in rows} == {f"{name}#{key}": wanted[key] for key in wanted}
        assert {row["source_uri"] for row in rows} == {f"{s3_prefix}/{name}"}
        assert all(storage.read_bytes(row["mask_uri"]) == row["mask_png"] for row in rows)
        again = segment(output, f"{s3_prefix}/{name}")
        assert (again.status, again.num_unchanged) == ("unchanged", len(images))
    for name in ("list.csv", "list.parquet"):
        segment(f"{s3_prefix}/out/{name}", f"{s3_prefix}/{name}")
        rows = rows_of(f"{s3_prefix}/out/{name}")
        assert {row["key"]: row["mask_png"] for row in rows} == {f"loose/{key}": wanted[key] for key in wanted}
        said = {row["key"]: json.loads(row["extra"]) for row in rows}
        assert {key: extra["stain"] for key, extra in said.items()} == {line["uri"]: line["stain"] for line in lines}
    assert {extra["dose"] for extra in said.values()} == set(range(len(images)))


def test_an_archive_named_alone_and_found_in_its_folder_is_the_same_one(segment, images, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(tar_of(images))
    (tmp_path / "in" / "loose.png").write_bytes(images["z.png"])
    alone = segment(f"{tmp_path}/out", f"{tmp_path}/in/x.tar")
    both = segment(f"{tmp_path}/out", f"{tmp_path}/in")
    assert (alone.num_predicted, both.num_predicted, both.num_unchanged) == (len(images), 1, len(images))


def test_several_inputs_may_share_keys(segment, images, tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.png").write_bytes(images[NAMES[number]])
    result = segment(f"{tmp_path}/out", f"{tmp_path}/a", f"{tmp_path}/b")
    assert (result.num_listed, result.num_predicted) == (2, 2)
    first, second = rows_of(f"{tmp_path}/out")
    assert (first["key"], second["key"]) == ("same.png", "same.png")
    assert (first["source_uri"], second["source_uri"]) == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert first["mask_png"] != second["mask_png"]
    for row in (first, second):
        assert storage.read_bytes(row["mask_uri"]) == row["mask_png"]
    assert segment(f"{tmp_path}/out", f"{tmp_path}/a", f"{tmp_path}/b").status == "unchanged"


def test_inputs_that_overlap_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.tar").write_bytes(b"")
    for twice in ([f"{tmp_path}/a"] * 2, [f"{tmp_path}/a", f"{tmp_path}/a/x.tar"]):
        with pytest.raises(ConfigError, match="is part of the input"):
            sources.resolve(twice, f"{tmp_path}/out")
    with pytest.raises(ConfigError, match="lies inside the input"):
        sources.resolve([f"{tmp_path}/a"], f"{tmp_path}/a/out")


def test_what_lies_in_an_input_by_way_of_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in.tar").write_bytes(b"")
    (tmp_path / "in" / "x.tar").symlink_to("../in.tar")
    (tmp_path / "link").symlink_to("in")
    for given, output in (("in", "link/masks"), ("link", "in/sub/masks"), ("link", "link")):
        with pytest.raises(ConfigError, match="lies inside the input"):
            sources.resolve([f"{tmp_path}/{given}"], f"{tmp_path}/{output}")
    for other in ("link/sub", "in/x.tar"):
        with pytest.raises(ConfigError, match="is part of the input"):
            sources.resolve([f"{tmp_path}/in", f"{tmp_path}/{other}"], f"{tmp_path}/out")


def test_an_input_may_lie_directly_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"/x.tar": tar_of({"a.png": b"a"}), "/l.csv": b"uri\nb.png\n/c.png\n", "/b.png": b"b", "/c.png": b"c"}
    objects = {uri: storage.StoredObject(uri[1:], "1-1", len(content)) for uri, content in there.items()}
    monkeypatch.setattr(storage, "find", objects.get)
    monkeypatch.setattr(storage, "open_stream", lambda uri, *version: io.BytesIO(there[uri]))
    config = PredictConfig(model="m", input=("/x.tar", "/l.csv"), output="o")
    found = sources.resolve(config.input, f"{tmp_path}/out")
    assert found == (Source("/", "x.tar"), Source("/", "l.csv"))
    assert [one.key for one in Listing(found, config, f"{tmp_path}/indexes")] == ["x.tar#a.png", "b.png", "c.png"]
    with pytest.raises(ConfigError, match="is part of the input"):
        sources.resolve(["/", "/x.tar"], "s3://bucket/out")
    with pytest.raises(ConfigError, match="lies inside the input"):
        sources.resolve(["/"], f"{tmp_path}/out")


# ------------------------------------------------------------------------------------------------ listing


@pytest.mark.parametrize("name", PACKED)
def test_what_was_packed_is_listed_and_read_as_it_was(place: str, images, name: str) -> None:
    storage.write_bytes(f"{place}/{name}", PACKED[name](images))
    found = listed(place)
    assert [one.key for one in found] == [f"{name}#{key}" for key in images]
    assert read(place, found) == list(images.values())
    assert read(place, found[3:9]) == list(images.values())[3:9]
    assert read(place, found[::3]) == list(images.values())[::3]


def test_globs_choose_and_leave_out(place: str, images) -> None:
    storage.write_bytes(f"{place}/x.zip", zip_of({**images, "notes.txt": b"no image"}))
    storage.write_bytes(f"{place}/y.tar", tar_of(images))
    storage.write_bytes(f"{place}/z.PNG", images["z.png"])
    assert len(listed(place)) == 2 * len(images) + 1
    assert [one.key for one in listed(place, exclude=["x.zip", "y.tar#*"])] == ["z.PNG"]
    assert {one.key for one in listed(place, include=["*plate*"])} == {
        f"{name}#plate 1/{letter}.png" for name in ("x.zip", "y.tar") for letter in "ab"
    }
    assert len(listed(place, include=["*"], exclude=["*.png"])) == 1  # the text


def test_an_unchanged_tar_is_not_streamed_again(images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar.gz").write_bytes(PACKED["x.tar.gz"](images))
    first = listed(f"{tmp_path}/in")
    (index,) = (tmp_path / "in-out" / "indexes").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_stream", None)
        assert listed(f"{tmp_path}/in") == first
    index.write_bytes(b"torn")
    assert listed(f"{tmp_path}/in") == first
    index.unlink()
    assert listed(f"{tmp_path}/in") == first


def test_a_member_that_stays_the_same_in_a_longer_archive_is_unchanged(segment, images, tmp_path: Path) -> None:
    for name in ("x.tar", "x.zip", "x.parquet"):
        place, output = tmp_path / name, f"{tmp_path}/out {name}"
        place.mkdir()
        some = dict(list(images.items())[:7])
        (place / name).write_bytes(PACKED[name](some))
        assert segment(output, str(place)).num_predicted == 7
        (place / name).write_bytes(PACKED[name](images))
        later = segment(output, str(place))
        assert (later.num_predicted, later.num_unchanged) == (len(images) - 7, 7)


def test_an_archive_that_is_replaced_or_deleted_after_the_listing_is_known(place: str, images) -> None:
    for name, pack in PACKED.items():
        storage.write_bytes(f"{place}/{name}", pack(images))
    found = listed(place)
    for name, pack in PACKED.items():
        storage.write_bytes(f"{place}/{name}", pack({"new.png": _png(3)} | images))
    assert {content.code for content in read(place, found)} == {"changed"}
    for name in PACKED:
        storage.delete(f"{place}/{name}")
    assert {content.code for content in read(place, found)} == {"gone"}


def test_whoever_stops_a_listing_does_not_wait_for_whole_archives(
    images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar.gz").write_bytes(PACKED["x.tar.gz"](images))
    packed = tar_of({"a.png": np.random.default_rng(0).bytes(8 << 20)}, "w:gz")
    for number in range(1, 6):
        (tmp_path / "in" / f"{number}.tar.gz").write_bytes(packed)
    read_range = storage.read_range

    def slow(*what: Any) -> bytes:
        time.sleep(0.2)
        return read_range(*what)

    monkeypatch.setattr(storage, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(storage, "read_range", slow)
    config = PredictConfig(model="m", input=(f"{tmp_path}/in",), output="o")
    found = iter(Listing(sources.resolve(config.input, f"{tmp_path}/out"), config, f"{tmp_path}/indexes"))
    assert next(found).key == "0.tar.gz#00.png"
    started = time.monotonic()
    found.close()
    assert time.monotonic() - started < 10  # of 25 s an archive


def test_an_archive_whose_bytes_are_refused_is_rows_when_listed_and_when_read(
    s3_prefix: str, images, counting_proxy: FaultProxy
) -> None:
    for name, pack in PACKED.items():
        storage.write_bytes(f"{s3_prefix}/{name}", pack(images))
    refuse = Rule("GET", r"/x\.", answer(403, "InvalidObjectState"))
    counting_proxy.rules = [refuse]
    refused = listed(s3_prefix)
    assert [(one.key, one.etag.split(":")[:2]) for one in refused] == [
        (name, ["refused", "unreadable"]) for name in sorted(PACKED)
    ]
    assert {content.code for content in read(s3_prefix, refused)} == {"unreadable"}
    counting_proxy.rules = []
    found = listed(s3_prefix)
    counting_proxy.rules = [refuse]
    contents = read(s3_prefix, found)
    assert len(contents) == len(PACKED) * len(images)
    assert {content.code for content in contents} == {"unreadable"}


# ------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_gives_its_names(tmp_path: Path, form: int) -> None:
    long = "/".join(["folder" * 8] * 4) + "/x.png"
    files = {"a.png": b"a", "./b.png": b"b", "/c.png": b"c", "d//e.png": b"d", "50 %.png": b"%", long: b"l"}
    (tmp_path / "x.tar").write_bytes(tar_of(files, format=form))
    found = listed(str(tmp_path))
    keys = ["a.png", "b.png", "c.png", "d/e.png", "50 %25.png", long]
    assert [one.key for one in found] == [f"x.tar#{key}" for key in keys]
    assert read(str(tmp_path), found) == list(files.values())


def test_zips_with_bytes_before_them_and_sizes_after_the_data_are_read(images, tmp_path: Path) -> None:
    class OneWay(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

        def seek(self, *where: int) -> int:
            raise OSError

    stream = OneWay()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in images.items():
            packed.writestr(name, content)
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" * 50 + zip_of(images, zipfile.ZIP_STORED))
    found = listed(str(tmp_path))
    assert [one.key for one in found] == [f"{name}.zip#{key}" for name in "ab" for key in images]
    assert read(str(tmp_path), found) == list(images.values()) * 2


def test_a_zip64_is_read(tmp_path: Path, images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2000)
    (tmp_path / "x.zip").write_bytes(zip_of(images))
    found = listed(str(tmp_path))
    assert [one.key for one in found] == [f"x.zip#{key}" for key in images]
    assert read(str(tmp_path), found) == list(images.values())


def test_gzip_and_zstd_in_several_parts_are_one_stream(tmp_path: Path, images) -> None:
    import gzip

    tar = tar_of(images)
    halves = [tar[: len(tar) // 2], tar[len(tar) // 2 :]]
    (tmp_path / "a.tgz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "b.tar.zst").write_bytes(b"".join(pa.compress(half, codec="zstd", asbytes=True) for half in halves))
    found = listed(str(tmp_path))
    assert read(str(tmp_path), found) == list(images.values()) * 2


def test_a_parquet_column_may_be_named_nested_and_without_names(tmp_path: Path, images) -> None:
    values = list(images.values())
    pq.write_table(pa.table({"picture": values}), tmp_path / "a.parquet")
    nested = [{"bytes": value, "path": name} for name, value in images.items()]
    pq.write_table(pa.table({"image": nested}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"mask_png": values, "key": list(images)}), tmp_path / "c.parquet")
    found = listed(str(tmp_path))
    assert [one.key for one in found] == [f"b.parquet#{name}" for name in images]
    assert read(str(tmp_path), found) == values
    named = listed(str(tmp_path), image_column="picture")
    assert [one.key for one in named] == [f"a.parquet#{number}" for number in range(len(images))]
    assert read(str(tmp_path), named, Columns("picture")) == values


def test_rows_without_a_name_never_have_the_name_of_another(tmp_path: Path, images) -> None:
    values = list(images.values())[:5]
    names = ["2", None, "%row1", "", "0"]
    pq.write_table(pa.table({"key": names, "image": values}), tmp_path / "a.parquet")
    nested = [
        {"bytes": value, "path": name} for value, name in zip(values, ["1", None, "a.png", "./3", ""], strict=True)
    ]
    pq.write_table(pa.table({"image": nested}), tmp_path / "b.parquet")
    found = listed(str(tmp_path))
    assert [one.key.partition("#")[2] for one in found[:5]] == ["2", "%row1", "%25row1", "%row3", "0"]
    assert [one.key.partition("#")[2] for one in found[5:]] == ["0", "1", "a.png", "3", "4"]
    assert read(str(tmp_path), found) == values * 2


def test_a_column_of_names_that_is_not_there_is_refused(tmp_path: Path, images) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_of(images))
    with pytest.raises(ConfigError, match=r"a\.parquet has the columns key, image: --name-column is none of them"):
        listed(f"{tmp_path}/a.parquet", name_column="kye")
    (row,) = listed(str(tmp_path), name_column="kye")
    (error,) = read(str(tmp_path), [row], Columns(None, "kye"))
    assert (row.key, error.code) == ("a.parquet", "archive")
    assert "name_column" in error.detail


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst", "x.parquet"])
def test_what_is_read_from_its_start_is_read_by_few_shards(segment, tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(PACKED[name]({f"{number:03d}.png": b"" for number in range(120)}))
    result = segment(f"{tmp_path}/out", f"{tmp_path}/in", shard_images=1, max_failed_share=1)
    assert result.num_listed == 120
    record = storage.read_json(f"{tmp_path}/out/runs/r00001/run.json")
    assert record["num_shards"] == 15


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar.zst", "x.parquet"])
def test_whoever_watches_sees_that_an_archive_is_read_to_a_far_image(place: str, monkeypatch, name: str) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr("jobs.parquet_images.BUFFER_BYTES", 64 << 10)
    noise = np.random.default_rng(0)
    files = {f"{number:02d}.png": noise.bytes(100_000) for number in range(20)}
    if name == "x.parquet":  # one row group of many pages
        packed = parquet_of(files, use_dictionary=False, data_page_size=64 << 10, write_batch_size=1)
    else:
        packed = PACKED[name](files)
    storage.write_bytes(f"{place}/{name}", packed)
    found = listed(place)
    signs: list[int] = []
    assert read(place, found[-1:], moved=lambda: signs.append(1)) == [files["19.png"]]
    assert len(signs) > 20


def test_a_worker_that_reads_to_a_far_image_is_not_taken_for_one_that_hangs(
    segment, images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).bytes(1 << 20)
    (tmp_path / "in" / "x.tar.gz").write_bytes(tar_of({"noise": noise, "a.png": images["z.png"]}, "w:gz"))
    read_range, given_up = storage.read_range, []

    def slow(*what: Any) -> bytes:
        if threading.current_thread().name == "read":
            time.sleep(0.5)
        return read_range(*what)

    monkeypatch.setattr(storage, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(storage, "read_range", slow)
    monkeypatch.setattr(guarded, "WALL_FACTOR", 100)  # its decoder may start slowly
    monkeypatch.setattr(Worker, "_give_up", lambda worker, shard, watch, leave_word: given_up.append(watch.still_s))
    result = segment(f"{tmp_path}/out", f"{tmp_path}/in", include=["*.png"], stall_s=4, decode_seconds=0.7)
    assert (result.num_predicted, given_up) == (1, [])


# ------------------------------------------------------------------------------------------------ manifests


def test_a_manifest_may_name_images_anywhere_and_archives(place: str, images, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "f.png").write_bytes(images["z.png"])
    storage.write_bytes(f"{place}/lists/near.dat", images["00.png"])
    storage.write_bytes(f"{place}/lists/sub/x.zip", zip_of(images))
    table = f"uri,who\nnear.dat,anna\n{tmp_path}/far/f.png,bert\nsub/x.zip,carl\nabsent.png,dora\n./a/../near.png,\n"
    storage.write_bytes(f"{place}/lists/l.csv", table.encode())
    storage.write_bytes(f"{place}/lists/near.png", images["01.png"])
    config = PredictConfig(model="m", input=(f"{place}/lists/l.csv",), output="o")
    found = list(Listing([Source(f"{place}/lists", "l.csv")], config, f"{place}/indexes"))
    keys = ["near.dat", f"{tmp_path}/far/f.png", *(f"sub/x.zip#{name}" for name in images), "absent.png", "near.png"]
    assert [one.key for one in found] == keys
    assert [json.loads(one.extra or "")["who"] for one in found] == ["anna", "bert", *["carl"] * 12, "dora", ""]
    contents = read(f"{place}/lists", found)
    assert contents[-2].code == "gone"
    wanted = [images["00.png"], images["z.png"], *images.values(), images["01.png"]]
    assert contents[:-2] + contents[-1:] == wanted


def test_a_manifest_that_names_a_link_to_itself_has_a_row_more(segment, images, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(images["00.png"])
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "l.csv").write_text("uri\na.png\ncircle.png\n")
    result = segment(f"{tmp_path}/out", f"{tmp_path}/l.csv")
    assert (result.num_predicted, result.failures) == (1, {"gone": 1})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,who\na.png,x\n", "wanted one of them to be uri"),
        ("uri\na.png\n\xff\n", "wanted CSV in UTF-8"),
        ("uri,who\n,x\n", "has a row whose uri is ''"),
        ("uri\na\0.png\n", r"has a row whose uri is 'a\\x00.png'"),
        ("uri\n../a.png\n", "leads out of its folder"),
        ("uri\na.png\nb.png\na.png\n", "'a.png' is listed twice"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(segment, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "l.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=says):
        segment(f"{tmp_path}/out", f"{tmp_path}/l.csv")


def test_a_damaged_parquet_manifest_is_refused(segment, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"uri": [f"{number}.png" for number in range(5000)]}), buffer, compression="zstd")
    content = bytearray(buffer.getvalue())
    content[200:4000] = bytes(3800)
    (tmp_path / "l.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"l\.parquet cannot be read: .*wanted Parquet with a column uri"):
        segment(f"{tmp_path}/out", f"{tmp_path}/l.parquet")


def test_what_a_manifest_says_becomes_json_that_every_reader_takes(tmp_path: Path) -> None:
    said = {
        "uri": ["a.png", "b.png"],
        "dose": [float("nan"), 0.5],
        "at": [[float("-inf"), 1.0], None],
        "who": ["é", ""],
    }
    pq.write_table(pa.table(said), tmp_path / "l.parquet")
    (tmp_path / "a.png").touch()
    extras = [one.extra for one in listed(f"{tmp_path}/l.parquet")]
    assert extras == ['{"dose": null, "at": [null, 1.0], "who": "é"}', '{"dose": 0.5, "at": null, "who": ""}']


def test_an_objects_name_is_never_taken_for_an_address(place: str, images) -> None:
    storage.write_bytes(f"{place}/http:/host/a.png", images["z.png"])
    assert read(place, listed(place)) == [images["z.png"]]


def test_an_object_named_like_a_member_is_told_from_it(segment, images, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.tar").write_bytes(tar_of({"a.png": images["00.png"]}))
    (tmp_path / "in" / "x.tar#b.png").write_bytes(images["01.png"])
    segment(f"{tmp_path}/out", f"{tmp_path}/in")
    codes = {row["key"]: row["error_code"] for row in rows_of(f"{tmp_path}/out")}
    assert codes == {"x.tar#a.png": None, "x.tar#b.png": "archive"}


def test_an_archive_below_a_folder_named_like_one_is_a_row(segment, images, tmp_path: Path) -> None:
    (tmp_path / "in" / "x.zip#old").mkdir(parents=True)
    for name, pack in PACKED.items():
        (tmp_path / "in" / "x.zip#old" / name).write_bytes(pack({"a.png": images["00.png"]}))
    (tmp_path / "l.csv").write_text("uri\nin/x.zip#old/x.tar\n")
    for number, place in enumerate(("in", "l.csv")):
        segment(f"{tmp_path}/out{number}", f"{tmp_path}/{place}", max_failed_share=1)
        found = {(row["key"].rpartition("/")[2], row["error_code"]) for row in rows_of(f"{tmp_path}/out{number}")}
        assert found == {(name, "archive") for name in (PACKED if place == "in" else ["x.tar"])}
        assert all("rename it" in row["error"] for row in rows_of(f"{tmp_path}/out{number}"))

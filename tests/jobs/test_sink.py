"""Names of PNGs, rows of parts, and the commit that only one writer makes."""

import io
import re

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import sink, storage
from unetpp.errors import ConfigError, StorageError

KEYS = st.text(st.sampled_from("ab./%~ 1_xy-") | st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda key: not key.endswith("/")
)
LONG_KEYS = st.lists(st.sampled_from(["a" * 190, "é" * 80, "図" * 70, "x", "y.png", ".."]), min_size=1, max_size=9)
WINDOWS = st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99))


@pytest.fixture
def rows() -> list[dict]:
    """Two rows of a part: a mask and a failure."""
    common = dict.fromkeys(sink.SCHEMA.names) | {
        "source_uri": "s",
        "etag": "e",
        "window_y": 0,
        "window_x": 0,
        "num_windows": 1,
        "window_px": 0,
        "level": 2,
        "model_digest": "d" * 64,
        "seconds": 0.5,
        "attempts": 1,
        "schema_version": sink.SCHEMA_VERSION,
    }
    mask = {
        "key": "a",
        "height": 1000,
        "width": 500,
        "window_h": 1000,
        "window_w": 500,
        "mask_png": b"png",
        "class_pixels": [499_000, 1000],
    }
    return [common | mask, common | {"key": "b", "error_code": "decode", "error": "cut short"}]


def _commit(uri: str, rows: list[dict], root: str, **changed) -> sink.Footer:
    work = {"run": "r00001", "manifest_sha256": "abc", "shard": 3, "seconds": 1.0}
    return sink.commit(uri, rows, root=root, **(work | changed))


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("key", "png"),
    [
        ("a.tif", "a.tif.png"),
        ("plate 1/w é.png", "plate%201/w%20%C3%A9.png.png"),
        ("a//b", "a/%/b.png"),
        ("/a", "%/a.png"),
        ("../../etc/passwd", "%2E%2E/%2E%2E/etc/passwd.png"),
        ("./a", "%2E/a.png"),
        ("a.png/b", "a%2Epng/b.png"),
        ("archive.tar#member.png", "archive.tar%23member.png.png"),
    ],
)
def test_a_png_is_named_after_its_key(key: str, png: str) -> None:
    assert sink.png_key(key) == png


def test_a_window_has_its_place_in_the_name() -> None:
    assert sink.png_key("a.tif", (1024, 0)) == "a.tif.y1024_x0.png"
    assert sink.png_key("a.tif.y1024_x0") == "a.tif%2Ey1024_x0.png"


def test_a_probability_stands_beside_its_mask() -> None:
    assert sink.probability_uri(sink.png_key("a.tif")) == "a.tif.probability.png"
    assert sink.probability_uri(sink.png_key("a.tif", (0, 512))) == "a.tif.y0_x512.probability.png"
    assert sink.png_key("a.tif.probability") == "a.tif%2Eprobability.png"


@given(KEYS, KEYS, WINDOWS, WINDOWS)
def test_no_mask_has_the_name_of_a_probability(
    one: str, other: str, window: tuple | None, other_window: tuple | None
) -> None:
    for suffix in ("", ".probability"):
        assert sink.png_key(one + suffix, window) != sink.probability_uri(sink.png_key(other, other_window))


@given(KEYS, KEYS, WINDOWS, WINDOWS)
def test_no_two_images_share_a_name(one: str, other: str, window: tuple | None, other_window: tuple | None) -> None:
    assert (sink.png_key(one, window) == sink.png_key(other, other_window)) == ((one, window) == (other, other_window))


@given(LONG_KEYS, LONG_KEYS)
def test_long_keys_are_cut_and_stay_apart(one: list[str], other: list[str]) -> None:
    names = [sink.png_key("/".join(parts)) for parts in (one, other)]
    assert (names[0] == names[1]) == (one == other)


@given(st.one_of(KEYS, LONG_KEYS.map("/".join)), WINDOWS)
def test_a_name_is_safe_in_any_store(key: str, window: tuple | None) -> None:
    name = sink.png_key(key, window)
    assert len(name) <= 800
    for part in name.split("/"):
        assert re.fullmatch(r"[A-Za-z0-9_.%~-]+", part)
        assert part not in (".", "..")
        assert len(part) <= 230


@given(KEYS, KEYS)
def test_no_file_stands_where_a_folder_is_wanted(one: str, other: str) -> None:
    assert not sink.png_key(one).startswith(sink.png_key(other) + "/")


# --------------------------------------------------------------------------------------------------- commit


def test_a_part_holds_its_rows_and_says_what_it_is(place: str, rows: list[dict]) -> None:
    uri = storage.join(place, "part-00003.parquet")
    footer = _commit(uri, rows, place)
    assert (footer.num_predicted, footer.num_failed, footer.failures) == (1, 1, {"decode": 1})
    assert footer.megapixels == 0.5
    file = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)))
    assert file.read().to_pylist() == rows
    assert sink.read_footer(file.metadata, uri) == footer


def test_the_first_commit_of_a_shard_holds(place: str, rows: list[dict]) -> None:
    uri = storage.join(place, "part-00003.parquet")
    first = _commit(uri, rows, place)
    content = storage.read_bytes(uri)
    assert _commit(uri, rows[:1], place, seconds=9.0) == first
    assert storage.read_bytes(uri) == content


@pytest.mark.parametrize("changed", [{"run": "r00002"}, {"manifest_sha256": "other"}, {"shard": 4}])
def test_the_part_of_other_work_is_never_taken_for_ours(tmp_path, rows: list[dict], changed: dict) -> None:
    uri = f"{tmp_path}/part-00003.parquet"
    _commit(uri, rows, str(tmp_path), **changed)
    with pytest.raises(ConfigError, match="not this run's work"):
        _commit(uri, rows, str(tmp_path))


def test_a_strange_file_is_no_part(tmp_path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"a": [1]}), tmp_path / "part-00000.parquet")
    with pytest.raises(StorageError, match="move it out of the table"):
        sink.read_footer(pq.read_metadata(tmp_path / "part-00000.parquet"), "part-00000.parquet")

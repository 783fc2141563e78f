"""What the table says: which images are done, and the newest row of each."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import sink, storage, table
from jobs.done import Done, done_before, still_failed
from jobs.manifest import identity, whole_identity
from jobs.table import read_masks

DIGEST = "0123456789" + "f" * 54
OTHER = "9" * 64
PERMANENT, PASSING = "decode", "gone"


@pytest.fixture
def commit(place: str):
    """Function: (run, shard, rows by key) -> a part in `place`; a row is None (a mask) or (error, attempts)."""

    def put(run: str, shard: int, rows: dict[str, tuple[str, int] | None], source: str = "s", etag: str = "e") -> None:
        uri = storage.join(sink.parts_uri(place, DIGEST, run), sink.part_name(shard))
        content = [_row(key, outcome, source, etag) for key, outcome in rows.items()]
        sink.commit(uri, content, run=run, manifest_sha256=run, shard=shard, seconds=0, root=place)

    return put


def _row(key: str, outcome: tuple[str, int] | None, source: str, etag: str) -> dict:
    error, attempts = outcome or (None, 1)
    mask = (
        {"height": 2, "width": 2, "window_h": 2, "window_w": 2, "mask_png": b"png", "class_pixels": [3, 1]}
        if outcome is None
        else {}
    )
    return (
        dict.fromkeys(sink.SCHEMA.names)
        | mask
        | {
            "key": key,
            "source_uri": source,
            "etag": etag,
            "window_y": 0,
            "window_x": 0,
            "num_windows": 1,
            "window_px": 0,
            "level": 1,
            "model_digest": DIGEST,
            "seconds": 0.0,
            "attempts": attempts,
            "error_code": error,
            "schema_version": 1,
        }
    )


def _done(place: str, *keys: str, source="s", etag="e", write=("parquet",), digest=DIGEST, **more) -> list[bool]:
    written = {f"r0000{number}": ("parquet", "png") for number in range(1, 5)} | more.pop("written", {})
    found = done_before(place, digest, sources={source}, write=write, written_by_run=written, **more)
    return found.lookup(_identities(*keys, source=source, etag=etag))[0].tolist()


def _identities(*keys: str, source: str = "s", etag: str = "e") -> np.ndarray:
    return np.array([identity(source, key, etag, 0, 0, 1, 0) for key in keys], "S16")


def test_nothing_is_done_where_there_is_no_table(place: str) -> None:
    assert _done(place, "a") == [False]


def test_masks_and_permanent_errors_are_done_and_passing_errors_are_not(place: str, commit) -> None:
    commit("r00001", 0, {"mask": None, "broken": (PERMANENT, 1), "gone": (PASSING, 1), "gone thrice": (PASSING, 3)})
    assert _done(place, "mask", "broken", "gone", "gone thrice", "unknown") == [True, True, False, True, False]


def test_failed_images_of_this_call_wait_for_the_next(place: str, commit) -> None:
    commit("r00001", 0, {"gone": (PASSING, 1)})
    assert _done(place, "gone", waiting={"r00001"}) == [True]


def test_the_newest_run_decides(place: str, commit) -> None:
    commit("r00001", 0, {"a": (PASSING, 1), "b": None})
    commit("r00002", 0, {"a": None})
    commit("r00003", 0, {"b": (PASSING, 1)})
    assert _done(place, "a", "b") == [True, False]


def test_attempts_are_those_of_the_newest_row(place: str, commit) -> None:
    commit("r00001", 0, {"a": (PASSING, 1)})
    commit("r00002", 0, {"a": (PASSING, 2)})
    found = done_before(place, DIGEST, sources={"s"}, write=["parquet"], written_by_run={"r00002": ["parquet"]})
    assert found.lookup(_identities("a", "unknown"))[1].tolist() == [2, 0]


def test_a_run_that_wrote_less_than_wanted_does_not_count(place: str, commit) -> None:
    commit("r00001", 0, {"a": None})
    written = {"r00001": ("parquet",)}
    assert _done(place, "a", write=("parquet",), written=written) == [True]
    assert _done(place, "a", write=("parquet", "png"), written=written) == [False]


def test_another_version_source_or_model_is_not_done(place: str, commit) -> None:
    commit("r00001", 0, {"a": None})
    assert _done(place, "a", etag="other") == [False]
    assert _done(place, "a", source="other") == [False]
    other = done_before(place, OTHER, sources={"s"}, write=[], written_by_run={"r00001": []})
    assert not other.lookup(_identities("a"))[0].any()


def test_a_version_that_comes_back_is_not_done_while_readers_see_another(place: str, commit) -> None:
    commit("r00001", 0, {"a": None, "b": None, "c": (PASSING, 2), "d": ("forgotten", 1)})
    commit("r00002", 0, {"a": None, "b": (PERMANENT, 1), "c": None, "d": None}, etag="other")
    assert _done(place, "a", "b", "c", "d") == [False, False, False, True]
    assert _done(place, "a", "b", "c", "d", etag="other") == [True] * 4
    written = {"r00001": ["parquet"], "r00002": ["parquet"]}
    found = done_before(place, DIGEST, sources={"s"}, write=["parquet"], written_by_run=written)
    assert found.attempts(_identities("c")).tolist() == [0]
    commit("r00003", 0, {"a": None, "c": (PASSING, 1)})
    assert _done(place, "a", "b", "c") == [True, False, False]
    assert _done(place, "a", "b", "c", etag="other") == [False, True, False]


def test_what_another_model_did_is_done_and_what_it_failed_at_is_not(place: str, commit) -> None:
    commit("r00001", 0, {"mask": None, "broken": (PERMANENT, 1), "gone": (PASSING, 3), "not wanted": ("forgotten", 1)})
    keys = "mask", "broken", "gone", "not wanted"
    assert _done(place, *keys, by_any=True) == [True] * 4
    assert _done(place, *keys, digest=OTHER, by_any=True, waiting={"r00001"}) == [True, False, False, True]
    assert _done(place, *keys, digest=OTHER) == [False] * 4
    found = done_before(
        place, OTHER, by_any=True, sources={"s"}, write=["parquet"], written_by_run={"r00001": ["parquet"]}
    )
    assert found.attempts(_identities(*keys)).tolist() == [0] * 4


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.integers(0, 3)), max_size=80))
def test_lookup_agrees_with_a_dictionary(newest_first: list[tuple[int, bool, int]]) -> None:
    oracle: dict[int, tuple[bool, int]] = {}
    for key, done, attempts in newest_first:
        oracle.setdefault(key, (done, attempts))
    found = Done()
    for key, done, attempts in newest_first:  # each a run of its own
        found.add(_identities(str(key)), np.array([done]), np.array([attempts], np.int16))
        found.end_run()
    settled, tries = found.lookup(_identities(*map(str, range(40))))
    wanted = [oracle.get(key, (False, 0)) for key in range(40)]
    assert settled.tolist() == [done for done, _ in wanted]
    assert tries.tolist() == [0 if done else attempts for done, attempts in wanted]


def test_read_masks_gives_the_newest_row_of_every_image(place: str, commit) -> None:
    commit("r00001", 0, {"a": None, "b": None})
    commit("r00001", 1, {"c": None})
    commit("r00002", 0, {"b": (PERMANENT, 1)}, etag="replaced")
    commit("r00002", 1, {"a": None}, source="another archive")
    masks = read_masks(place, DIGEST, ["key", "source_uri", "error_code"]).to_pylist()
    assert sorted((row["source_uri"], row["key"], row["run"], row["error_code"]) for row in masks) == [
        ("another archive", "a", "r00002", None),
        ("s", "a", "r00001", None),
        ("s", "b", "r00002", PERMANENT),
        ("s", "c", "r00001", None),
    ]
    assert read_masks(place, DIGEST[:10]).num_rows == 4
    assert read_masks(place, DIGEST).schema.names == [*sink.SCHEMA.names, "run"]


def test_read_masks_of_nothing_is_an_empty_table(place: str) -> None:
    assert read_masks(place, DIGEST).num_rows == 0


def test_parts_are_listed_in_order_and_strangers_are_not(place: str, commit) -> None:
    commit("r00002", 0, {"a": None})
    commit("r00001", 11, {"a": None})
    commit("r00001", 2, {"a": None})
    storage.write_bytes(storage.join(sink.parts_uri(place, DIGEST, "r00001"), "notes.txt"), b"")
    parts = table.list_parts(place, DIGEST)
    assert [(part.run, part.shard) for part in parts] == [("r00001", 2), ("r00001", 11), ("r00002", 0)]
    assert [part.shard for part in table.list_parts(place, DIGEST, "r00001")] == [2, 11]
    assert [footer.shard for footer in table.read_footers(parts)] == [2, 11, 0]


def test_a_version_that_was_replaced_is_not_tried_again(place: str, commit) -> None:
    commit("r00001", 0, {"a": (PASSING, 1), "b": (PASSING, 1), "c": (PASSING, 1)})
    commit("r00002", 0, {"a": (PASSING, 1), "b": None}, etag="replaced")
    commit("r00002", 1, {"c": (PASSING, 2)})
    assert still_failed(place, DIGEST, "r00001") == {("s", "c", 0, 0): 2}
    assert still_failed(place, DIGEST, "r00002") == {("s", "a", 0, 0): 1, ("s", "c", 0, 0): 2}
    commit("r00003", 0, {"c": None})
    assert still_failed(place, DIGEST, "r00001") == {}


# ---------------------------------------------------------------------------------------------- windows


@pytest.fixture
def commit_windows(place: str):
    """Function: (run, outcome by window_x of an image of three windows of 96) -> a part in `place`."""

    def put(run: str, outcomes: dict[int, tuple[str, int] | None], digest: str = DIGEST, **changed) -> None:
        grid = {"num_windows": 3, "window_px": 96, "height": 50, "width": 288, "model_digest": digest} | changed
        rows = [_row("big", outcome, "s", "e") | grid | {"window_x": x} for x, outcome in outcomes.items()]
        uri = storage.join(sink.parts_uri(place, digest, run), sink.part_name(0))
        sink.commit(uri, rows, run=run, manifest_sha256=run, shard=0, seconds=0, root=place)

    return put


def _windows_done(place: str, digest: str = DIGEST, window_px: int = 96, **more) -> int:
    written = {f"r0000{number}": ("parquet",) for number in range(1, 6)}
    done = done_before(place, digest, sources={"s"}, write=("parquet",), written_by_run=written, **more)
    (number,) = done.num_windows(np.array([whole_identity("s", "big", "e", window_px)], "S16")).tolist()
    return number


def test_an_image_is_done_when_all_its_windows_are(commit_windows, place: str) -> None:
    commit_windows("r00001", {0: None, 96: (PERMANENT, 1)})
    assert _windows_done(place) == 0
    commit_windows("r00002", {192: None})
    assert _windows_done(place) == 3
    assert _windows_done(place, window_px=128) == 0
    commit_windows("r00003", {0: (PASSING, 1)})  # the newest word counts
    assert _windows_done(place) == 0


def test_windows_that_readers_do_not_see_are_not_done(commit_windows, place: str) -> None:
    commit_windows("r00001", {0: None, 96: None, 192: None})
    commit_windows("r00002", {0: None}, num_windows=2, window_px=144)  # given up after one
    assert _windows_done(place) == 0
    commit_windows("r00003", {0: None, 96: None, 192: (PASSING, 1)})
    assert _windows_done(place) == 0
    commit_windows("r00004", {192: None})
    assert _windows_done(place) == 3
    commit_windows("r00005", {0: None}, etag="replaced", num_windows=1, window_px=0)
    assert _windows_done(place) == 0


def test_windows_of_two_models_are_no_image_together(commit_windows, place: str) -> None:
    commit_windows("r00001", {0: None, 96: None})
    commit_windows("r00002", {192: None}, digest="a" * 64)
    assert _windows_done(place, by_any=True) == 0
    commit_windows("r00003", {0: None, 96: None}, digest="a" * 64)
    assert _windows_done(place, by_any=True) == 3


def test_a_window_that_another_model_failed_at_is_not_done(commit_windows, place: str) -> None:
    commit_windows("r00001", {0: None, 96: (PERMANENT, 1), 192: None}, digest="a" * 64)
    assert _windows_done(place, by_any=True) == 0
    assert _windows_done(place, digest="a" * 64, by_any=True) == 3


def test_the_newest_windows_are_those_of_the_newest_grid(commit_windows, place: str) -> None:
    commit_windows("r00001", {0: None, 96: None, 192: (PASSING, 1)})
    commit_windows("r00002", {192: None})
    assert sorted(read_masks(place, DIGEST, ["window_x"])["window_x"].to_pylist()) == [0, 96, 192]
    assert read_masks(place, DIGEST, ["error_code"])["error_code"].null_count == 3
    commit_windows("r00003", {0: None, 144: None}, num_windows=2, window_px=144)
    newest = read_masks(place, DIGEST, ["window_x", "window_px"]).to_pylist()
    assert sorted((row["window_x"], row["window_px"]) for row in newest) == [(0, 144), (144, 144)]


def test_windows_of_an_older_grid_are_not_tried_again(commit_windows, place: str) -> None:
    commit_windows("r00001", {0: None, 96: (PASSING, 1), 192: (PASSING, 2)})
    assert still_failed(place, DIGEST, "r00001") == {("s", "big", 0, 96): 1, ("s", "big", 0, 192): 2}
    commit_windows("r00002", {96: None})
    assert still_failed(place, DIGEST, "r00001") == {("s", "big", 0, 192): 2}
    commit_windows("r00003", {0: None, 144: (PASSING, 1)}, num_windows=2, window_px=144)
    assert still_failed(place, DIGEST, "r00001") == {}

"""Objects in folders and in S3: what is written comes back, one writer wins, versions and errors are clear."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jobs import storage
from unetpp.errors import ConfigError, ImageError, StorageError

ODD_KEYS = ["plain.png", "with space.png", "a/b/c.png", "per%2Fcent.png", "plus+and&.png", "ünï/図.png", "new\nline"]


def _slow_down() -> bytes:
    body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
    return b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _listing(*keys: str, more: str = "") -> bytes:
    token = f"<NextContinuationToken>{more}</NextContinuationToken>" if more else ""
    found = "".join(f'<Contents><Key>{key}</Key><ETag>"tag"</ETag><Size>7</Size></Contents>' for key in keys)
    truncated = "true" if more else "false"
    body = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{token}{found}</ListBucketResult>"
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


# ---------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("key", ODD_KEYS)
def test_an_object_comes_back_as_it_was_written(place: str, key: str) -> None:
    storage.write_bytes(storage.join(place, key), b"first")
    storage.write_bytes(storage.join(place, key), b"second")
    (listed,) = storage.list_objects(place)
    assert (listed.key, listed.size_bytes) == (key, 6)
    assert storage.read_bytes(storage.join(place, key)) == b"second"
    assert storage.read_bytes(storage.join(place, key), listed.etag) == b"second"
    assert storage.exists(storage.join(place, key))
    assert not storage.exists(storage.join(place, key + "x"))


def test_one_object_is_found_as_it_is_listed(place: str) -> None:
    storage.write_bytes(storage.join(place, "a/b c.png"), b"content")
    (listed,) = storage.list_objects(storage.join(place, "a"))
    assert storage.find(storage.join(place, "a/b c.png")) == listed
    for absent in ("a", "a/b", "a/b c.png/d"):
        assert storage.find(storage.join(place, absent)) is None


def test_a_folder_and_a_prefix_list_the_same_keys(tmp_path: Path, s3_prefix: str) -> None:
    for key in ODD_KEYS:
        storage.write_bytes(storage.join(tmp_path, key), key.encode())
    storage.upload_folder(tmp_path, s3_prefix)
    in_s3 = [found.key for found in storage.list_objects(s3_prefix)]
    assert sorted(in_s3) == sorted(found.key for found in storage.list_objects(tmp_path)) == sorted(ODD_KEYS)
    assert in_s3 == sorted(in_s3, key=str.encode)


def test_a_listing_goes_on_after_a_page_and_after_a_failed_page(flaky_server) -> None:
    flaky_server.answers = [_listing("p/a", "p/b", more="token"), _slow_down(), _listing("p/c")]
    assert [found.key for found in storage.list_objects("s3://bucket/p")] == ["a", "b", "c"]
    assert ["continuation-token=token" in request for request in flaky_server.requests] == [False, True, True]


def test_a_listing_is_lazy(flaky_server) -> None:
    flaky_server.answers = [_listing("p/a", "p/b", more="token")]
    listing = storage.list_objects("s3://bucket/p")
    assert [next(listing).key, next(listing).key] == ["a", "b"]
    assert len(flaky_server.requests) == 1


KEYS_OF_MANY = {
    "folders beside objects": ["a", *(f"{letter}/{number}" for letter in "bcdef" for number in range(5)), "c.png", "z"],
    "one folder above many": [f"year/{month}/{number}" for month in range(4) for number in range(4)] + ["year/notes"],
    "more folders than a page": [f"{number:02d}/a" for number in range(12)],
    "objects above a single folder": ["a", *(f"deep/{number:02d}" for number in range(14))],
    "no folder": [f"{number:02d}" for number in range(14)],
}


@pytest.mark.parametrize("keys", KEYS_OF_MANY.values(), ids=KEYS_OF_MANY)
def test_a_long_listing_goes_side_by_side_and_finds_all_once_in_one_order(
    s3_prefix: str, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    monkeypatch.setattr("jobs.s3_listing.PAGE_KEYS", 8)
    monkeypatch.setattr("jobs.s3_listing.MAX_PAGES_IN_LINE", 1)
    monkeypatch.setattr("jobs.s3_listing.LISTINGS_AT_ONCE", 3)
    for key in keys:
        storage.write_bytes(f"{s3_prefix}/{key}", key.encode())
    found = list(storage.list_objects(s3_prefix))
    assert sorted(one.key for one in found) == sorted(keys)
    assert {one.size_bytes for one in found} == {len(key) for key in keys}
    assert list(storage.list_objects(s3_prefix)) == found


@pytest.mark.parametrize("span", [(0, 0), (0, 1), (3, 9), (0, 10), (10, 10)])
def test_a_range_of_a_version_is_read_or_nothing(place: str, span: tuple[int, int]) -> None:
    uri, content = f"{place}/a.bin", b"0123456789"
    storage.write_bytes(uri, content)
    (listed,) = storage.list_objects(place)
    assert storage.read_range(uri, *span, listed.etag) == content[slice(*span)]
    storage.write_bytes(uri, content[::-1])
    if span[0] < span[1]:
        with pytest.raises(ImageError, match="changed"):
            storage.read_range(uri, *span, listed.etag)
        storage.delete(uri)
        with pytest.raises(ImageError, match="gone"):
            storage.read_range(uri, *span, listed.etag)


def test_a_stream_is_read_in_pieces_from_anywhere(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK_BYTES", 7)
    content = bytes(range(100))
    storage.write_bytes(f"{place}/a.bin", content)
    (listed,) = storage.list_objects(place)
    stream = storage.open_stream(f"{place}/a.bin", listed.etag, listed.size_bytes)
    assert [stream.read(3), stream.read(20), stream.read(), stream.read(1)] == [
        content[:3],
        content[3:23],
        content[23:],
        b"",
    ]
    stream.seek(-10, 2)
    assert (stream.tell(), stream.read(4)) == (90, content[90:94])
    storage.write_bytes(f"{place}/a.bin", content[::-1])
    stream.seek(50)
    with pytest.raises(ImageError, match="changed"):
        stream.read(30)


def test_a_prefix_is_a_folder_not_the_start_of_a_name(s3_prefix: str) -> None:
    storage.write_bytes(f"{s3_prefix}/images/a.png", b"a")
    storage.write_bytes(f"{s3_prefix}/images-old/b.png", b"b")
    assert [found.key for found in storage.list_objects(f"{s3_prefix}/images")] == ["a.png"]
    assert [found.key for found in storage.list_objects(f"{s3_prefix}/images/")] == ["a.png"]


def test_folder_markers_of_consoles_are_not_images(s3_prefix: str) -> None:
    storage.write_bytes(f"{s3_prefix}/folder/", b"")
    storage.write_bytes(f"{s3_prefix}/folder/a.png", b"a")
    assert [found.key for found in storage.list_objects(s3_prefix)] == ["folder/a.png"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"a")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "below a file").symlink_to(tmp_path / "real" / "a.png" / "b.png")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    keys = {found.key for found in storage.list_objects(tmp_path)}
    assert {"real/a.png", "linked/a.png"} <= keys
    assert all(key.endswith("a.png") for key in keys)


@pytest.mark.parametrize("name", ["circle", "long" * 100])
def test_at_a_link_to_itself_and_at_a_name_that_no_file_can_have_there_is_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert storage.find(tmp_path / name) is None
    with pytest.raises(ConfigError, match=f"there is no folder .*{name}"):
        list(storage.list_objects(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=f"there is no file .*{name}"):
        storage.read_bytes(tmp_path / name)
    with pytest.raises(ImageError, match="gone"):
        storage.read_bytes(tmp_path / name, "some-etag")


def test_a_name_that_is_no_utf8_is_listed_and_reads_as_gone(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_bytes(b"a")
    (listed,) = storage.list_objects(tmp_path)
    assert listed.key == "bad\\xff.png"
    with pytest.raises(ImageError, match="gone"):
        storage.read_bytes(storage.join(tmp_path, listed.key), listed.etag)


def test_names_that_are_no_utf8_have_keys_that_no_other_file_has(tmp_path: Path) -> None:
    for name in (b"a\xff.png", b"a\\xff.png", b"\xfe\\xff", b"\\xfe\xff"):
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    found = list(storage.list_objects(tmp_path))
    assert {one.key for one in found} == {"a\\xff.png", "\\a\\xff.png", "\\xfe\\xff", "\\\\xfe\\xff"}
    for one in found:
        if one.key == "a\\xff.png":
            assert storage.read_bytes(storage.join(tmp_path, one.key), one.etag) == b"a\\xff.png"
        else:
            with pytest.raises(ImageError, match="gone"):
                storage.read_bytes(storage.join(tmp_path, one.key), one.etag)


# -------------------------------------------------------------------------------------------------- versions


def test_another_version_than_the_listed_one_is_changed(place: str) -> None:
    uri = storage.join(place, "a.png")
    storage.write_bytes(uri, b"one")
    (listed,) = storage.list_objects(place)
    storage.write_bytes(uri, b"two")
    with pytest.raises(ImageError, match="replaced") as caught:
        storage.read_bytes(uri, listed.etag)
    assert caught.value.code == "changed"


def test_an_object_deleted_after_the_listing_is_gone(place: str) -> None:
    with pytest.raises(ImageError) as caught:
        storage.read_bytes(storage.join(place, "never/was.png"), "some-etag")
    assert caught.value.code == "gone"


UNREADABLE = {"bad sector": "/proc/self/mem", "mode": "/proc/sys/vm/compact_memory"}
"""Regular files that Linux refuses to anybody: to be read, and to be opened."""


@pytest.mark.parametrize("target", UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_is_there_and_cannot_be_read_is_a_row(tmp_path: Path, target: str) -> None:
    uri = tmp_path / "a.png"
    uri.symlink_to(target)
    (listed,) = storage.list_objects(tmp_path)
    for read in (lambda: storage.read_bytes(uri, listed.etag), lambda: storage.read_range(uri, 0, 1, listed.etag)):
        with pytest.raises(ImageError, match=f"unreadable: {uri} cannot be read: .*check") as caught:
            read()
        assert caught.value.code == "unreadable"
    with pytest.raises(StorageError):  # whatever is wanted of no version is no image
        storage.read_bytes(uri)


def test_an_archived_object_is_to_be_restored(flaky_server) -> None:
    body = b"<Error><Code>InvalidObjectState</Code><Message>as told</Message></Error>"
    flaky_server.last = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with pytest.raises(ImageError, match=r"unreadable: s3://bucket/key is in an archive storage class .*restore it"):
        storage.read_bytes("s3://bucket/key", "tag")
    with pytest.raises(StorageError, match="restore it"):
        storage.read_bytes("s3://bucket/key")


def test_an_absent_object_that_was_not_listed_is_a_missing_file(place: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"never/was\.json"):
        storage.read_json(storage.join(place, "never/was.json"))


# --------------------------------------------------------------------------------------------- put if absent


def test_a_range_is_that_part_of_that_version(place: str) -> None:
    uri, content = storage.join(place, "a b.tif"), bytes(range(256)) * 40
    storage.write_bytes(uri, content)
    (listed,) = storage.list_objects(place)
    for start, stop in ((0, 1), (0, len(content)), (1000, 5000), (len(content) - 1, len(content))):
        assert storage.read_range(uri, start, stop, listed.etag) == content[start:stop]
    assert storage.read_range(uri, 3, 9) == content[3:9]
    time.sleep(0.01)
    storage.write_bytes(uri, content[::-1])
    with pytest.raises(ImageError, match="changed"):
        storage.read_range(uri, 3, 9, listed.etag)
    storage.delete(uri)
    with pytest.raises(ImageError, match="gone"):
        storage.read_range(uri, 3, 9, listed.etag)


def test_a_store_that_ignores_the_range_is_not_believed(flaky_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.s3_read.DAMAGED_TRIES", 2)
    with pytest.raises(ImageError, match=r"integrity: .*bytes 0-6/ came, bytes 2-4 was wanted"):
        storage.read_range("s3://bucket/key", 2, 5, "tag")


def test_a_file_that_is_copied_to_a_place_is_there_whole(place: str, tmp_path: Path) -> None:
    source, uri = tmp_path / "source.tif", storage.join(place, "deep/er/copy.tif")
    source.write_bytes(b"content")
    storage.upload_file(source, uri)
    storage.upload_file(source, uri)
    (listed,) = storage.list_objects(place)
    assert (listed.key, storage.read_bytes(uri)) == ("deep/er/copy.tif", b"content")


def test_a_copied_file_replaces_a_local_one(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        (tmp_path / "source.tif").write_bytes(content)
        storage.upload_file(tmp_path / "source.tif", tmp_path / "copy.tif")
    assert storage.read_bytes(tmp_path / "copy.tif") == b"second"


@pytest.mark.parametrize("size_bytes", [10, 11 << 20], ids=["in one piece", "in parts"])
def test_a_copied_file_replaces_no_object(s3_prefix: str, tmp_path: Path, size_bytes: int) -> None:
    uri, source = f"{s3_prefix}/mask.tif", tmp_path / "source.tif"
    first = np.random.default_rng(0).bytes(size_bytes)
    source.write_bytes(first)
    storage.upload_file(source, uri)
    storage.upload_file(source, uri)  # the same bytes are there: done
    source.write_bytes(first[::-1])
    with pytest.raises(ConfigError, match="there is another object"):
        storage.upload_file(source, uri)
    assert storage.read_bytes(uri) == first
    assert [found.size_bytes for found in storage.list_objects(s3_prefix)] == [size_bytes]


def test_a_file_is_copied_to_object_storage_in_little_memory(s3_prefix: str, tmp_path: Path) -> None:
    source = tmp_path / "source.tif"
    with source.open("wb") as file:
        file.truncate(96 << 20)
    storage.exists(f"{s3_prefix}/warm")
    tracemalloc.start()
    storage.upload_file(source, f"{s3_prefix}/mask.tif")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert storage.find(f"{s3_prefix}/mask.tif").size_bytes == 96 << 20
    assert peak < 48 << 20


def test_put_if_absent_never_changes_what_is_there(place: str) -> None:
    uri = storage.join(place, "table/part.parquet")
    assert storage.put_if_absent(uri, b"first", root=place)
    assert not storage.put_if_absent(uri, b"second", root=place)
    assert storage.read_bytes(uri) == b"first"
    assert [found.key for found in storage.list_objects(storage.join(place, "table"))] == ["part.parquet"]


def test_of_many_writers_at_once_one_wins(place: str) -> None:
    uri, start = storage.join(place, "part"), threading.Barrier(12)

    def put(writer: int) -> bool:
        start.wait()
        return storage.put_if_absent(uri, b"%d" % writer * 1000, root=place)

    with ThreadPoolExecutor(12) as threads:
        won = list(threads.map(put, range(12)))
    assert won.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True) * 1000


def test_a_killed_writer_leaves_whole_objects_only(tmp_path: Path) -> None:
    program = (
        "import itertools\n"
        "from jobs import storage\n"
        "for n in itertools.count():\n"
        f"    storage.put_if_absent(f'{tmp_path}/table/{{n}}', bytes([n % 251]) * 3_000_000, root='{tmp_path}')\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    table = tmp_path / "table"
    deadline = time.monotonic() + 60
    while not (table.is_dir() and len(list(table.iterdir())) >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.kill()
    writer.wait()
    objects = list(table.iterdir())
    assert len(objects) >= 3
    for path in objects:
        assert path.read_bytes() == bytes([int(path.name) % 251]) * 3_000_000


def test_scratch_left_by_killed_writers_is_removed_after_a_day(tmp_path: Path) -> None:
    scratch = tmp_path / storage.SCRATCH
    scratch.mkdir()
    (scratch / "old").write_bytes(b"")
    (scratch / "new").write_bytes(b"")
    os.utime(scratch / "old", (time.time() - 90_000,) * 2)
    storage.sweep_scratch(tmp_path)
    assert [path.name for path in scratch.iterdir()] == ["new"]


# --------------------------------------------------------------------------------------------------- retries


def test_a_store_that_is_busy_for_a_moment_is_asked_again(flaky_server) -> None:
    flaky_server.answers = [_slow_down(), b"", b'HTTP/1.1 200 OK\r\nETag: "tag"\r\nContent-Length: 7\r\n\r\ncon']
    assert storage.read_bytes("s3://bucket/key", "tag") == b"content"
    assert len(flaky_server.requests) == 4  # busy, hung up, cut short, whole


def test_retries_have_one_owner(flaky_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.s3_calls.MAX_ATTEMPTS", 4)
    flaky_server.last = _slow_down()
    with pytest.raises(StorageError, match="SlowDown"):
        storage.read_bytes("s3://bucket/key")
    assert len(flaky_server.requests) == 4


def test_a_conflict_of_two_conditional_writes_is_tried_again(flaky_server) -> None:
    flaky_server.answers = [b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n"]
    flaky_server.last = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    assert storage.put_if_absent("s3://bucket/key", b"content")
    assert len(flaky_server.requests) == 2


def test_a_lost_answer_counts_as_somebody_elses_write(flaky_server) -> None:
    flaky_server.answers = [b"", b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n"]
    assert not storage.put_if_absent("s3://bucket/key", b"content")


def test_a_refusal_is_not_tried_again(flaky_server) -> None:
    flaky_server.last = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(StorageError, match="forbids access to s3://bucket/key"):
        storage.write_bytes("s3://bucket/key", b"content")
    assert len(flaky_server.requests) == 1


# ---------------------------------------------------------------------------------------------------- errors


def test_a_bucket_that_does_not_exist_is_named(s3_environment) -> None:
    with pytest.raises(StorageError, match="there is no bucket 'absent-bucket'"):
        list(storage.list_objects("s3://absent-bucket/prefix"))


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named_and_not_shown(
    s3_environment, variable: str, monkeypatch: pytest.MonkeyPatch, no_secret_in: Callable[[str], None]
) -> None:
    monkeypatch.setenv(variable, "wrong-canary")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as caught:
        list(storage.list_objects("s3://archive/prefix"))
    no_secret_in(str(caught.value))
    assert "wrong-canary" not in str(caught.value)


def test_no_credentials_are_named(s3_environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no credentials"):
        list(storage.list_objects("s3://archive/prefix"))


def test_a_dead_endpoint_is_named_within_seconds(s3_environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer from http://127\.0\.0\.1:9 .*AWS_ENDPOINT_URL"):
        list(storage.list_objects("s3://archive/prefix"))
    assert time.monotonic() - started < 20


def test_an_address_that_makes_no_sense_is_the_callers_mistake(s3_environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not an address")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        list(storage.list_objects("s3://archive/prefix"))


def test_a_missing_folder_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*absent"):
        list(storage.list_objects(tmp_path / "absent"))
    assert list(storage.list_objects(tmp_path / "absent", missing_ok=True)) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="is a file; wanted a folder"):
        list(storage.list_objects(tmp_path / "file"))
    with pytest.raises(StorageError, match="a file is where a folder is wanted"):
        storage.put_if_absent(tmp_path / "file" / "below", b"", root=tmp_path)


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(StorageError):
            storage.put_if_absent(tmp_path / "table" / "part", b"x" * 5000, root=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(storage.list_objects(tmp_path)) == []


@pytest.mark.parametrize(
    "uri",
    [
        "gs://bucket/key",
        "odd://host/key",
        "s3a://bucket/key",
        "http://me:word@host/key",
        "file://host/key",
        "file:///data/run#2/images",
        "file:///data/run?2",
        "file:///data/images#",
        "s3:///key",
        "",
    ],
)
def test_a_scheme_that_cannot_be_opened_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError):
        storage.canonical(uri)


def test_one_place_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spellings = ["data", "./data/", f"{tmp_path}/data", f"file://{tmp_path}/data/", Path("data")]
    assert {storage.canonical(uri) for uri in spellings} == {f"{tmp_path}/data"}
    assert storage.canonical("s3://bucket/prefix/") == "s3://bucket/prefix"
    assert storage.canonical("file:///run%232/%3F") == storage.canonical("/run#2/?") == "/run#2/?"


@pytest.mark.parametrize("uri", ["s3://archive/team//masks", "s3://archive//masks"])
def test_nothing_is_written_below_a_name_that_is_empty(uri: str, s3_environment) -> None:
    for write in (storage.canonical_sink, storage.refuses_overwrites, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(ConfigError, match=r"has a doubled slash.* wanted s3://bucket/.*masks"):
            write(uri)
    assert storage.canonical(uri) == uri  # to read, it is a place as any other


# --------------------------------------------------------------------------------------------------- folders


def test_a_remote_folder_is_copied_once_per_content(
    s3_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "sub" / "weights").write_bytes(b"1")
    storage.upload_folder(tmp_path / "model", s3_prefix, last="config.json")
    first = storage.download_folder(s3_prefix)
    assert (first / "config.json").read_text() == "{}"
    assert (first / "sub" / "weights").read_bytes() == b"1"
    assert storage.download_folder(s3_prefix) == first
    storage.write_bytes(f"{s3_prefix}/sub/weights", b"2")
    second = storage.download_folder(s3_prefix)
    assert second != first
    assert (second / "sub" / "weights").read_bytes() == b"2"
    assert {path.name for path in (tmp_path / "cache" / "unetpp").iterdir()} == {first.name, second.name}


def test_a_local_folder_is_used_where_it_is(tmp_path: Path) -> None:
    assert storage.download_folder(tmp_path) == tmp_path


def test_a_folder_with_nothing_in_it_is_missing(s3_prefix: str, tmp_path: Path) -> None:
    for uri in (s3_prefix, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError):
            storage.download_folder(uri)


def test_an_object_cannot_climb_out_of_the_cache(flaky_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flaky_server.answers = [_listing("model/../../../evil")]
    with pytest.raises(StorageError, match="unsafe name"):
        storage.download_folder("s3://bucket/model")
    assert not list(tmp_path.rglob("evil"))


def test_a_store_that_keeps_what_is_there_is_told_from_one_that_overwrites(place: str) -> None:
    assert storage.refuses_overwrites(place)
    assert list(storage.list_objects(place)) == []  # the probe is gone


def test_a_place_that_cannot_be_written_is_known_before(place: str, tmp_path: Path) -> None:
    storage.refuse_unwritable(f"{place}/new/result.json")
    with pytest.raises(ConfigError, match="can be read, not written"):
        storage.refuse_unwritable("memory://result.json")
    for folder in (tmp_path, f"{place}/new/", "s3://archive"):
        with pytest.raises(ConfigError, match="is a folder; wanted the name of a file"):
            storage.refuse_unwritable(folder)


def test_a_server_that_ignores_the_condition_is_found_out(flaky_server) -> None:
    flaky_server.last = b"HTTP/1.1 204 No Content\r\n\r\n"
    assert not storage.refuses_overwrites("s3://bucket/out")


# -------------------------------------------------------------------------------------------------- storage profiles


@pytest.fixture
def profiles(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profile `lab` leads to the test's S3 server; the AWS_* variables lead nowhere, with other keys."""
    keys = f"aws_access_key_id = {s3_server['AWS_ACCESS_KEY_ID']}\n"
    keys += f"aws_secret_access_key = {s3_server['AWS_SECRET_ACCESS_KEY']}\n"
    endpoint = f"endpoint_url = {s3_server['AWS_ENDPOINT_URL']}\nregion = us-east-1\n"
    (tmp_path / "aws").write_text(
        f"[profile lab]\n{keys}{endpoint}\n[profile keyless]\n{endpoint}\n[profile aws]\n{keys}"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_a_profile_decides_alone(profiles: None, tmp_path: Path) -> None:
    root = f"s3://lab@archive/{tmp_path.name}"
    storage.write_bytes(f"{root}/a b@c.png", b"content")
    assert [found.key for found in storage.list_objects(root)] == ["a b@c.png"]
    assert storage.read_bytes(f"{root}/a b@c.png") == b"content"
    assert storage.put_if_absent(f"{root}/a b@c.png", b"other") is False
    with storage.arrow(f"{root}/a b@c.png") as (filesystem, path):
        assert filesystem.get_file_info(path).size == 7
    with pytest.raises(StorageError):
        storage.exists(storage.plain(f"{root}/a b@c.png"))
    with pytest.raises(StorageError, match="credentials"):
        storage.exists("s3://keyless@archive/x")


def test_the_environments_endpoint_is_not_a_profiles(profiles: None) -> None:
    from jobs import s3_uri

    assert s3_uri.endpoint_of("aws") == "https://s3.us-east-1.amazonaws.com"


def test_locations_are_told_without_their_profile() -> None:
    assert storage.plain("s3://lab@archive/a@b/c") == "s3://archive/a@b/c"
    assert storage.plain("s3://archive/a@b") == "s3://archive/a@b"
    assert storage.plain("/folder/s3") == "/folder/s3"
    assert storage.canonical("s3://lab@archive/a/") == "s3://lab@archive/a"


def test_an_unknown_profile_and_a_password_are_refused_in_a_sentence(profiles: None) -> None:
    with pytest.raises(ConfigError, match="there is no storage profile 'nobody'"):
        storage.exists("s3://nobody@archive/x")
    for look in (storage.canonical, storage.plain, storage.find, lambda uri: storage.write_bytes(uri, b"")):
        for uri in ("s3://me:hunter2@archive/x", "s3://me:2hunter/hunter2@archive/x"):
            with pytest.raises(ConfigError, match="never write one into a location") as refused:
                look(uri)
            assert "hunter" not in str(refused.value)
            assert "archive/x" in str(refused.value)


# ------------------------------------------------------------------------------------------------ damage on the way


def test_a_body_that_is_not_what_was_stored_is_asked_for_again(flaky_server) -> None:
    wrong = b'HTTP/1.1 200 OK\r\nETag: "9a0364b9e99bb480dd25e1f0284c8555"\r\nContent-Length: 7\r\n\r\ncontenT'
    flaky_server.last = wrong.replace(b"contenT", b"content")
    flaky_server.answers = [wrong, wrong]
    assert storage.read_bytes("s3://bucket/a") == b"content"
    flaky_server.last = wrong
    with pytest.raises(StorageError, match="damaged again and again"):
        storage.read_bytes("s3://bucket/a")
    with pytest.raises(ImageError) as caught:
        storage.read_bytes("s3://bucket/a", "9a0364b9e99bb480dd25e1f0284c8555")
    assert caught.value.code == "integrity"


def test_a_body_that_stays_damaged_until_the_time_is_up_is_the_objects_fault_too(
    flaky_server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.s3_calls.RETRY_SECONDS", 0.1)
    flaky_server.last = (
        b'HTTP/1.1 200 OK\r\nETag: "9a0364b9e99bb480dd25e1f0284c8555"\r\nContent-Length: 7\r\n\r\ncontenT'
    )
    with pytest.raises(ImageError, match=r"integrity: .*damaged again and again"):
        storage.read_bytes("s3://bucket/a", "9a0364b9e99bb480dd25e1f0284c8555")
    with pytest.raises(StorageError, match="damaged again and again"):
        storage.read_bytes("s3://bucket/a")


@pytest.mark.parametrize(
    "header", [b"x-amz-server-side-encryption: aws:kms", b"x-amz-server-side-encryption-customer-algorithm: AES256"]
)
def test_an_encrypted_objects_etag_is_no_checksum(flaky_server, header: bytes) -> None:
    flaky_server.last = (
        b'HTTP/1.1 200 OK\r\nETag: "00000000000000000000000000000000"\r\n'
        + header
        + b"\r\nContent-Length: 7\r\n\r\ncontent"
    )
    assert storage.read_bytes("s3://bucket/a") == b"content"


# ------------------------------------------------------------------------------------------------------- credentials


def test_credentials_are_fetched_anew_before_they_expire(
    s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a role are: a night is longer than they last."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    asked = tmp_path / "asked"
    program = tmp_path / "credentials.py"
    program.write_text(
        "import datetime, json\n"
        f"open({str(asked)!r}, 'a').write('x')\n"
        "until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=60)\n"
        f"print(json.dumps({{'Version': 1, 'AccessKeyId': {s3_server['AWS_ACCESS_KEY_ID']!r}, "
        f"'SecretAccessKey': {s3_server['AWS_SECRET_ACCESS_KEY']!r}, 'Expiration': until.isoformat()}}))\n"
    )
    (tmp_path / "aws").write_text(
        f"[profile role]\ncredential_process = {sys.executable} {program}\nregion = us-east-1\n"
        f"endpoint_url = {s3_server['AWS_ENDPOINT_URL']}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    uri = f"s3://role@archive/{tmp_path.name}"
    storage.write_bytes(uri, b"1")
    first = len(asked.read_text())
    storage.write_bytes(uri, b"2")
    with storage.arrow(uri) as (filesystem, path):
        assert filesystem.get_file_info(path).size == 1
    assert len(asked.read_text()) > first  # those that end within minutes are not used up to the last second

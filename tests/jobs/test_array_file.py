"""One file of arrays a node: built once, whatever is killed, cut short or full."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs import array_file
from jobs.array_file import Arrays, find, find_or_build
from unetpp.errors import StorageError

PIXELS = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
MASK = np.eye(7, dtype=np.uint8)

BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from jobs.array_file import find_or_build

log = Path(sys.argv[1])

def arrays():
    with log.open("a") as file:
        file.write("built\\n")
    for number in range(40):
        yield number, (np.full((100, 1000), number, np.uint8),)
        time.sleep(float(sys.argv[2]))

file = find_or_build("key", arrays)
assert all((file[number][0] == number).all() for number in range(40)), "damaged"
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's temporary folder, for this process and those it starts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def arrays() -> Iterator[tuple[int, Arrays]]:
    yield 1, (MASK,)
    yield 0, (PIXELS, MASK[::2])


def build(log: Path, pause_s: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", BUILD, str(log), str(pause_s)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def test_arrays_come_back_by_number() -> None:
    assert find("key") is None
    for file in (find_or_build("key", arrays), find_or_build("key", lambda: []), find("key")):
        assert file is not None
        assert len(file) == 2
        for found, written in zip((*file[0], *file[1]), (PIXELS, MASK[::2], MASK), strict=True):
            assert found.dtype == written.dtype
            np.testing.assert_array_equal(found, written)


def test_two_processes_at_once_build_one_file(tmp_path: Path) -> None:
    processes = [build(tmp_path / "log", 0.02) for _ in range(2)]
    assert [(process.wait(60), process.communicate()[1]) for process in processes] == [(0, "")] * 2
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_is_not_believed_and_is_done_again(tmp_path: Path) -> None:
    process = build(tmp_path / "log", 0.05)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob("*/*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert find("key") is None
    second = build(tmp_path / "log", 0)
    assert (second.wait(60), second.communicate()[1]) == (0, "")
    assert (tmp_path / "log").read_text() == "built\nbuilt\n"
    assert list(tmp_path.glob("*/*.part")) == []


@pytest.mark.parametrize("size_bytes", [0, 10, 200, -1, -40])
def test_a_file_that_was_cut_short_is_built_anew(tmp_path: Path, size_bytes: int) -> None:
    find_or_build("key", arrays)
    (path,) = tmp_path.glob("*/key.arrays")
    os.truncate(path, size_bytes if size_bytes >= 0 else path.stat().st_size + size_bytes)
    assert find("key") is None
    np.testing.assert_array_equal(find_or_build("key", arrays)[0][0], PIXELS)


def test_a_full_disk_ends_in_a_sentence(tmp_path: Path) -> None:
    folder = array_file.cache_dir()
    (folder / "key.part").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"no room for the decoded images; free some space, or set TMPDIR"):
        find_or_build("key", arrays)
    assert find("key") is None
    np.testing.assert_array_equal(find_or_build("key", arrays)[0][0], PIXELS)


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    array_file.cache_dir().chmod(0o777)
    with pytest.raises(StorageError, match="can be written by others"):
        find_or_build("key", arrays)


def test_what_nobody_opened_for_long_makes_room(tmp_path: Path) -> None:
    for key in ("old", "used"):
        find_or_build(key, arrays)
        (path,) = tmp_path.glob(f"*/{key}.arrays")
        os.utime(path, (0, 0))
    mapped = find_or_build("used", arrays)
    find_or_build("new", arrays)
    assert {path.name for path in tmp_path.glob("*/*.arrays")} == {"used.arrays", "new.arrays"}
    np.testing.assert_array_equal(mapped[0][0], PIXELS)

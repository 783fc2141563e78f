"""Many arrays in one local file, built once a node by whoever comes first; all map it, and read the pages they touch.

The file appears under its name whole or not at all: it is written beside it, behind a lock that a killed process lets
go, and renamed. Its end says how long it is, so that one that was cut short afterwards is not believed, and built anew.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetpp.errors import StorageError

logger = logging.getLogger(__name__)

Arrays = tuple[NDArray[Any], ...]

ALIGN_BYTES = 64
FOOTER = struct.Struct("<QQ16s")
MAGIC = b"unetpp arrays 1\n"
UNUSED_DAYS = 14


class ArrayFile:
    """Read-only arrays by number, as they were written."""

    def __init__(self, path: Path) -> None:
        """Map the file. ValueError where it is not whole, FileNotFoundError where there is none."""
        size_bytes = path.stat().st_size
        if size_bytes < FOOTER.size:
            raise ValueError(f"{path} is cut short")
        self._bytes = np.memmap(path, np.uint8, mode="r")
        start, length, magic = FOOTER.unpack(self._bytes[-FOOTER.size :].tobytes())
        if magic != MAGIC or start + length + FOOTER.size != size_bytes:
            raise ValueError(f"{path} is cut short, or no file of arrays")
        self._index: list[list[tuple[int, str, list[int]]]] = json.loads(self._bytes[start : start + length].tobytes())

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Arrays:
        return tuple(self._array(*place) for place in self._index[number])

    def _array(self, start: int, dtype: str, shape: list[int]) -> NDArray[Any]:
        return np.ndarray(shape, np.dtype(dtype), buffer=self._bytes, offset=start)


def cache_dir() -> Path:
    """The folder of this user's files below the node's temporary folder. StorageError where it is somebody else's."""
    folder = Path(tempfile.gettempdir()) / f"unetpp-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}; set TMPDIR to a folder of yours") from None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StorageError(f"{folder} can be written by others; remove it, or set TMPDIR to a folder of yours")
    return folder


def find(key: str) -> ArrayFile | None:
    """The file of this key, if this node has it whole."""
    path = _path(key)
    try:
        found = ArrayFile(path)
        os.utime(path)
    except (FileNotFoundError, ValueError):
        return None
    return found


def find_or_build(key: str, arrays: Callable[[], Iterable[tuple[int, Arrays]]]) -> ArrayFile:
    """The file of this key; where the node has none, made of (number, arrays), numbers 0.. in any order.

    One process builds, others wait for it. StorageError where there is no room.
    """
    path = _path(key)
    with _locked(path.with_suffix(".lock")):
        if (found := find(key)) is not None:
            return found
        _remove_unused(path.parent)
        arriving = path.with_suffix(".part")
        try:
            _write(arriving, arrays())
            arriving.replace(path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            why = "there is no room for the decoded images" if full else str(error.strerror)
            raise StorageError(f"{path}: {why}; free some space, or set TMPDIR to a folder on a larger disk") from error
        finally:
            arriving.unlink(missing_ok=True)
        return ArrayFile(path)


def _path(key: str) -> Path:
    return cache_dir() / f"{key}.arrays"


def _write(path: Path, arrays: Iterable[tuple[int, Arrays]]) -> None:
    index: dict[int, list[tuple[int, str, tuple[int, ...]]]] = {}
    with path.open("wb") as file:
        for number, several in arrays:
            places = index.setdefault(number, [])
            for array in several:
                file.write(bytes(-file.tell() % ALIGN_BYTES))
                places.append((file.tell(), array.dtype.str, array.shape))
                file.write(np.ascontiguousarray(array).data)
        content = json.dumps([index[number] for number in range(len(index))]).encode()
        start = file.tell()
        file.write(content + FOOTER.pack(start, len(content), MAGIC))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock of one that is killed is gone with it."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process of this node, which decodes these images")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(folder: Path) -> None:
    """Remove the files that nobody opened for long; who has one mapped keeps it."""
    for path in (*folder.glob("*.arrays"), *folder.glob("*.part")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > UNUSED_DAYS * 86_400:
                path.unlink()

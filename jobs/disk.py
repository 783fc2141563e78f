"""Local paths, for `jobs.storage` alone. An object's etag is `<size>-<mtime in ns>`."""

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from unetpp.errors import ConfigError, ImageError, StorageError

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run again; nothing is lost",
    errno.EDQUOT: "the disk quota is used up: free some space and run again; nothing is lost",
    errno.EROFS: "the file system is read-only: choose another folder, or mount it writable",
    errno.EACCES: "permission denied: check the owner and the mode",
    errno.EPERM: "not permitted: the file system may have no hard links, which commits need; choose another folder",
    errno.ENOTSUP: "the file system has no hard links, which commits need; choose another folder",
    errno.EIO: "the disk fails to read or write: check it",
    errno.ENOTDIR: "a file is where a folder is wanted: choose another folder, or move the file",
    errno.EEXIST: "a file is where a folder is wanted: choose another folder, or move the file",
    errno.ESTALE: "the network file system went away: mount it again",
}

_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What the system says of a path at which there is nothing: also of a link that leads to itself."""

_OF_ONE_FILE = (errno.EACCES, errno.EIO, errno.ENXIO, errno.ENODATA, errno.EBADMSG)
"""What it says of a file that it finds and cannot read: its mode, a bad sector, a wrong checksum."""

_syncfs = getattr(ctypes.CDLL(None), "syncfs", None)  # of Linux


def list_objects(root: str) -> Iterator[tuple[str, str, int]]:
    """(path below `root`, etag, size in bytes) of every regular file, in the order of these paths.

    Links are followed, loops are not entered.

    ConfigError where `root` is no folder.
    """
    with _translated(root):
        kind = _stat(root)
        if kind is None:
            raise ConfigError(f"there is no folder {root}: check the path")
        if not stat.S_ISDIR(kind.st_mode):
            raise ConfigError(f"{root} is a file; wanted a folder")
        yield from _walk(root, "", frozenset({(kind.st_dev, kind.st_ino)}))


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str, int]]:
    with os.scandir(folder) as entries:
        # As object stores list: by whole keys, in which the slash after a folder's name counts.
        # Of links os.path asks, since is_dir() fails on one that leads to itself.
        ordered = sorted(
            entries,
            key=lambda at: os.fsencode(at.name) + b"/" * (os.path.isdir(at) if at.is_symlink() else at.is_dir()),
        )
    given: set[str] = set()
    for entry in ordered:
        found = _stat(entry.path)
        if found is None:
            continue  # a link to nowhere or to itself, or deleted while we list
        key = prefix + _printable(folder, entry.name, given)
        if stat.S_ISREG(found.st_mode):
            yield key, _etag(found), found.st_size
        elif stat.S_ISDIR(found.st_mode) and (found.st_dev, found.st_ino) not in above:
            yield from _walk(entry.path, key + "/", above | {(found.st_dev, found.st_ino)})


def _printable(folder: str, name: str, given: set[str]) -> str:
    """The name; of one that is no UTF-8, a text that no file there has: a read then says `gone` in the image's row."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    if text != name:
        while text in given or os.path.lexists(os.path.join(folder, text)):
            text = f"\\{text}"
        given.add(text)
    return text


def find(path: str) -> tuple[str, int] | None:
    """(etag, size in bytes) of a regular file; None where there is none."""
    with _translated(path):
        found = _stat(path)
    return (_etag(found), found.st_size) if found is not None and stat.S_ISREG(found.st_mode) else None


def _stat(path: str) -> os.stat_result | None:
    """What is at a path, links followed; None where it leads nowhere."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno not in _NOWHERE:
            raise
        return None


def read(path: str, etag: str | None) -> bytes:
    """The file's bytes; with `etag`, of that version or ImageError `changed`, `gone` or `unreadable`."""
    return _read(path, etag, 0, None)


def read_range(path: str, start: int, stop: int, etag: str | None) -> bytes:
    """Bytes `start` to `stop` of the file; otherwise as `read`. StorageError where it ends before."""
    return _read(path, etag, start, stop)


def _read(path: str, etag: str | None, start: int, stop: int | None) -> bytes:
    with _translated(path):
        try:
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                file.seek(start)
                content = file.read(-1 if stop is None else stop - start)
                after = os.fstat(file.fileno())
        except OSError as error:
            if etag is not None and error.errno in _OF_ONE_FILE and _stat(path) is not None:
                raise ImageError("unreadable", f"{path} cannot be read: {_advice(error)}; it is tried again") from None
            if error.errno not in _NOWHERE:
                raise
            if etag is None:
                raise FileNotFoundError(f"there is no file {path}") from None
            raise ImageError("gone", f"{path} was deleted after it was listed") from None
    if etag is not None and not etag == _etag(before) == _etag(after):
        raise ImageError("changed", f"{path} was replaced after it was listed; the next run takes it")
    if stop is not None and len(content) != stop - start:
        raise StorageError(f"{path}: bytes {start} to {stop} are wanted, the file ends before")
    return content


def write(path: str, content: bytes, scratch_dir: str | None = None) -> None:
    """Write the file whole, over what is there: readers see the old or the new.

    From a file in `scratch_dir` (same file system), where leftovers are swept; default: the folder of the file.
    """
    _replace(path, lambda temporary: _write_synced(temporary, content), scratch_dir)


def copy(source: str, path: str) -> None:
    """Write a copy of the file `source`, over what is there: readers see the old or the new."""

    def write_copy(temporary: str) -> None:
        with open(source, "rb") as there, open(temporary, "xb") as here:
            shutil.copyfileobj(there, here, 1 << 20)
            here.flush()
            os.fsync(here.fileno())

    _replace(path, write_copy)


def _replace(path: str, write_to: Callable[[str], None], scratch_dir: str | None = None) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder if scratch_dir is None else scratch_dir, f".{name[:60]}.{uuid.uuid4().hex}")
    with _translated(path, writes=True):
        os.makedirs(folder or ".", exist_ok=True)
        if scratch_dir is not None:
            os.makedirs(scratch_dir, exist_ok=True)
        try:
            write_to(temporary)
            os.replace(temporary, path)
        finally:
            _unlink(temporary)


def put_if_absent(path: str, content: bytes, scratch_dir: str) -> bool:
    """Write the file whole unless its name is taken, then False.

    The name appears by `os.link`, which fails where it exists, from a synced file in `scratch_dir` (same file system):
    at no moment is there a torn file under the final name, whatever is killed.
    """
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(scratch_dir, uuid.uuid4().hex)
    with _translated(path, writes=True):
        if os.path.lexists(path):
            return False
        os.makedirs(scratch_dir, exist_ok=True)
        os.makedirs(folder, exist_ok=True)
        try:
            _write_synced(temporary, content)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        finally:
            _unlink(temporary)
        _sync_folder(folder)
    return True


def begin_put(path: str, content: bytes, scratch_dir: str) -> str | None:
    """Write the content to a file in `scratch_dir` (same file system), for `end_puts`. None where the name is taken."""
    temporary = os.path.join(scratch_dir, uuid.uuid4().hex)
    with _translated(path, writes=True):
        if os.path.lexists(path):
            return None
        os.makedirs(scratch_dir, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
        except BaseException:
            _unlink(temporary)
            raise
    return temporary


def end_puts(puts: Sequence[tuple[str, str]]) -> list[bool]:
    """Give many (temporary, path) their names, as `put_if_absent` does, with two syncs for all; False: it was taken."""
    is_new = []
    try:
        with _translated(puts[0][1] if puts else "", writes=True):
            sync_all([temporary for temporary, _ in puts])
            for temporary, path in puts:
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                try:
                    os.link(temporary, path)
                    is_new.append(True)
                except FileExistsError:
                    is_new.append(False)
            sync_all(list(dict.fromkeys(os.path.dirname(path) or "." for _, path in puts)))
    finally:
        for temporary, _ in puts:
            _unlink(temporary)
    return is_new


def sync_all(paths: Sequence[str]) -> None:
    """Make files, or folders, of one file system durable: by one call where the system has one for all of it."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if _syncfs is not None and not _syncfs(descriptor):
                return
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def delete(path: str) -> None:
    """Remove a file, if it is there."""
    with _translated(path):
        _unlink(path)


def age_s(path: str, scratch_dir: str) -> float | None:
    """Seconds since the file was written, None where it is absent: by its file system's clock, asked with a probe."""
    probe = os.path.join(scratch_dir, uuid.uuid4().hex)
    with _translated(path):
        try:
            written = os.stat(path).st_mtime
        except FileNotFoundError:
            return None
        os.makedirs(scratch_dir, exist_ok=True)
        try:
            with open(probe, "xb") as file:
                return os.fstat(file.fileno()).st_mtime - written
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(probe)


def sweep(scratch_dir: str, older_than_s: float) -> None:
    """Remove what killed processes left in a scratch folder."""
    with contextlib.suppress(OSError), os.scandir(scratch_dir) as entries:
        for entry in entries:
            if time.time() - entry.stat().st_mtime > older_than_s:
                os.unlink(entry.path)


def exists(path: str) -> bool:
    """Whether there is a file or folder of that name."""
    with _translated(path):
        return os.path.exists(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _write_synced(path: str, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


@contextlib.contextmanager
def _translated(path: str, *, writes: bool = False) -> Iterator[None]:
    """Errors of the file system become StorageError; who reads is told of an absent file by FileNotFoundError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not writes:
            raise
        raise StorageError(f"{error.filename or path}: {_advice(error)}") from error


def _advice(error: OSError) -> str:
    number = error.errno or 0
    return _ADVICE.get(number, os.strerror(number))

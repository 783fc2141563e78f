"""Tar archives, plain or in a stream of gzip or zstd: an index while streaming once, members by range or in one pass.

Headers are read here and not by `tarfile`, which ends at a damaged header as if the archive ended there, and takes as
much memory as an extended header asks for. Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended
Header"; GNU tar manual, "Basic Tar Format".
"""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from jobs.members import Limits, Member, name_of, refused, rest

BLOCK, PIECE = 512, 1 << 20
MAX_EXTENSION_BYTES = 1 << 20
"""Of a long name or a set of pax records."""


class Damaged(Exception):
    """The archive makes no sense from this offset on, or ends there."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class _Over(Exception):
    """The stream is further than it may be."""


class _Header(NamedTuple):
    name: bytes
    size_bytes: int
    refusal: str
    is_file: bool


class _Stream:
    """A tar being read from its start: how far, and no further than a bomb may go."""

    def __init__(self, stream: BinaryIO, kind: str, max_bytes: int) -> None:
        self._stream = stream if kind == "tar" else pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), kind)
        self._can_seek = kind == "tar"
        self.offset, self.max_bytes = 0, max_bytes

    def pieces(self, num_bytes: int) -> Iterator[bytes]:
        """The next bytes, in pieces. Damaged where they are not all there."""
        while num_bytes:
            try:
                piece = self._stream.read(min(num_bytes, PIECE))
            except (OSError, pa.ArrowException) as error:  # of the codec; the store has errors of its own
                raise Damaged(self.offset) from error
            if not piece:
                raise Damaged(self.offset)
            self.offset += len(piece)
            num_bytes -= len(piece)
            yield piece

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        return b"".join(self.pieces(num_bytes))

    def skip(self, num_bytes: int) -> None:
        """Go on after the next bytes."""
        if self._can_seek:
            self._stream.seek(num_bytes, 1)
            self.offset += num_bytes
            return
        for _ in self.pieces(num_bytes):
            pass


def index(stream: BinaryIO, kind: str, archive_bytes: int, limits: Limits) -> Iterator[Member]:
    """Every member, in order, from one pass over the archive; last what is left out, if anything is."""
    tar = _Stream(stream, kind, limits.max_bytes(archive_bytes) if kind != "tar" else archive_bytes)
    num_members = 0
    try:
        while (header := _header(tar)) is not None:
            position = tar.offset
            if num_members == limits.max_members:
                yield rest("count", position)
                return
            if position + header.size_bytes > tar.max_bytes:
                yield rest("damaged" if kind == "tar" else "bomb", position)
                return
            name, leads_out = name_of(header.name)
            refusal = header.refusal or ("outside" if leads_out else "")
            if header.is_file and not refusal and header.size_bytes > limits.max_member_bytes:
                refusal = "size"
            if refusal or not header.is_file:
                tar.skip(header.size_bytes)
                etag = refused(refusal)
            else:
                digest = hashlib.sha256()
                for piece in tar.pieces(header.size_bytes):
                    digest.update(piece)
                etag = digest.hexdigest()
            if refusal or header.is_file:
                num_members += 1
                yield Member(name, etag, header.size_bytes, position)
            tar.skip(-header.size_bytes % BLOCK)
    except Damaged as damaged:
        yield rest("damaged", damaged.offset)
    except _Over:
        yield rest("unended" if kind == "tar" else "bomb", tar.offset)


def read_streamed(stream: BinaryIO, kind: str, places: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes at each (position, size) of an unpacked tar, in rising order. Damaged where it ends before."""
    tar = _Stream(stream, kind, 0)
    for position, size_bytes in places:
        tar.skip(position - tar.offset)
        yield tar.take(size_bytes)


def _header(tar: _Stream) -> _Header | None:
    """The next member's header, extensions applied; None at the end mark. Damaged or _Over where there is none."""
    name: bytes | None = None
    records: dict[bytes, bytes] = {}
    while True:
        if tar.offset + BLOCK > tar.max_bytes:
            raise _Over
        block = tar.take(BLOCK)
        if not block.strip(b"\0"):
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise Damaged(tar.offset - BLOCK) from error
        if info.size < 0:
            raise Damaged(tar.offset - BLOCK)
        match info.type:
            case tarfile.GNUTYPE_LONGNAME:
                name = _extension(tar, info.size).split(b"\0")[0]
            case tarfile.GNUTYPE_LONGLINK | tarfile.XGLTYPE:
                _extension(tar, info.size)
            case tarfile.XHDTYPE | tarfile.SOLARIS_XHDTYPE:
                at, content = tar.offset, _extension(tar, info.size)
                records = _records(content, at)
            case _:
                return _described(tar, block, info, name, records)


def _described(
    tar: _Stream, block: bytes, info: tarfile.TarInfo, name: bytes | None, records: dict[bytes, bytes]
) -> _Header:
    size_bytes, refusal = info.size, ""
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse.") for key in records):
        refusal = "sparse"
    elif info.issym() or info.islnk():
        refusal = "link"
    elif info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE):
        refusal = "special"
    if info.type == tarfile.GNUTYPE_SPARSE and block[482]:
        while tar.take(BLOCK)[504]:
            pass
    if b"size" in records:
        if not _is_number(records[b"size"]):
            raise Damaged(tar.offset)
        size_bytes = int(records[b"size"])
    if info.issym() or info.islnk() or info.isdev() or info.isdir():
        size_bytes = 0  # whatever they say, no bytes follow
    told = records.get(b"path") or name or info.name.encode("utf-8", "surrogateescape")
    return _Header(told, size_bytes, refusal, not info.isdir())


def _extension(tar: _Stream, size_bytes: int) -> bytes:
    if size_bytes > MAX_EXTENSION_BYTES:
        raise Damaged(tar.offset)
    content = tar.take(size_bytes)
    tar.skip(-size_bytes % BLOCK)
    return content


def _records(content: bytes, offset: int) -> dict[bytes, bytes]:
    """pax records: `<length> <key>=<value>\\n` each."""
    records = {}
    while content.strip(b"\0"):
        number, blank, _ = content.partition(b" ")
        length = int(number) if _is_number(number) else 0
        key, equals, value = content[len(number) + 1 : length - 1].partition(b"=")
        if not blank or not equals or length > len(content):
            raise Damaged(offset)
        records[key] = value
        content = content[length:]
    return records


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) < 20

"""Zip archives: the central directory by range reads, members by range reads; nothing is unpacked to disk.

Source: PKWARE, APPNOTE.TXT 6.3.10, sections 4.3 and 4.4. Read here and not by `zipfile`, which refuses a whole archive
for one odd name and believes members that share their bytes. Without a central directory, as where the end was cut off,
the members' own headers are walked from the start.
"""

import io
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.members import Limits, Member, crc_and_size, name_of, refused, rest

STORED, DEFLATED = 0, 8
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_MAX_COMMENT = 65_535
_FULL = 0xFFFFFFFF
_UNIX = 3


class _Entry(NamedTuple):
    name: bytes
    position: int
    packed_bytes: int
    size_bytes: int
    crc: int
    method: int
    flags: int
    mode: int


class Places(NamedTuple):
    """Where members are: sorted local header offsets, where each ends at the latest, packed sizes and methods."""

    positions: NDArray[np.int64]
    stops: NDArray[np.int64]
    packed_bytes: NDArray[np.int64]
    methods: NDArray[np.int16]

    def extent(self, position: int) -> tuple[int, int]:
        """The bytes of the archive that hold a member: header, name, content and what may follow."""
        at = np.searchsorted(self.positions, position)
        return position, int(self.stops[at])

    def unpack(self, content: bytes, position: int, size_bytes: int) -> bytes | None:
        """The member in the bytes of its extent; None where they make no sense."""
        if len(content) < _LOCAL.size or content[:4] != b"PK\3\4":
            return None
        at = np.searchsorted(self.positions, position)
        *_, num_name, num_extra = _LOCAL.unpack_from(content)
        start = _LOCAL.size + num_name + num_extra
        packed = content[start : start + int(self.packed_bytes[at])]
        if self.methods[at] == STORED:
            return packed
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size_bytes + 1)
        except zlib.error:
            return None


def index(stream: BinaryIO, archive_bytes: int, limits: Limits) -> Iterator[Member]:
    """Every member, in the order of the directory; last what is left out, if anything is."""
    entries, end = _entries(stream, archive_bytes, limits.max_members)
    shared = _overlapping(entries)
    total, max_bytes = 0, limits.max_bytes(archive_bytes)
    for entry in entries:
        total += entry.size_bytes
        if total > max_bytes:
            yield rest("bomb", entry.position)
            return
        if entry.name.endswith(b"/"):
            continue
        name, leads_out = name_of(entry.name)
        refusal = _refusal(entry, limits) or ("outside" if leads_out else "")
        refusal = refusal or ("overlap" if entry.position in shared else "")
        etag = refused(refusal) if refusal else crc_and_size(entry.crc, entry.size_bytes)
        yield Member(name, etag, entry.size_bytes, entry.position)
    if end is not None:
        yield end


def places(stream: BinaryIO, archive_bytes: int, limits: Limits) -> Places:
    """Where the members of `index` are."""
    entries, _ = _entries(stream, archive_bytes, limits.max_members)
    entries.sort(key=lambda entry: entry.position)
    positions = np.array([entry.position for entry in entries], np.int64)
    packed = np.array([entry.packed_bytes for entry in entries], np.int64)
    longest = positions + packed + _LOCAL.size + 2 * _MAX_COMMENT
    stops = np.minimum(np.append(positions[1:], archive_bytes), np.minimum(longest, archive_bytes))
    return Places(positions, stops, packed, np.array([entry.method for entry in entries], np.int16))


def _refusal(entry: _Entry, limits: Limits) -> str:
    if entry.mode and not stat.S_ISREG(entry.mode):
        return "link" if stat.S_ISLNK(entry.mode) else "special"
    if entry.flags & 0x2041:  # encrypted, strongly encrypted, directory masked
        return "encrypted"
    if entry.method not in (STORED, DEFLATED):
        return "method"
    return "size" if max(entry.size_bytes, entry.packed_bytes) > limits.max_member_bytes else ""


def _overlapping(entries: list[_Entry]) -> set[int]:
    """Local header offsets of members that share bytes."""
    shared, stop, last = set(), 0, 0
    for entry in sorted(entries, key=lambda entry: entry.position):
        if entry.position < stop:
            shared |= {last, entry.position}
        end = entry.position + _LOCAL.size + len(entry.name) + entry.packed_bytes
        if end > stop:
            stop, last = end, entry.position
    return shared


def _entries(stream: BinaryIO, archive_bytes: int, max_members: int) -> tuple[list[_Entry], Member | None]:
    """The directory's entries, and what is left out, if anything is."""
    found: list[_Entry] = []
    where = _directory(stream, archive_bytes)
    if where is None:
        reading, word = _walk(stream), "damaged"
    else:
        reading, word = _central(stream, *where), ""
    try:
        for entry in reading:
            if len(found) == max_members:
                return found, rest("count", entry.position)
            found.append(entry)
    except EOFError as end:
        return found, rest("damaged", int(end.args[0]))
    return found, rest(word, stream.tell()) if word else None


def _directory(stream: BinaryIO, archive_bytes: int) -> tuple[int, int, int] | None:
    """(offset, size, what to add to offsets in it) of the central directory; None where there is none."""
    start = max(0, archive_bytes - _END.size - _MAX_COMMENT)
    stream.seek(start)
    tail = stream.read(archive_bytes - start)
    at = len(tail)
    while (at := tail.rfind(b"PK\5\6", 0, at)) >= 0:
        if at + _END.size <= len(tail):
            *_, size, offset, num_comment = _END.unpack_from(tail, at)
            if at + _END.size + num_comment <= len(tail):
                break
    else:
        return None
    end = start + at
    if at >= _LOCATOR64.size and tail[at - _LOCATOR64.size :][:4] == b"PK\6\7":
        end = _LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)[2]
        stream.seek(end)
        if len(record := stream.read(_END64.size)) < _END64.size or record[:4] != b"PK\6\6":
            return None
        *_, size, offset = _END64.unpack(record)
    before = end - size - offset  # bytes put before the archive, as in one that unpacks itself
    return None if before < 0 else (offset + before, size, before)


def _central(stream: BinaryIO, offset: int, size: int, before: int) -> Iterator[_Entry]:
    stream.seek(offset)
    stop = offset + size
    while (at := stream.tell()) < stop:
        fields = _CENTRAL.unpack(_exactly(stream, _CENTRAL.size, at))
        if fields[0] != b"PK\1\2":
            raise EOFError(at)
        _, made_by, _, flags, method, _, _, crc, packed, unpacked, *lengths, _, _, attributes, position = fields
        num_name, num_extra, num_comment = lengths[:3]
        name = _exactly(stream, num_name, at)
        sizes = _large(_exactly(stream, num_extra, at), [unpacked, packed, position])
        _exactly(stream, num_comment, at)
        mode = attributes >> 16 if made_by >> 8 == _UNIX else 0
        yield _Entry(name, sizes[2] + before, sizes[1], sizes[0], crc, method, flags, mode if stat.S_IFMT(mode) else 0)


def _walk(stream: BinaryIO) -> Iterator[_Entry]:
    """Entries from the members' own headers, as far as they are whole. EOFError with the offset of the torn one."""
    stream.seek(0)
    while True:
        position = stream.tell()
        signature = stream.read(4)
        if signature in (b"PK\1\2", b"PK\5\6"):  # a directory, torn
            stream.seek(position)
            return
        header = signature + _exactly(stream, _LOCAL.size - 4, position)
        _, _, flags, method, _, _, crc, packed, unpacked, num_name, num_extra = _LOCAL.unpack(header)
        if signature != b"PK\3\4":
            raise EOFError(position)
        name = _exactly(stream, num_name, position)
        unpacked, packed, _ = _large(_exactly(stream, num_extra, position), [unpacked, packed, 0])
        if flags & 8 and not packed:
            crc, packed, unpacked = _measured(stream, method, position)
        else:
            _pass_over(stream, packed, position)
        yield _Entry(name, position, packed, unpacked, crc, method, flags & ~8, 0)


def _measured(stream: BinaryIO, method: int, position: int) -> tuple[int, int, int]:
    """(CRC, packed size, size) of a member whose header does not tell: found by unpacking it. Moves past it."""
    if method != DEFLATED:
        raise EOFError(position)
    inflate, start, crc, size = zlib.decompressobj(-zlib.MAX_WBITS), stream.tell(), 0, 0
    try:
        while not inflate.eof:
            packed = inflate.unconsumed_tail or _exactly(stream, 1, position) + stream.read(io.DEFAULT_BUFFER_SIZE)
            piece = inflate.decompress(packed, 1 << 20)
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    except zlib.error:
        raise EOFError(position) from None
    stop = stream.tell() - len(inflate.unused_data)
    stream.seek(stop)
    descriptor = _exactly(stream, 16, position)
    if descriptor[:4] != b"PK\7\10":
        stream.seek(stop + 12)
    return crc, stop - start, size


def _large(extra: bytes, sizes: list[int]) -> list[int]:
    """Sizes and offset, those that are full replaced by the values of the Zip64 extra field, in its order."""
    sizes, at = list(sizes), 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            numbers = [number for (number,) in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])]
            for which in [which for which in range(3) if sizes[which] == _FULL]:
                if numbers:
                    sizes[which] = numbers.pop(0)
        at += 4 + length
    return sizes


def _exactly(stream: BinaryIO, num_bytes: int, position: int) -> bytes:
    content = stream.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError(position)
    return content


def _pass_over(stream: BinaryIO, num_bytes: int, position: int) -> None:
    if num_bytes:
        stream.seek(num_bytes - 1, io.SEEK_CUR)
        _exactly(stream, 1, position)

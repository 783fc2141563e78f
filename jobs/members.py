"""What a member of an archive is: its key, its version, and why it is not read.

A member that is listed and never read says so in its etag: `refused:<word>`; so does what is left of an archive that
ends too early, under the archive's own key: `refused:<word>:<the archive's etag>`.
"""

import hashlib
import re
import zlib
from typing import NamedTuple

from unetpp.errors import ImageError, ImageErrorCode

SLACK_BYTES = 256 << 20
"""What every archive may unpack to, whatever its own size."""

KINDS = {".tar": "tar", ".tar.gz": "gzip", ".tgz": "gzip", ".tar.zst": "zstd", ".tzst": "zstd", ".zip": "zip"}
KINDS |= {".parquet": "parquet"}
STREAMED = ("gzip", "zstd", "parquet")
"""Kinds that can be read from their start only, or from that of a row group, which may be the whole file."""

_SUFFIX = "|".join(map(re.escape, sorted(KINDS, key=len, reverse=True)))
_ARCHIVE = re.compile(f".*?({_SUFFIX})", re.IGNORECASE | re.DOTALL)
_MEMBER = re.compile(f"(.*?(?:{_SUFFIX}))#(.*)", re.IGNORECASE | re.DOTALL)

_REFUSALS: dict[str, tuple[ImageErrorCode, str]] = {
    "link": ("archive", "is a link, and links are not followed: pack the file itself"),
    "special": ("archive", "is a device, a pipe or the like, and no file"),
    "sparse": ("archive", "is stored as a sparse file: pack it without --sparse"),
    "encrypted": ("archive", "is encrypted: pack it without a password"),
    "method": ("archive", "is compressed in a way that is not read; members are stored or deflated"),
    "outside": ("archive", "has a name that leads out of the archive: pack it under a plain relative path"),
    "earlier": ("archive", "is replaced by a later member of the same name, as it is where archives are unpacked"),
    "nested": ("archive", "is an archive inside of an archive, which is not opened: unpack it once"),
    "overlap": ("archive", "shares bytes with another member: the archive is damaged, or made to do damage"),
    "empty": ("archive", "has no bytes in its image column"),
    "size": ("too_large", "is larger than max_member_mb"),
    "named": ("archive", "is an object whose name reads as a member of an archive: rename it"),
    "absent": ("gone", "was not there when it was listed; the next run looks again"),
    "gone": ("gone", "was deleted while it was listed; the next run looks again"),
    "changed": ("changed", "was replaced while it was listed; the next run looks again"),
    "integrity": ("integrity", "arrived with a wrong checksum while it was listed; the next run looks again"),
    "unreadable": ("unreadable", "could not be read while it was listed: see its mode, disk or storage class"),
    "damaged": ("archive", "cannot be read from byte {position} on: damaged, cut short, or not what its name says"),
    "rows": ("archive", "cannot be read from row {position} on: damaged, cut short, or not what its name says"),
    "table": ("archive", "has no column of image bytes: name one with image_column"),
    "names": ("archive", "has no column of the name that name_column says"),
    "unended": ("archive", "ends at byte {position} without the mark of an end: it may be cut short"),
    "count": ("too_large", "has more than max_members members: those from {position} on are left out"),
    "bomb": ("too_large", "unpacks to more than max_ratio times its size: members from {position} on are left out"),
}


class Limits(NamedTuple):
    """What an archive may hold; beyond, members or the rest of it become rows."""

    max_members: int
    max_member_bytes: int
    max_ratio: float

    def max_bytes(self, archive_bytes: int) -> int:
        """What an archive of that size may unpack to, all in all."""
        return max(SLACK_BYTES, int(self.max_ratio * archive_bytes))


class Member(NamedTuple):
    """One file in an archive; with an empty name, the rest of an archive that cannot be read to its end."""

    name: str
    etag: str
    size_bytes: int
    position: int
    """Of its data in the (unpacked) tar, of its local header in the zip, or its row in the Parquet file."""


def rest(word: str, position: int) -> Member:
    """What follows in an archive from `position` on, and is left out for one reason."""
    return Member("", word, 0, position)


def kind_of(key: str) -> str | None:
    """Of an archive: tar, gzip, zstd, zip or parquet; None for other objects."""
    found = _ARCHIVE.fullmatch(key)
    return None if found is None else KINDS[found[1].lower()]


def split(key: str) -> tuple[str, str] | None:
    """(key of the archive, name of the member), None for a key without a member."""
    found = _MEMBER.fullmatch(key)
    return None if found is None else (found[1], found[2])


def refused(word: str, archive_etag: str | None = None) -> str:
    """The etag of what is listed and never read."""
    return f"refused:{word}" if archive_etag is None else f"refused:{word}:{archive_etag}"


def refusal(etag: str, position: int) -> ImageError | None:
    """Why a listed member, or the rest of an archive, is not read; None for what is."""
    if not etag.startswith("refused:"):
        return None
    code, sentence = _REFUSALS[etag.split(":")[1]]
    return ImageError(code, "it " + sentence.format(position=position))


def name_of(raw: bytes) -> tuple[str, bool]:
    """(a member's name as text, whether it leads out of its archive). Different names give different texts.

    Bytes that are no UTF-8 are percent-escaped, and so are percent signs; `./` and doubled slashes go, as they do where
    archives are unpacked.
    """
    text = raw.decode("utf-8", "surrogateescape").replace("%", "%25")
    text = re.sub("[\udc80-\udcff]", lambda byte: f"%{ord(byte[0]) - 0xDC00:02X}", text)
    name = "/".join(part for part in text.split("/") if part not in ("", "."))
    return name or "%.", ".." in re.split(r"[/\\]", name) or not name


def superseded(name: str, position: int) -> str:
    """The name of a member that a later one of the same name replaces: no other member's."""
    return f"{name}%@{position}"


def plain_name(name: str) -> str:
    """The name that a member has in the archive, replaced or not."""
    return name.rpartition("%@")[0] if "%@" in name else name


def only_last(members: list[Member]) -> list[Member]:
    """Refuse every member but the last of each name, as the tools that unpack archives do."""
    seen: set[bytes] = set()
    kept = []
    for member in reversed(members):
        digest = hashlib.blake2b(member.name.encode(), digest_size=16).digest()
        if digest in seen and member.name:
            name = superseded(member.name, member.position)
            member = member._replace(name=name, etag=refused("earlier"))
        seen.add(digest)
        kept.append(member)
    kept.reverse()
    return kept


def sha256(content: bytes) -> str:
    """The etag of a member of a tar or a Parquet file."""
    return hashlib.sha256(content).hexdigest()


def crc_and_size(crc: int, size_bytes: int) -> str:
    """The etag of a member of a zip."""
    return f"{crc:08x}-{size_bytes}"


def is_whole(content: bytes, etag: str) -> bool:
    """Whether these are the bytes that the member was listed with."""
    if "-" in etag:
        return crc_and_size(zlib.crc32(content), len(content)) == etag
    return sha256(content) == etag

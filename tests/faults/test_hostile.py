"""An archive made to break the program: every file becomes one row, good images keep their masks, memory is bounded."""

import io
import os
import struct
import threading
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs import guarded
from jobs.contract import ExitCode, PredictResult
from jobs.sink import png_key
from tests.faults import hostile_decoder as hostile
from tests.faults.invariants import assert_complete
from unetpp.images import decode_mask


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _black_png(side: int, *, with_pixels: bool) -> bytes:
    """A square 1-bit PNG: whole, or its header alone."""
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    pixels = b""
    if with_pixels:
        packer, row = zlib.compressobj(9), bytes(1 + (side + 7) // 8)
        pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + header + _png_chunk(b"IDAT", pixels) + _png_chunk(b"IEND", b"")


def _good(seed: int, suffix: str = "png", side: int = 40) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG", "tif": "TIFF"}[suffix])
    return buffer.getvalue()


def _tiff_that_loops() -> bytes:
    """A TIFF whose only directory is its own successor, and has no pixels."""
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8)


GOOD = {
    "plain.png": _good(0),
    "a/b.png": _good(1),
    "a%2Fb.png": _good(2),  # escapes as the one above would, were escaping not injective
    "..b/..png": _good(3),
    "new\nline.png": _good(4),
    unicodedata.normalize("NFC", "twin-é.png"): _good(5),
    unicodedata.normalize("NFD", "twin-é.png"): _good(6),
    "x.png": _good(7),
    "x.png.png": _good(8),
    "x.y0_x0.png": _good(9),
    "long-" + "n" * 240 + ".png": _good(10),
    "last.png": _good(11),
}
BAD = {
    "bomb-header.png": (_black_png(60_000, with_pixels=False), "too_large"),
    "bomb.png": (_black_png(60_000, with_pixels=True), "too_large"),
    "segfault.png": (hostile.SEGFAULT, "crash"),
    "loop.png": (hostile.LOOP, "timeout"),
    "sleep.png": (hostile.SLEEP, "timeout"),
    "eat.png": (hostile.EAT, "too_large"),
    "lie.png": (hostile.LIE, "crash"),
    "cut.jpg": (_good(20, "jpg", 300)[:2000], "decode"),
    "bad-sum.png": (_good(21)[:-20] + b"\0" * 20, "decode"),
    "empty.png": (b"", "decode"),
    "error-page.jpg": (b"<html><body>404 Not Found</body></html>", "decode"),
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "decode"),
    "paper.png": (b"%PDF-1.7\n", "decode"),
    "loop.tif": (_tiff_that_loops(), "decode"),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The hostile archive."""
    folder = tmp_path / "images"
    for key, content in (GOOD | {key: content for key, (content, _) in BAD.items()}).items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """[resident bytes of this process and its children, at their highest while the block ran]."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def test_a_hostile_archive_becomes_rows(
    segment: Callable[..., PredictResult], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "DECODER", "tests.faults.hostile_decoder:decode")
    before = psutil.Process().memory_info().rss
    with _peak_memory() as peak:
        result = segment(
            input=str(images), include=("*",), decode_seconds=4.0, decode_memory_mb=512, max_pixels=10_000_000
        )
    assert (result.status, result.exit_code) == ("partial", ExitCode.DONE_WITH_FAILED_IMAGES)
    failed = {key: code for key, (_, code) in BAD.items()}
    rows = assert_complete(str(tmp_path / "out"), result.model_digest, GOOD.keys() | BAD.keys(), failed=failed)
    assert peak[0] - before < 1_500 << 20

    quiet = tmp_path / "good"
    for key, content in GOOD.items():
        path = quiet / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    alone = segment(input=str(quiet), output=str(tmp_path / "alone"), include=("*",))
    wanted = assert_complete(str(tmp_path / "alone"), alone.model_digest, GOOD.keys())
    masks = {row["key"]: row["mask_png"] for row in wanted}
    assert {row["key"]: row["mask_png"] for row in rows if row["mask_png"]} == masks
    for row in rows:
        if row["mask_png"]:
            assert decode_mask(row["mask_png"]).shape == (40, 40)
            assert row["mask_uri"].endswith("/" + png_key(row["key"]))


def test_nothing_is_written_outside_of_the_output(segment, images: Path, tmp_path: Path) -> None:
    segment(input=str(images), include=("*b*",), max_pixels=10_000_000)
    roots = {os.path.relpath(path, tmp_path).split(os.sep)[0] for path in tmp_path.rglob("*")}
    assert roots == {"images", "out"}

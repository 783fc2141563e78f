"""Archives made to break the program, or cut short; and runs that are killed in the middle of one."""

import gzip
import io
import signal
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs import archives, members, predict, storage
from jobs.contract import ExitCode, PredictConfig, PredictResult
from jobs.table import list_parts
from tests.faults.invariants import assert_complete, rows_of
from tests.faults.stepper import Stepper, Stopped, die, stepped
from tests.jobs.test_archives import PACKED, listed, read, tar_of, zip_of


def _png(seed: int, side: int = 24) -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = {f"{number}.png": _png(number) for number in range(6)}


def _codes(place: str | Path, **options: Any) -> dict[str, str | None]:
    """Error code of everything that is listed, None where its bytes are there."""
    found = listed(str(place), **options)
    contents = read(str(place), found)
    assert len({one.key for one in found}) == len(found)
    return {one.key: getattr(content, "code", None) for one, content in zip(found, contents, strict=True)}


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


# ------------------------------------------------------------------------------------------------ hostile


def test_links_devices_and_names_that_lead_out_are_rows(segment, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(_png(9))
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as packed:
        for name in ("a.png", "../up.png", "d/../../up.png", "/etc/abs.png", "..\\back.png"):
            info = tarfile.TarInfo(name)
            info.size = len(GOOD["0.png"])
            packed.addfile(info, io.BytesIO(GOOD["0.png"]))
        packed.addfile(_special("soft.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")))
        packed.addfile(_special("hard.png", tarfile.LNKTYPE, "a.png"))
        packed.addfile(_special("null.png", tarfile.CHRTYPE))
        packed.addfile(_special("pipe.png", tarfile.FIFOTYPE))
        packed.addfile(_special("folder.png", tarfile.DIRTYPE))
    with zipfile.ZipFile(tmp_path / "in" / "y.zip", "w") as zipped:
        for name, mode in (("soft.png", 0o120777), ("pipe.png", 0o010644), ("a.png", 0o100644), ("b.png", 0o644)):
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, mode << 16
            zipped.writestr(entry, GOOD["1.png"])
        zipped.writestr("../up.png", GOOD["1.png"])
    failed = {f"x.tar#{name}": "archive" for name in ("../up.png", "d/../../up.png", "..\\back.png")}
    failed |= {f"x.tar#{name}.png": "archive" for name in ("soft", "hard", "null", "pipe")}
    failed |= {f"y.zip#{name}.png": "archive" for name in ("soft", "pipe", "../up")}
    good = {"x.tar#a.png", "x.tar#etc/abs.png", "y.zip#a.png", "y.zip#b.png"}
    result = segment(input=f"{tmp_path}/in")
    assert (result.status, result.exit_code) == ("partial", ExitCode.DONE_WITH_FAILED_IMAGES)
    assert_complete(f"{tmp_path}/out", result.model_digest, good | failed.keys(), failed=failed)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "secret.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"table", "png", "runs", "indexes", ".tmp"}
    assert segment(input=f"{tmp_path}/in").status == "unchanged"


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip", "x.parquet"])
def test_of_members_of_one_name_the_last_one_counts(tmp_path: Path, name: str) -> None:
    twice = [("a.png", GOOD["0.png"]), ("b.png", GOOD["1.png"]), ("./a.png", GOOD["2.png"]), ("a.png", GOOD["3.png"])]
    (tmp_path / name).write_bytes(PACKED[name](_Pairs(twice)))
    found = listed(str(tmp_path))
    contents = dict(zip((one.key for one in found), read(str(tmp_path), found), strict=True))
    assert contents[f"{name}#a.png"] == GOOD["3.png"]
    assert contents[f"{name}#b.png"] == GOOD["1.png"]
    earlier = [content for key, content in contents.items() if key.startswith(f"{name}#a.png%@")]
    assert [content.code for content in earlier] == ["archive"] * 2
    assert len(contents) == 4


class _Pairs(dict[str, bytes]):
    """Files of which several may have one name."""

    def __init__(self, pairs: list[tuple[str, bytes]]) -> None:
        super().__init__()
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._pairs)

    def values(self) -> Any:
        return [content for _, content in self._pairs]

    def __len__(self) -> int:
        return len(self._pairs)


def test_names_that_are_no_utf8_stay_apart(segment, tmp_path: Path) -> None:
    names = [b"a\xff.png", b"a%FF.png", b"a\xfe.png", "ä.png".encode(), "ä.png".encode("latin-1")]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "x.tar", "w", format=tarfile.GNU_FORMAT) as packed:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(GOOD[f"{number}.png"])
            packed.addfile(info, io.BytesIO(GOOD[f"{number}.png"]))
    flat = zip_of({f"{number}-name.png": GOOD[f"{number}.png"] for number in range(5)})
    for number, name in enumerate(names):
        flat = flat.replace(f"{number}-name.png".encode(), name.rjust(10, b"_"))
    (tmp_path / "in" / "y.zip").write_bytes(flat)
    escaped = ["a%FF.png", "a%25FF.png", "a%FE.png", "ä.png", "%E4.png"]
    keys = [f"x.tar#{name}" for name in escaped]
    keys += [f"y.zip#{'_' * (10 - len(raw))}{name}" for raw, name in zip(names, escaped, strict=True)]
    result = segment(input=f"{tmp_path}/in")
    assert_complete(f"{tmp_path}/out", result.model_digest, keys)


def test_what_unpacks_to_far_more_than_its_size_ends_in_a_row(
    segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "SLACK_BYTES", 8 << 20)
    (tmp_path / "in").mkdir()
    black = bytes(3 << 20)
    bomb = {"0.png": GOOD["0.png"], **{f"bomb-{number}.png": black for number in range(8)}, "1.png": GOOD["1.png"]}
    for name in ("x.tar.gz", "x.tar.zst", "x.zip", "x.parquet"):
        (tmp_path / "in" / name).write_bytes(PACKED[name](bomb))
    tracemalloc.start()
    result = segment(input=f"{tmp_path}/in", max_ratio=50, max_member_mb=64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows = {row["key"]: row["error_code"] for row in rows_of(f"{tmp_path}/out", result.model_digest)}
    for name in ("x.tar.gz", "x.tar.zst", "x.zip"):
        assert rows[name] == "too_large"
        assert rows[f"{name}#0.png"] is None
        assert f"{name}#1.png" not in rows
        assert rows[f"{name}#bomb-0.png"] == "decode"  # read, and no image
    assert rows["x.parquet"] == "too_large"
    assert peak < 64 << 20


def test_a_member_above_the_cap_is_a_row_and_is_not_read(tmp_path: Path) -> None:
    files = {"0.png": GOOD["0.png"], "large.png": bytes(2 << 20), "1.png": GOOD["1.png"]}
    for name, pack in PACKED.items():
        (tmp_path / name).write_bytes(pack(files))
    codes = _codes(tmp_path, max_member_mb=1)
    for name in PACKED:
        assert {key: codes[f"{name}#{key}"] for key in files} == {
            "0.png": None,
            "large.png": "too_large",
            "1.png": None,
        }


def test_members_beyond_the_cap_are_one_row(tmp_path: Path) -> None:
    for name, pack in PACKED.items():
        (tmp_path / name).write_bytes(pack(GOOD))
    codes = _codes(tmp_path, max_members=4)
    for name in PACKED:
        assert codes[name] == "too_large"
        assert [f"{name}#{number}.png" in codes for number in range(6)] == [True] * 4 + [False] * 2


def test_an_archive_in_an_archive_is_not_opened(segment, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inner = zip_of(GOOD)
    for name, pack in PACKED.items():
        if name != "x.parquet":
            (tmp_path / "in" / name).write_bytes(pack({"0.png": GOOD["0.png"], "inner.zip": inner}))
    assert set(_codes(tmp_path / "in").values()) == {None}
    assert len(_codes(tmp_path / "in")) == 4
    codes = _codes(tmp_path / "in", include=["*"])
    assert {code for key, code in codes.items() if key.endswith("inner.zip")} == {"archive"}
    assert not any("1.png" in key for key in codes)


def test_encrypted_and_oddly_packed_members_are_rows(tmp_path: Path) -> None:
    plain = bytearray(zip_of(GOOD))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        plain[plain.find(signature) + offset] |= 1  # the first member says that it is encrypted
    (tmp_path / "a.zip").write_bytes(plain)
    (tmp_path / "b.zip").write_bytes(zip_of(GOOD, zipfile.ZIP_LZMA))
    codes = _codes(tmp_path)
    assert [codes[f"a.zip#{name}"] for name in GOOD] == ["archive", *[None] * 5]
    assert {codes[f"b.zip#{name}"] for name in GOOD} == {"archive"}


def test_members_that_share_their_bytes_are_rows(tmp_path: Path) -> None:
    """The trick of the densest bombs: many entries of a directory, one and the same content."""
    packed = bytearray(zip_of(GOOD))
    first = packed.find(b"PK\1\2")
    second = packed.find(b"PK\1\2", first + 4)
    packed[second + 42 : second + 46] = packed[first + 42 : first + 46]
    (tmp_path / "x.zip").write_bytes(packed)
    codes = _codes(tmp_path)
    assert [codes[f"x.zip#{name}"] for name in GOOD] == ["archive", "archive", *[None] * 4]


def test_a_sparse_member_is_a_row(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as packed:
        info = tarfile.TarInfo("sparse.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sparse.png"}
        info.size = 512
        packed.addfile(info, io.BytesIO(bytes(512)))
        info = tarfile.TarInfo("0.png")
        info.size = len(GOOD["0.png"])
        packed.addfile(info, io.BytesIO(GOOD["0.png"]))
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    assert _codes(tmp_path) == {"x.tar#sparse.png": "archive", "x.tar#0.png": None}


def test_many_members_cost_little(tmp_path: Path) -> None:
    number = 100_000
    header = tarfile.TarInfo("0" * 9).tobuf(tarfile.USTAR_FORMAT)
    checksum = int(header[148:154], 8)
    plain = io.BytesIO()
    for member in range(number):
        name = b"%09d" % member
        plain.write(name + header[9:148] + b"%06o\0 " % (checksum + sum(name) - 9 * ord("0")) + header[156:])
    plain.write(bytes(1024))
    (tmp_path / "x.tar.zst").write_bytes(pa.compress(plain.getvalue(), codec="zstd", asbytes=True))
    entries = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 39 * member)
        + b"%09d" % member
        for member in range(number)
    )
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 9, 0)
    body = b"".join(local + b"%09d" % member for member in range(number))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, number % 65536, number % 65536, len(entries), len(body), 0)
    (tmp_path / "y.zip").write_bytes(body + entries + end)
    found = listed(str(tmp_path), include=["*9999"])
    assert [one.key for one in found] == [
        f"{name}#{member:09d}" for name in ("x.tar.zst", "y.zip") for member in range(9999, number, 10_000)
    ]


def test_headers_that_ask_for_memory_are_damage(tmp_path: Path) -> None:
    info = _special("x", tarfile.XHDTYPE)
    info.size = 1 << 40
    for name, kind in (("a", tarfile.XHDTYPE), ("b", tarfile.GNUTYPE_LONGNAME)):
        info.type = kind
        content = tar_of({"0.png": GOOD["0.png"]})
        end = len(content.rstrip(b"\0")) // 512 * 512 + 512
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(content[:end] + info.tobuf(tarfile.GNU_FORMAT)))
    codes = _codes(tmp_path)
    assert codes == {"a.tar.gz#0.png": None, "a.tar.gz": "archive", "b.tar.gz#0.png": None, "b.tar.gz": "archive"}


# ------------------------------------------------------------------------------------------------ damaged


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("share", [0.02, 0.55, 0.97])
def test_an_archive_that_was_cut_keeps_what_lies_before_the_cut(tmp_path: Path, name: str, share: float) -> None:
    files = {f"{number:02d}.png": _png(number, 300) for number in range(12)}
    whole = PACKED[name](files)
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    codes = _codes(tmp_path)
    assert codes.pop(name) == "archive"
    assert set(codes.values()) <= {None}
    assert list(codes) == [f"{name}#{key}" for key in files][: len(codes)]
    num_lost = {"x.tar": 0, "x.zip": 0, "x.tar.gz": 4, "x.tar.zst": 4}  # what a codec had not given out yet is lost
    assert len(codes) >= (0 if name == "x.parquet" else int(12 * share) - num_lost[name])


def test_the_row_of_a_cut_archive_says_from_where_on_and_comes_once(segment, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    whole = tar_of(GOOD)
    cut = whole.find(GOOD["3.png"]) + 100
    (tmp_path / "in" / "x.tar").write_bytes(whole[:cut])
    result = segment(input=f"{tmp_path}/in")
    kept = {f"x.tar#{number}.png" for number in range(3)}
    rows = assert_complete(f"{tmp_path}/out", result.model_digest, {*kept, "x.tar"}, failed={"x.tar": "archive"})
    (row,) = [row for row in rows if row["error_code"]]
    assert f"from byte {cut - 100} on" in row["error"]
    assert segment(input=f"{tmp_path}/in").status == "unchanged"


def test_a_tar_without_its_end_mark_says_so(tmp_path: Path) -> None:
    whole = tar_of(GOOD)
    (tmp_path / "x.tar").write_bytes(whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512])
    codes = _codes(tmp_path)
    assert codes == {**{f"x.tar#{name}": None for name in GOOD}, "x.tar": "archive"}


@pytest.mark.parametrize("name", PACKED)
def test_one_spoilt_byte_costs_no_more_than_it_must(tmp_path: Path, name: str) -> None:
    whole = bytearray(PACKED[name](GOOD))
    at = whole.find(GOOD["2.png"][40:80]) if name in ("x.tar", "x.zip") else len(whole) // 2
    whole[at] ^= 0x55
    (tmp_path / name).write_bytes(whole)
    codes = _codes(tmp_path)
    assert set(codes) <= {name, *(f"{name}#{key}" for key in GOOD)}
    if name == "x.zip":
        assert codes == {f"{name}#{key}": "archive" if key == "2.png" else None for key in GOOD}
    if name == "x.tar":  # a tar has no checksum of its members: what was stored is what was sent
        assert set(codes.values()) == {None}


@pytest.mark.parametrize("name", [*PACKED, "x.tgz"])
@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"no archive at all" * 100, bytes(2000), b"\x1f\x8b" * 300])
def test_what_is_no_archive_is_one_row(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    codes = _codes(tmp_path)
    if name == "x.tar" and content == bytes(2000):
        assert codes == {}  # an empty tar
    else:
        assert codes == {name: "archive"}


@pytest.mark.parametrize("seed", range(40))
def test_no_spoilt_archive_ends_the_program(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name, pack in PACKED.items():
        whole = bytearray(pack(GOOD))
        for at in rng.integers(0, len(whole), 1 + seed % 5):
            whole[at] = rng.integers(256)
        stop = len(whole) if seed % 3 else int(rng.integers(len(whole)))
        (tmp_path / name).write_bytes(whole[:stop])
    codes = _codes(tmp_path)
    assert set(codes.values()) <= {None, "archive", "too_large"}


# ------------------------------------------------------------------------------------------------ killed


@pytest.fixture
def packed_images(tmp_path: Path) -> tuple[Path, set[str]]:
    """(folder with an archive of each kind, the keys in them)."""
    folder = tmp_path / "packed"
    folder.mkdir()
    files = {f"{number}.png": _png(number) for number in range(4)}
    for name, pack in PACKED.items():
        (folder / name).write_bytes(pack(files))
    return folder, {f"{name}#{key}" for name in PACKED for key in files}


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_run_over_archives_killed_at_any_storage_call_is_finished_by_the_next(
    segment: Callable[..., PredictResult], packed_images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: Any
) -> None:
    monkeypatch.setattr(storage, "NUM_THREADS", 1)
    monkeypatch.setattr("jobs.sources.ARCHIVES_AT_ONCE", 1)
    folder, keys = packed_images
    with stepped(Stepper()) as stepper:
        undisturbed = segment(input=str(folder), output=f"{tmp_path}/undisturbed")
    digest = undisturbed.model_digest
    masks = {row["key"]: row["mask_png"] for row in rows_of(f"{tmp_path}/undisturbed", digest)}
    assert set(masks) == keys
    for at in range(1, stepper.num_calls + 1, 11):
        archives._places.cache_clear()
        output = f"{tmp_path}/{at}"
        with stepped(Stepper(at, side, die)), pytest.raises(Stopped):
            segment(input=str(folder), output=output)
        segment(input=str(folder), output=output)
        assert_complete(output, digest, keys, masks=masks)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_kill_9_in_the_middle_of_an_archive_loses_nothing_and_does_nothing_twice(
    tiny_model: Path, run_unetpp, kill_tree, tmp_path: Path, name: str
) -> None:
    files = {f"{number:02d}.png": _png(number, 400) for number in range(24)}
    (tmp_path / name).write_bytes(PACKED[name](files))
    words = ["predict", "--model", tiny_model, "--input", tmp_path / name, "--output", tmp_path / "out"]
    words += ["--backend", "inline", "--threads", "1", "--shard-images", "2"]
    process = run_unetpp(*words)
    while len(list((tmp_path / "out").rglob("part-*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    kill_tree(process)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("part-*.parquet")}
    assert 3 <= len(parts) < 12
    config = PredictConfig.model_validate(
        {"model": str(tiny_model), "input": f"{tmp_path}/{name}", "output": f"{tmp_path}/out", "backend": "inline"}
        | {"threads": 1, "shard_images": 2}
    )
    result = predict.run(config)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert_complete(f"{tmp_path}/out", result.model_digest, {f"{name}#{key}" for key in files})
    assert len(list_parts(f"{tmp_path}/out", result.model_digest)) == 12
    assert process.returncode == -signal.SIGKILL

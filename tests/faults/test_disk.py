"""A disk that fills: the run stops and says so, nothing half written is believed, and with room again it goes on."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import disk
from jobs.contract import ExitCode, PredictResult
from tests.faults.invariants import assert_complete
from unetpp.checkpoint import digest, from_pretrained
from unetpp.errors import StorageError

FILL_AND_FREE = """
set -u
mount -t tmpfs -o size={size}k tmpfs "$OUT"
{predict}; echo "$?" >> "$CODES"
find "$OUT/table" -name '*.parquet' | wc -l >> "$CODES"
mount -o remount,size=64m "$OUT"
{predict}; echo "$?" >> "$CODES"
cp -a "$OUT/." "$KEPT"
"""


def _may_mount() -> bool:
    """Whether this account may mount a file system in a namespace of its own."""
    if (unshare := shutil.which("unshare")) is None:
        return False
    words = [unshare, "-rm", "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="a file system of its own needs unprivileged namespaces")
@pytest.mark.parametrize("size", [48, 96, 128])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(
    tiny_model: Path, archive: Path, masks: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    for name in ("out", "kept"):
        (tmp_path / name).mkdir()
    words = [sys.executable, "-m", "jobs.cli", "predict", "--model", tiny_model, "--input", archive]
    words += ["--output", tmp_path / "out", "--backend", "inline", "--threads", "1", "--shard-images", "4"]
    script = FILL_AND_FREE.format(size=size, predict=" ".join(f"'{word}'" for word in words))
    names = {"OUT": tmp_path / "out", "KEPT": tmp_path / "kept", "CODES": tmp_path / "codes"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env={**os.environ, **{name: str(path) for name, path in names.items()}},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    codes = [int(word) for word in (tmp_path / "codes").read_text().split()]
    assert codes[0] == ExitCode.STORAGE, done.stderr
    assert codes[1] < 3 or size > 100  # parts; a large enough disk fills at the report
    assert codes[2] == ExitCode.DONE, done.stderr
    assert "the disk is full" in done.stderr
    # The masks are named where they were written: the copy takes that place.
    (tmp_path / "out").rmdir()
    (tmp_path / "kept").rename(tmp_path / "out")
    model_digest = digest(from_pretrained(tiny_model, 2), mode="fast", precision="f32")
    (sealed,) = (tmp_path / "out" / "runs").glob("*/_SUCCESS.json")
    assert json.loads(sealed.read_text())
    assert_complete(str(tmp_path / "out"), model_digest, masks, masks=masks, runs=(sealed.parent.name,))


@pytest.mark.parametrize("call", [*range(0, 24, 3)])
def test_a_write_that_finds_no_room_leaves_nothing_under_its_name(
    segment: Callable[..., PredictResult],
    masks: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    left = call
    sync = os.fsync

    def full(file: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_syncfs", None)  # so that every sync is one of these
        patch.setattr(disk.os, "fsync", full)
        with pytest.raises(StorageError, match="the disk is full"):
            segment(lease_s=1)
    result = segment(lease_s=1)  # where there was no room to give the lease back, it has to run out
    assert result.exit_code == ExitCode.DONE
    assert_complete(str(tmp_path / "out"), result.model_digest, masks, masks=masks, runs=result.runs)

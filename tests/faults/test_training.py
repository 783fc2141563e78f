"""Training that is broken on purpose: it ends with the weights of an undisturbed run, after as many steps."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from jobs import checkpoints
from jobs.contract import ExitCode, SynthConfig, TrainConfig, TrainResult
from jobs.synth import run as synthesise
from tests.faults.test_disk import _may_mount
from unetpp.checkpoint import from_pretrained

Start = Callable[..., subprocess.Popen[str]]
Kill = Callable[[subprocess.Popen[str]], None]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(folder), num=10, size=64, seed=5))
    return folder


@pytest.fixture(scope="module")
def config_file(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers, six epochs of a second or so."""
    config = TrainConfig.model_validate(
        {
            "name": "tiny",
            "data": str(data_dir),
            "output": "given by each test",
            "model": {"level": 2, "filters": [8, 16, 32]},
            "crop_px": 64,
            "batch_size": 8,
            "epochs": 6,
            "steps_per_epoch": 12,
            "warmup_steps": 2,
            "num_workers": 2,
            "threads_per_worker": 1,
        }
    )
    file = tmp_path_factory.mktemp("config") / "train.yaml"
    file.write_text(config.model_dump_json())
    return file


def ended(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == ExitCode.DONE, said


def trained(output: Path) -> TrainResult:
    (file,) = output.glob("*/result.json")
    return TrainResult.model_validate_json(file.read_text())


@pytest.fixture(scope="module")
def undisturbed(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("undisturbed")
    words = [sys.executable, "-m", "jobs.cli", "train", "--config", str(config_file), "--output", str(output)]
    done = subprocess.run(
        words,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.DONE, done.stderr
    return trained(output)


def assert_same(result: TrainResult, undisturbed: TrainResult) -> None:
    """As many epochs and steps, and the same weights."""
    assert (result.epochs, result.steps) == (undisturbed.epochs, undisturbed.steps) == (6, 72)
    ours, theirs = (from_pretrained(each.model_uri).state_dict() for each in (result, undisturbed))
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=1e-5, msg=name)


def wait_for_epoch(process: subprocess.Popen[str], output: Path, epoch: int) -> None:
    deadline = time.monotonic() + 300
    while not list(output.glob(f"*/checkpoints/epoch_{epoch:04d}.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Those that train."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if any("RayTrainWorker" in word for word in child.cmdline())]


def test_a_worker_killed_in_mid_epoch_changes_nothing(
    config_file: Path, undisturbed: TrainResult, tmp_path: Path, run_unetpp: Start
) -> None:
    process = run_unetpp("train", "--config", config_file, "--output", tmp_path)
    wait_for_epoch(process, tmp_path, 1)
    time.sleep(0.3)
    _, second = workers(process)
    second.kill()
    ended(process)
    assert_same(trained(tmp_path), undisturbed)


def test_no_more_workers_than_cpus_start_where_one_is_enough(
    config_file: Path, tmp_path: Path, run_unetpp: Start
) -> None:
    elastic = tmp_path / "elastic.yaml"
    elastic.write_text(json.dumps(json.loads(config_file.read_text()) | {"num_workers": [1, 8], "device": "cpu"}))
    process = run_unetpp("train", "--config", elastic, "--output", tmp_path)
    wait_for_epoch(process, tmp_path, 0)
    assert 1 <= len(workers(process)) <= len(os.sched_getaffinity(0))


def test_a_driver_killed_in_mid_epoch_changes_nothing(
    config_file: Path, undisturbed: TrainResult, tmp_path: Path, run_unetpp: Start, kill_tree: Kill
) -> None:
    process = run_unetpp("train", "--config", config_file, "--output", tmp_path)
    wait_for_epoch(process, tmp_path, 1)
    time.sleep(0.3)
    kill_tree(process)
    assert not list(tmp_path.glob("*/result.json")), "the kill came too late"
    ended(run_unetpp("train", "--config", config_file, "--output", tmp_path))
    assert_same(trained(tmp_path), undisturbed)
    (table,) = tmp_path.glob("*/records/epochs.csv")
    with table.open() as lines:
        assert [row["epoch"] for row in csv.DictReader(lines)] == ["1", "2", "3", "4", "5", "6"]


def test_a_torn_checkpoint_costs_its_epoch_and_no_more(
    config_file: Path, undisturbed: TrainResult, tmp_path: Path, run_unetpp: Start, kill_tree: Kill
) -> None:
    process = run_unetpp("train", "--config", config_file, "--output", tmp_path)
    wait_for_epoch(process, tmp_path, 2)
    kill_tree(process)
    (run,) = (each for each in tmp_path.iterdir() if each.is_dir())
    newest, before, *_ = checkpoints.complete(str(run))
    state = run / "checkpoints" / newest.state
    state.write_bytes(state.read_bytes()[:1000])
    found = checkpoints.newest(str(run))
    assert found is not None
    assert found[0].epoch == before.epoch
    ended(run_unetpp("train", "--config", config_file, "--output", tmp_path))
    assert_same(trained(tmp_path), undisturbed)


def test_a_streamed_run_that_is_killed_goes_on_in_the_same_order(
    config_file: Path, tmp_path: Path, run_unetpp: Start, kill_tree: Kill
) -> None:
    words = ["train", "--config", config_file, "--num-workers", "1", "--cache", "stream", "--output"]
    process = run_unetpp(*words, tmp_path / "disturbed")
    wait_for_epoch(process, tmp_path / "disturbed", 1)
    kill_tree(process)
    for name in ("disturbed", "undisturbed"):
        ended(run_unetpp(*words, tmp_path / name))
    assert_same(trained(tmp_path / "disturbed"), trained(tmp_path / "undisturbed"))


FILL_AND_FREE = """
set -u
mount -t tmpfs -o size=700k tmpfs "$OUT"
{train}; echo "$?" >> "$CODES"
mount -o remount,size=64m "$OUT"
{train}; echo "$?" >> "$CODES"
cp -a "$OUT/." "$KEPT"
"""


@pytest.mark.skipif(not _may_mount(), reason="a file system of its own needs unprivileged namespaces")
def test_training_on_a_full_disk_goes_on_when_there_is_room(
    config_file: Path, undisturbed: TrainResult, tmp_path: Path
) -> None:
    for name in ("out", "kept"):
        (tmp_path / name).mkdir()
    words = [sys.executable, "-m", "jobs.cli", "train", "--config", config_file, "--output", tmp_path / "out"]
    names = {"OUT": tmp_path / "out", "KEPT": tmp_path / "kept", "CODES": tmp_path / "codes"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FILL_AND_FREE.format(train=" ".join(f"'{word}'" for word in words))],
        env={**os.environ, **{name: str(path) for name, path in names.items()}, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    codes = [int(word) for word in (tmp_path / "codes").read_text().split()]
    assert codes == [ExitCode.STORAGE, ExitCode.DONE], done.stderr
    assert "the disk is full" in done.stderr
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "kept").rename(tmp_path / "out")
    assert_same(trained(tmp_path / "out"), undisturbed)

"""Processes that die: a worker, a driver, a node, all at once; and images that kill whoever touches them."""

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs import predict
from jobs.contract import ExitCode, PredictConfig, PredictResult
from jobs.table import list_parts
from tests.faults.invariants import assert_complete, rows_of
from unetpp.checkpoint import digest, from_pretrained

TOPOLOGIES = pytest.mark.parametrize("topology", ["fused", "split"])
POISON = 201
DOES_ITS_WORKER_HARM = """
import importlib.abc, importlib.machinery, os, signal, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "unetpp.openvino_engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            forward = module.OpenVINOEngine.__call__
            def poisoned(self, tiles_BHWC, core):
                if {condition}:
                    {deed}
                return forward(self, tiles_BHWC, core)
            module.OpenVINOEngine.__call__ = poisoned
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def many_images(tmp_path: Path) -> Path:
    """40 images, large enough that a run of them can be disturbed on the way."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (400, 400, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def words(tiny_model: Path, many_images: Path, tmp_path: Path) -> list[str | Path]:
    """The command line of a run of them on Ray with two workers."""
    words: list[str | Path] = ["predict", "--model", tiny_model, "--input", many_images, "--output", tmp_path / "out"]
    return [*words, "--shard-images", "4", "--num-workers", "2"]


@pytest.fixture
def masks(tiny_model: Path, many_images: Path, tmp_path: Path) -> dict[str, bytes]:
    """Mask by key, from a run that nothing disturbs."""
    output = str(tmp_path / "undisturbed")
    config = PredictConfig(model=str(tiny_model), input=str(many_images), output=output, backend="inline", threads=1)
    return {row["key"]: row["mask_png"] for row in rows_of(output, predict.run(config).model_digest)}


@pytest.fixture
def model_digest(tiny_model: Path) -> str:
    """What the tiny model is called in an output."""
    return digest(from_pretrained(tiny_model, 2), mode="fast", precision="f32")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs started from here die of images that are POISON all over."""
    _harm(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs started from here hang for ever at images that are POISON all over."""
    _harm(monkeypatch, tmp_path, "time.sleep(1e6)")


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In programs started from here what computes is broken by images that are POISON all over, as a GPU may be."""
    _harm(monkeypatch, tmp_path, "from unetpp.errors import DeviceError; raise DeviceError('illegal memory access')")


def _harm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deed: str, condition: str = f"(tiles_BHWC == {POISON}).all()"
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DOES_ITS_WORKER_HARM.format(condition=condition, deed=deed))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def _wait_for_a_part(output: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(output.rglob("part-*.parquet")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The actors and tasks that segment. Ray's processes are children of its raylet, which is a child of the driver."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "ray::Map" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@TOPOLOGIES
def test_a_worker_that_is_killed_costs_nothing_but_time(
    topology: str, words, masks, run_unetpp, model_digest: str, tmp_path: Path
) -> None:
    process = run_unetpp(*words, "--topology", topology)
    _wait_for_a_part(tmp_path / "out", process)
    for worker in _workers(process):
        worker.kill()
    _, err = process.communicate(timeout=240)
    assert process.returncode == ExitCode.DONE, err
    assert_complete(str(tmp_path / "out"), model_digest, masks, masks=masks)


@TOPOLOGIES
def test_an_image_that_kills_its_worker_every_time_becomes_a_row(
    topology: str, words, masks, poisoned: None, run_unetpp, model_digest: str, many_images: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((40, 40, 3), POISON, np.uint8)).save(many_images / "13-poison.png")
    process = run_unetpp(*words, "--topology", topology)
    _, err = process.communicate(timeout=300)
    assert process.returncode == ExitCode.DONE_WITH_FAILED_IMAGES, err
    keys = {*masks, "13-poison.png"}
    rows = assert_complete(str(tmp_path / "out"), model_digest, keys, masks=masks, failed={"13-poison.png": "crash"})
    (poison,) = [row for row in rows if row["error_code"]]
    assert "SIGKILL" in poison["error"]


def test_an_image_that_kills_its_driver_every_time_becomes_a_row(
    words, masks, poisoned: None, run_unetpp, model_digest: str, many_images: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((40, 40, 3), POISON, np.uint8)).save(many_images / "13-poison.png")
    codes = []
    for _ in range(3):
        process = run_unetpp(*words, "--backend", "inline")
        process.communicate(timeout=240)
        codes.append(process.returncode)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, ExitCode.DONE_WITH_FAILED_IMAGES]
    keys = {*masks, "13-poison.png"}
    assert_complete(str(tmp_path / "out"), model_digest, keys, masks=masks, failed={"13-poison.png": "crash"})


def test_an_image_that_hangs_its_worker_every_time_becomes_a_row(
    words, masks, hanging: None, run_unetpp, model_digest: str, many_images: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((40, 40, 3), POISON, np.uint8)).save(many_images / "13-poison.png")
    process = run_unetpp(*words, "--stall-s", "48", "--decode-seconds", "8")
    _, err = process.communicate(timeout=500)
    assert process.returncode == ExitCode.DONE_WITH_FAILED_IMAGES, err
    keys = {*masks, "13-poison.png"}
    assert_complete(str(tmp_path / "out"), model_digest, keys, masks=masks, failed={"13-poison.png": "timeout"})
    assert "in stage predict, after image '13-poison.png'; its worker was ended" in err
    assert "shard 3: nothing moved for" in err


@TOPOLOGIES
def test_an_image_that_breaks_the_gpu_every_time_becomes_a_row(
    topology: str, words, masks, breaking: None, run_unetpp, model_digest: str, many_images: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((40, 40, 3), POISON, np.uint8)).save(many_images / "13-poison.png")
    process = run_unetpp(*words, "--topology", topology)
    _, err = process.communicate(timeout=300)
    assert process.returncode == ExitCode.DONE_WITH_FAILED_IMAGES, err
    keys = {*masks, "13-poison.png"}
    assert_complete(str(tmp_path / "out"), model_digest, keys, masks=masks, failed={"13-poison.png": "crash"})
    assert "shard 3: illegal memory access; its worker was ended" in err


def test_a_gpu_that_breaks_ends_a_run_in_one_process(
    words, masks, breaking: None, run_unetpp, model_digest: str, many_images: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((40, 40, 3), POISON, np.uint8)).save(many_images / "13-poison.png")
    ends = []
    for _ in range(3):
        process = run_unetpp(*words, "--backend", "inline")
        _, err = process.communicate(timeout=240)
        ends.append((process.returncode, "illegal memory access" in err))
    assert ends == [(ExitCode.OTHER, True), (ExitCode.OTHER, True), (ExitCode.DONE_WITH_FAILED_IMAGES, False)]
    keys = {*masks, "13-poison.png"}
    assert_complete(str(tmp_path / "out"), model_digest, keys, masks=masks, failed={"13-poison.png": "crash"})


@pytest.mark.parametrize("backend", ["inline", "ray"])
def test_what_was_begun_when_asked_to_stop_is_committed(
    words, run_unetpp, model_digest: str, tmp_path: Path, backend: str
) -> None:
    process = run_unetpp(*words, "--backend", backend)
    _wait_for_a_part(tmp_path / "out", process)
    hints = tmp_path / "out" / "runs" / "r00001" / "hints"
    process.send_signal(signal.SIGTERM)
    begun = {path.name.split(".")[0].removeprefix("shard-") for path in hints.glob("shard-*")}
    _, err = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, err
    committed = {f"{part.shard:05d}" for part in list_parts(str(tmp_path / "out"), model_digest)}
    assert begun <= committed
    assert len(committed) < 10
    assert not list(hints.glob("shard-*"))


def test_asked_twice_a_run_stops_at_once(words, masks, run_unetpp, model_digest: str, tmp_path: Path) -> None:
    process = run_unetpp(*words, "--drain-s", "600")
    _wait_for_a_part(tmp_path / "out", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    again = run_unetpp(*words)
    again.communicate(timeout=240)
    assert again.returncode == ExitCode.DONE
    assert_complete(str(tmp_path / "out"), model_digest, masks, masks=masks)


# ------------------------------------------------------------------------------------------------ nodes


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster, which this process is connected to: its head does no work, a node of it one shard at a time."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def longer(many_images: Path) -> Path:
    """The images four times over: a run of them lasts until a node has come."""
    for path in list(many_images.iterdir()):
        for copy in range(3):
            shutil.copy(path, many_images / f"{path.stem}-{copy}.png")
    return many_images


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs started from here take some time for an image."""
    _harm(monkeypatch, tmp_path, "time.sleep(0.3)", "True")


@pytest.fixture
def begin(tiny_model: Path, many_images: Path, tmp_path: Path) -> Callable[..., Callable[[], PredictResult]]:
    """Function: begin a run on the cluster, in a thread; returns the function that waits for its result."""

    def begin(**changed: Any) -> Callable[[], PredictResult]:
        settings = {"model": str(tiny_model), "input": str(many_images), "output": str(tmp_path / "out")}
        config = PredictConfig.model_validate(settings | {"shard_images": 2, "threads": 1} | changed)
        results: list[PredictResult] = []
        thread = threading.Thread(target=lambda: results.append(predict.run(config)))
        thread.start()

        def wait() -> PredictResult:
            thread.join(300)
            assert results, "the run did not end"
            return results[0]

        return wait

    return begin


def _wait_for_parts(output: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(output.rglob("part-*.parquet"))) < number and time.monotonic() < deadline:
        time.sleep(0.05)


def _nodes_of_workers() -> set[str]:
    """The nodes on which actors live or lived."""
    import ray

    return {actor["Address"]["NodeID"] for actor in ray._private.state.actors().values() if actor["Address"]["NodeID"]}


def test_a_node_that_goes_costs_only_its_shards_in_flight(
    longer: Path, masks, slow: None, cluster, begin, model_digest: str, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1)
    wait = begin()
    _wait_for_parts(tmp_path / "out", 4)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("part-*.parquet")}
    cluster.remove_node(node, allow_graceful=False)
    assert wait().exit_code == ExitCode.DONE
    assert_complete(str(tmp_path / "out"), model_digest, masks, masks=masks)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts


def test_a_node_that_comes_takes_shards(
    longer: Path, masks, slow: None, cluster, begin, model_digest: str, tmp_path: Path
) -> None:
    wait = begin()
    _wait_for_parts(tmp_path / "out", 2)
    node = cluster.add_node(num_cpus=1)
    assert wait().exit_code == ExitCode.DONE
    assert_complete(str(tmp_path / "out"), model_digest, masks, masks=masks)
    assert node.node_id in _nodes_of_workers()


def test_without_any_worker_a_run_waits_for_one(
    masks, slow: None, cluster, begin, model_digest: str, tmp_path: Path
) -> None:
    (node,) = [node for node in cluster.list_all_nodes() if not node.head]
    wait = begin()
    _wait_for_parts(tmp_path / "out", 2)
    cluster.remove_node(node, allow_graceful=False)
    time.sleep(10)
    cluster.add_node(num_cpus=1)
    assert wait().exit_code == ExitCode.DONE
    assert_complete(str(tmp_path / "out"), model_digest, masks, masks=masks)


def test_work_goes_to_the_nodes_of_a_label(cluster, begin, masks, model_digest: str, tmp_path: Path) -> None:
    before = _nodes_of_workers()
    labelled = cluster.add_node(num_cpus=1, labels={"pool": "segmentation"})
    assert begin(node_labels=["pool=segmentation"])().exit_code == ExitCode.DONE
    assert_complete(str(tmp_path / "out"), model_digest, masks, masks=masks)
    (other,) = [node for node in cluster.list_all_nodes() if not node.head and node is not labelled]
    assert labelled.node_id in _nodes_of_workers() - before
    assert other.node_id not in _nodes_of_workers() - before

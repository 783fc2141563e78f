"""What tests of all rooms share: a real S3 server, a tiny model, an archive of images, a private Ray."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from jobs.logs import OURS
from tests.faults.proxy import FaultProxy
from tests.seaweedfs import SeaweedFS

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"  # else `auto` is another engine, of other masks, on CPUs with AMX
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of several workers that wait for each other starve
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # else a test without credentials waits for a cloud that is not there

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of data sets beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not there")
    return SHARED


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """pytest's own, on our loggers: the command line cuts them off from the root, and Prefect clears that."""
    for name in OURS:
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
        monkeypatch.setattr(logger, "propagate", False)
    return caplog


# --------------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SeaweedFS on loopback, with buckets `archive` and `output`: the AWS_* variables that lead to it."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server.environment


@pytest.fixture
def s3_environment(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """AWS_* of this process lead to the test's S3 server."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**s3_server, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_prefix(s3_environment: dict[str, str]) -> str:
    """An empty prefix in the test's S3 server."""
    return f"s3://archive/{uuid.uuid4().hex}"


@pytest.fixture
def counting_proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """AWS_* of this process lead to the test's S3 server through a proxy that counts."""
    proxy = FaultProxy(s3_environment["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to store things, once a local folder and once an S3 prefix."""
    if request.param == "s3":
        prefix: str = request.getfixturevalue("s3_prefix")
        return prefix
    folder = tmp_path / "place"
    folder.mkdir()
    return str(folder)


@pytest.fixture
def no_secret_in(s3_server: dict[str, str]) -> Callable[[str], None]:
    """Function: asserts that a text does not hold the S3 server's secret."""

    def check(text: str) -> None:
        assert s3_server["AWS_SECRET_ACCESS_KEY"] not in text

    return check


class FlakyServer:
    """An HTTP server that gives the answers it is told, then `200 OK`, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.last = b'HTTP/1.1 200 OK\r\nETag: "tag"\r\nContent-Length: 7\r\n\r\ncontent'
        self.requests: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(65536).decode("latin-1")
                self.requests.append(asked.split("\r\n")[0])
                answer = self.answers.pop(0) if self.answers else self.last
                connection.sendall(answer.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


@pytest.fixture
def flaky_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """AWS_* of this process lead to a server that fails as told."""
    server = FlakyServer()
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


# ------------------------------------------------------------------------------------------ model and images


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a seeded, untrained L2 model with heads at L1 and L2, three channels, binary."""
    import torch

    from unetpp.checkpoint import save_pretrained
    from unetpp.config import ModelConfig
    from unetpp.model import UNetPlusPlus

    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        save_pretrained(UNetPlusPlus(ModelConfig(level=2, filters=(4, 6, 8))), folder)
    return folder


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 12 good images: sizes, channels, types and formats mixed, in subfolders, with odd names."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(3)
    names = ["a.png", "b.PNG", "c d.png", "e%2Ff.png", "g+h.png", "plate 1/w1.png", "plate 1/w2.jpg", "plate 1/é.tif"]
    names += ["deep/er/x.png", "deep/er/x.png.png", "deep/.hidden.png", "~tilde~.png"]
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = 17 + 9 * number, 70 - 3 * number
        if name.endswith("é.tif"):
            Image.fromarray(rng.integers(0, 65535, (height, width), np.uint16)).save(path)
        else:
            channels = 3 if number % 2 else 1
            pixels = rng.integers(0, 255, (height, width, channels), np.uint8)
            Image.fromarray(pixels.squeeze() if channels == 1 else pixels).save(path)
    (folder / "notes.txt").write_text("no image, not asked for")
    return folder


# -------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="session")
def ray_cluster(s3_server: dict[str, str]) -> Iterator[None]:
    """A private Ray of this session with 4 logical CPUs, whose workers reach the test's S3 server."""
    import ray

    from jobs.cluster import local_ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_server, "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        with local_ray(4):
            yield
        assert not ray.is_initialized()


@pytest.fixture
def run_unetpp() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Function: words -> a running `unetpp words` in a process group of its own; killed at the test's end."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: str | Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What a shell starts in the background ignores SIGINT, and so would the child.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        running.append(process)
        return process

    yield start
    for process in running:
        _kill_tree(process)


def _kill_tree(process: subprocess.Popen[str]) -> None:
    import psutil

    try:
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            member.kill()
    except psutil.NoSuchProcess:
        pass
    process.communicate()


@pytest.fixture
def kill_tree() -> Callable[[subprocess.Popen[str]], None]:
    """Function: kill -9 of a process and of all that it started."""
    return _kill_tree

"""A whole site for the tests: a real Prefect server and worker, a Ray cluster with a token, SeaweedFS; on loopback."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.dataset
import pytest
import torch
from PIL import Image

from flows.jobs_api import RayJobs
from infra.cluster import HOME, Site, free_base_port
from jobs import registry, storage
from jobs.contract import SynthConfig
from jobs.registry import CurrentModel
from jobs.synth import run as synthesise
from unetpp.checkpoint import digest, save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus

LOG_PAGE = 200
ACTIVE = ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING", "PAUSED")


class Nights:
    """What a person does with a site, through its servers' APIs alone."""

    def __init__(self, site: Site) -> None:
        self.site = site
        user, password = site.auth()
        self.http = httpx.Client(base_url=f"{site.prefect_url}/api", auth=(user, password), timeout=60)
        self.ray = RayJobs(site.ray_url)

    # --------------------------------------------------------------------------------------------- Prefect

    def ask(self, method: str, path: str, **body: Any) -> Any:
        for _ in range(10):
            answer = self.http.request(method, path, **body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # SQLite is busy at the moment
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> dict[str, Any]:
        return self.ask("GET", f"/deployments/name/{name}/{name}")

    def start(self, name: str, config: dict[str, Any]) -> str:
        """Ask for a flow run of a deployment; its id."""
        body = {"parameters": {"config": config}, "state": {"type": "SCHEDULED"}}
        return self.ask("POST", f"/deployments/{self.deployment(name)['id']}/create_flow_run", json=body)["id"]

    def flow_run(self, run: str) -> dict[str, Any]:
        return self.ask("GET", f"/flow_runs/{run}")

    def state(self, run: str) -> dict[str, Any]:
        return self.flow_run(run)["state"]

    def ended(self, run: str, timeout_s: float = 240) -> dict[str, Any]:
        """The last state of a flow run."""
        wait_for(lambda: self.state(run)["type"] not in ACTIVE, timeout_s, lambda: f"{self.state(run)} {self.log(run)}")
        return self.state(run)

    def log(self, run: str) -> str:
        """Every line of a flow run's log; the server gives them a page at a time."""
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": LOG_PAGE}
        lines: list[str] = []
        while len(lines) % LOG_PAGE == 0:
            page = self.ask("POST", "/logs/filter", json={**wanted, "offset": len(lines)})
            if not page:
                break
            lines += [line["message"] for line in page]
        return "\n".join(lines)

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """By key, the newest one."""
        found = self.ask(
            "POST", "/artifacts/filter", json={"flow_runs": {"id": {"any_": [run]}}, "sort": "UPDATED_DESC"}
        )
        return {artifact["key"]: artifact for artifact in reversed(found)}

    # ------------------------------------------------------------------------------------------------- Ray

    def jobs(self, word: str = "") -> dict[str, str]:
        """Submitted Ray jobs whose name or command has `word`: name -> status."""
        found = self.ray._ask("GET", "/api/jobs/").json()
        return {
            job["submission_id"]: job["status"]
            for job in found
            if job["submission_id"] and (word in job["submission_id"] or word in job["entrypoint"])
        }

    def is_working(self, word: str, num_parts: int = 1) -> bool:
        """A job runs, and has committed something."""
        return "RUNNING" in self.jobs(word).values() and len(self.parts(word)) >= num_parts

    # ----------------------------------------------------------------------------------------------- store

    def parts(self, output: str) -> list[str]:
        root = storage.join(output, "table")
        return [entry.key for entry in storage.list_objects(root, missing_ok=True) if entry.key.endswith(".parquet")]

    def rows(self, output: str) -> list[dict[str, Any]]:
        """Every row of the table, of every run."""
        with storage.arrow(storage.join(output, "table")) as (filesystem, path):
            found = pyarrow.dataset.dataset(path, filesystem=filesystem, partitioning="hive")
            return found.to_table(columns=["key", "error_code", "run"]).to_pylist()

    def result(self, output: str) -> dict[str, Any]:
        """What the only predict job of an output said last."""
        root = storage.join(output, "results")
        (name,) = [entry.key for entry in storage.list_objects(root)]
        return storage.read_json(storage.join(root, name))

    # ------------------------------------------------------------------------------------------- kill -9

    def kill_flow(self) -> None:
        """The process of the flow run that was started last, by whichever worker."""
        ours = (f"{self.site.prefect_url}/api", "prefect.engine")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = (process.environ().get("PREFECT_API_URL"), *process.cmdline())
                if all(word in words for word in ours):
                    found.append(process)
        max(found, key=psutil.Process.create_time).kill()

    def kill_worker(self) -> None:
        """The worker alone, not the flow runs that it started; and start another."""
        worker = self.site.process("worker")
        assert worker is not None
        worker.kill()
        worker.wait(10)
        self.site.start_worker()

    def kill_server(self) -> None:
        """Prefect's server; it comes back five seconds later."""
        self.site.kill("prefect")
        time.sleep(5)
        self.site.start_prefect()

    def kill_node(self) -> None:
        """A Ray node; and start another."""
        self.site.kill("ray-node-2")
        self.site.start_ray_node(2)

    # -------------------------------------------------------------------------------------- a person's shell

    def unetpp(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """The command, in a shell that sourced the site's environment."""
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *words],
            cwd=HOME,
            env=self.site.with_environment(self.site.flow_environment() | environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # What a shell starts in the background ignores Ctrl-C, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def wait_for(is_so: Callable[[], Any], timeout_s: float, tell: Callable[[], object] = lambda: "") -> None:
    """Wait until something is so; fail, with what `tell` says, where it does not come."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {timeout_s:g} s: {tell()}"
        time.sleep(0.5)


@pytest.fixture(scope="session")
def alarms() -> Iterator[list[str]]:
    """What was posted to the webhook of alarms, so far; UNETPP_ALARM_URL leads there."""
    posted: list[str] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append(json.loads(body)["text"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        patch.setenv("UNETPP_ALARM_URL", f"http://127.0.0.1:{server.server_port}/")
        yield posted
        server.shutdown()


@pytest.fixture(scope="session")
def site(alarms: list[str]) -> Iterator[Site]:
    """The servers."""
    with tempfile.TemporaryDirectory(prefix="site-", ignore_cleanup_errors=True) as folder:
        there = Site(Path(folder), free_base_port())
        try:
            there.up()
            kept = dict(os.environ)
            os.environ.update(there.store_environment() | there.ray_environment())
            yield there
            os.environ.clear()
            os.environ.update(kept)
        finally:
            if logs := os.environ.get("UNETPP_KEEP_LOGS"):
                for log in there.folder.glob("*.log"):
                    (Path(logs) / log.name).write_bytes(log.read_bytes())
            there.down()


@pytest.fixture(scope="session")
def nights(site: Site) -> Nights:
    """What can be done with them."""
    return Nights(site)


@pytest.fixture(scope="session")
def models(site: Site) -> str:
    """A registry with one small model, that takes about a tenth of a second for an image."""
    uri = "s3://models/given"
    torch.manual_seed(7)
    model = UNetPlusPlus(ModelConfig(level=2, filters=(16, 32, 64)))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder))
        current = CurrentModel(digest=digest(model), level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="given")
        assert registry.promote(uri, 1, current, folder)
    return uri


@pytest.fixture(scope="session")
def nuclei(site: Site, shared_dir: Path) -> str:
    """200 of the dsb2018 images, in the store."""
    files = sorted((shared_dir / "data" / "dsb2018" / "images").iterdir())[:200]
    for file in files:
        storage.write_bytes(f"s3://archive/nuclei/{file.name}", file.read_bytes())
    return "s3://archive/nuclei"


@pytest.fixture(scope="session")
def labelled(site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve synthetic labelled images, in the store."""
    folder = tmp_path_factory.mktemp("labelled")
    synthesise(SynthConfig(out=str(folder), num=12, size=64, seed=3))
    storage.upload_folder(folder, "s3://archive/labelled")
    return "s3://archive/labelled"


@pytest.fixture
def archive_config(models: str, nuclei: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """An archive flow over the nuclei, with an output of the test's own; about half a minute of work."""
    name = request.node.name.replace("[", "-").replace("]", "")[-60:].strip("-_")
    return {
        "models": models,
        "input": nuclei,
        "output": f"s3://output/{name}",
        "predict": {"shard_images": 5, "write": ["parquet"]},
    }


def put_images(prefix: str, number: int, first: int = 0) -> None:
    """Small images into the store."""
    for each in range(first, first + number):
        file = BytesIO()
        Image.new("L", (64, 64), each % 256).save(file, "PNG")
        storage.write_bytes(f"{prefix}/{each:05d}.png", file.getvalue())

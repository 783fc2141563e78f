"""A whole site on one machine, without containers: `make cluster`, `make cluster-down`.

SeaweedFS (S3), a Ray head with token authentication and two nodes, a Prefect server with a password and a worker, all
on loopback, with everything they store in one folder. `<folder>/environment` has what a shell needs to talk to them.

    python -m infra.cluster up   [--folder cluster] [--base-port 21000]
    python -m infra.cluster down [--folder cluster]
"""

import argparse
import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from infra import seaweedfs

HOME = Path(__file__).parents[1]
BIN = Path(sysconfig.get_path("scripts"))
BUCKETS = ("archive", "output", "models")
START_S = 180


class Site:
    """The servers of one folder. Each is a process group of its own, known by a file with its process id."""

    def __init__(self, folder: Path, base_port: int = 21000) -> None:
        self.folder = folder.resolve()
        known = self.folder / "site.json"
        if known.exists():
            base_port = json.loads(known.read_text())["base_port"]
        self._base_port = base_port
        self.ports = {
            name: base_port + number
            for number, name in enumerate(
                (
                    "s3",
                    "master",
                    "filer",
                    "volume",
                    "admin",
                    "prefect",
                    "dashboard",
                    "gcs",
                    "client",
                    "agent",
                    "agent1",
                    "agent2",
                )
            )
        }
        self.s3_url = f"http://127.0.0.1:{self.ports['s3']}"
        self.prefect_url = f"http://127.0.0.1:{self.ports['prefect']}"
        self.ray_url = f"http://127.0.0.1:{self.ports['dashboard']}"

    # ------------------------------------------------------------------------------------------ the whole

    def up(self) -> None:
        """Start what does not run, and tell Prefect about the project."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "site.json").write_text(json.dumps({"base_port": self._base_port}))
        self._make_secrets()
        self.start_store()
        self.start_ray()
        self.start_prefect()
        self.deploy()
        self.start_worker()
        self._write_environment()

    def down(self) -> None:
        """Stop everything; what it stored stays."""
        for name in ("worker", "prefect", "ray-node-2", "ray-node-1", "ray-head"):
            self.stop(name)
        self.kill("store")  # a gentle end takes it more than ten seconds

    # ------------------------------------------------------------------------------------------- services

    def start_store(self) -> None:
        """SeaweedFS with its buckets."""
        folder = self.folder / "store"
        folder.mkdir(exist_ok=True)
        words = seaweedfs.command(
            folder,
            s3_port=self.ports["s3"],
            ports=self.ports,
            buckets=BUCKETS,
            key_id=self.secret("s3-key"),
            secret=self.secret("s3-secret"),
        )
        self._start("store", words, seaweedfs.ENVIRONMENT)
        self._wait("store", lambda: httpx.get(self.s3_url, timeout=5).status_code in (200, 403))

    def start_ray(self) -> None:
        """A head that does no work, and two nodes."""
        self.start_ray_head()
        for number in (1, 2):
            self.start_ray_node(number)

    def start_ray_head(self) -> None:
        """The head: it wants the token, and gives a job that is stopped time to drain."""
        words = [
            *("ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=0"),
            "--node-ip-address=127.0.0.1",
            f"--port={self.ports['gcs']}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.ports['dashboard']}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={self.ports['agent']}",
            f"--ray-client-server-port={self.ports['client']}",
            f"--temp-dir={self._ray_folder()}",
            "--object-store-memory=200000000",
        ]
        self._start("ray-head", [str(BIN / words[0]), *words[1:]], self.job_environment())
        self._wait("ray-head", lambda: bool(self._nodes()))

    def start_ray_node(self, number: int, num_cpus: int = 1) -> None:
        """One node; it is there when the head knows it."""
        if self.process(f"ray-node-{number}") is not None:
            return
        before = self._nodes()
        words = [
            *("ray", "start", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"),
            f"--address=127.0.0.1:{self.ports['gcs']}",
            "--node-ip-address=127.0.0.1",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={self.ports[f'agent{number}']}",
            "--object-store-memory=200000000",
        ]
        self._start(f"ray-node-{number}", [str(BIN / words[0]), *words[1:]], self.job_environment())
        self._wait(f"ray-node-{number}", lambda: bool(self._nodes() - before))

    def _nodes(self) -> set[str]:
        """Ids of the nodes that the head takes for alive; a node that is started again gets another one."""
        headers = {"Authorization": f"Bearer {self.secret('ray-token')}"}
        answer = httpx.get(f"{self.ray_url}/api/v0/nodes", headers=headers, timeout=5).raise_for_status().json()
        listed = ((answer.get("data") or {}).get("result") or {}).get("result") or []
        return {node["node_id"] for node in listed if node["state"] == "ALIVE"}

    def start_prefect(self) -> None:
        """The server: it wants the password, and remembers its leases over a restart."""
        environment = {
            "PREFECT_SERVER_API_AUTH_STRING": self.secret("prefect-password"),
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self.folder}/prefect/server.db",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_API_URL": f"{self.prefect_url}/api",
        }
        words = ["server", "start", "--host", "127.0.0.1", "--port", str(self.ports["prefect"])]
        self._start("prefect", [sys.executable, "-m", "prefect", *words], self.flow_environment() | environment)
        auth = self.auth()
        self._wait("prefect", lambda: httpx.get(f"{self.prefect_url}/api/health", auth=auth, timeout=5).is_success)

    def start_worker(self) -> None:
        """A worker, which starts flow runs as processes. No --limit: a limited worker dies of a rescheduled run."""
        words = ["worker", "start", "--pool", "unetpp", "--type", "process", "--name", "local"]
        self._start("worker", [sys.executable, "-m", "prefect", *words], self.flow_environment())

    def deploy(self) -> None:
        """Deployments and automations."""
        command = [sys.executable, "-m", "flows.deploy"]
        environment = self.with_environment(self.flow_environment())
        done = subprocess.run(command, cwd=HOME, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"python -m flows.deploy failed:\n{done.stdout}{done.stderr}")

    # ---------------------------------------------------------------------------------------- environment

    def store_environment(self) -> dict[str, str]:
        """What leads to the store."""
        return {
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_ACCESS_KEY_ID": self.secret("s3-key"),
            "AWS_SECRET_ACCESS_KEY": self.secret("s3-secret"),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def ray_environment(self) -> dict[str, str]:
        """What leads to Ray's Jobs API."""
        return {
            "RAY_API_SERVER_ADDRESS": self.ray_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "secrets" / "ray-token"),
        }

    def job_environment(self) -> dict[str, str]:
        """What Ray's processes, and so the jobs, are started with."""
        return {
            **self.store_environment(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "secrets" / "ray-token"),
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def flow_environment(self) -> dict[str, str]:
        """What Prefect's processes, and so the flows, are started with; and what a shell needs."""
        return {
            **self.store_environment(),
            **self.ray_environment(),
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_API_AUTH_STRING": self.secret("prefect-password"),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "DO_NOT_TRACK": "1",
            "UNETPP_DATA": "s3://archive/labelled",
            "UNETPP_MODELS": "s3://models/nuclei",
            "UNETPP_WORK": "s3://models/work",
            "UNETPP_INPUT": "s3://archive/images",
            "UNETPP_OUTPUT": "s3://output/masks",
            "UNETPP_TIMEZONE": "UTC",
            **{name: value for name, value in os.environ.items() if name.startswith("UNETPP_")},
        }

    def _write_environment(self) -> None:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.flow_environment().items()]
        file = self.folder / "environment"
        file.touch(mode=0o600)
        file.write_text("\n".join([*lines, "unset RAY_ADDRESS", ""]))

    def with_environment(self, environment: dict[str, str]) -> dict[str, str]:
        """That, and of ours what does not lead elsewhere."""
        foreign = ("AWS_", "RAY_", "PREFECT_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | environment

    def _make_secrets(self) -> None:
        folder = self.folder / "secrets"
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in ("s3-key", "s3-secret", "ray-token", "prefect-password"):
            file = folder / name
            if not file.exists():
                file.touch(mode=0o600)
                word = secrets.token_hex(24)
                file.write_text(f"unetpp:{word}" if name == "prefect-password" else word)

    def secret(self, name: str) -> str:
        """One of the secrets that were made: s3-key, s3-secret, ray-token, prefect-password."""
        return (self.folder / "secrets" / name).read_text()

    def auth(self) -> tuple[str, str]:
        """Prefect's user and password."""
        user, _, password = self.secret("prefect-password").partition(":")
        return user, password

    def _ray_folder(self) -> str:
        """Ray keeps sockets there, whose paths may have 107 characters."""
        folder = self.folder / "ray"
        return str(folder if len(str(folder)) < 40 else Path("/tmp") / f"unetpp-ray-{self._base_port}")

    # ------------------------------------------------------------------------------------------- processes

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        if self.process(name) is not None:
            return
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=HOME,
                env=self.with_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self.folder / f"{name}.pid").write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")

    def process(self, name: str) -> psutil.Process | None:
        """The process that was started as `name`, if it lives."""
        try:
            pid, created = (self.folder / f"{name}.pid").read_text().split()
            process = psutil.Process(int(pid))
            alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(created)) < 1
            return process if alive else None
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None

    def kill(self, name: str) -> None:
        """kill -9 of a service and everything that it started."""
        self._end(name, signal.SIGKILL, 10)

    def stop(self, name: str) -> None:
        """End a service gently, then not."""
        self._end(name, signal.SIGTERM, 20)
        self.kill(name)

    def _end(self, name: str, number: signal.Signals, timeout_s: float) -> None:
        process = self.process(name)
        if process is None:
            return
        tree = [process, *process.children(recursive=True)]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if number == signal.SIGKILL:
            for each in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        with contextlib.suppress(psutil.TimeoutExpired, ChildProcessError):
            psutil.wait_procs(tree, timeout=timeout_s)

    def _wait(self, name: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if is_there():
                    return
            if self.process(name) is None:
                break
            time.sleep(0.3)
        tail = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
        raise SystemExit(f"{name} did not come up; the end of {self.folder / f'{name}.log'}:\n{tail}")


def free_base_port() -> int:
    """A port that begins a row of free ones; those 10000 above, where SeaweedFS puts gRPC, are free too."""
    for base in range(21000, 22700, 20):
        if all(is_free(base + number) and is_free(base + 10_000 + number) for number in range(13)):
            return base
    raise SystemExit("there are no free ports between 21000 and 22700")


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of loopback."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def main() -> None:
    """Start or stop a site, and say where things are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--folder", type=Path, default=HOME / "cluster")
    parser.add_argument("--base-port", type=int)
    asked = parser.parse_args()
    site = Site(asked.folder, asked.base_port or free_base_port())
    if asked.what == "down":
        site.down()
        return
    site.up()
    sys.stdout.write(
        f"Prefect   {site.prefect_url}   (unetpp, password in {site.folder}/secrets/prefect-password)\n"
        f"Ray       {site.ray_url}   (token in {site.folder}/secrets/ray-token)\n"
        f"S3        {site.s3_url}   (buckets {', '.join(BUCKETS)})\n"
        f"shell     source {site.folder}/environment\n"
    )


if __name__ == "__main__":
    main()

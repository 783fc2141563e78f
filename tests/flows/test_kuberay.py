"""RayJobs, by the real Kubernetes client, on a server that keeps custom objects as Kubernetes does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from flows.kuberay import KubeRayJobs
from flows.ray_jobs import JobStatus, State, ensure, stop
from jobs.contract import ExitCode
from unetpp.errors import ConfigError, JobError, TransientError

MANIFEST = yaml.safe_load((Path(__file__).parents[2] / "infra" / "kuberay" / "rayjob.yaml").read_text())
ROOT = "/apis/ray.io/v1/namespaces/unetpp/rayjobs"


class Kubernetes:
    """Its rayjobs, by name; `answer` is what it says to everything, where it is set."""

    def __init__(self) -> None:
        self.rayjobs: dict[str, dict[str, Any]] = {}
        self.answer: int | None = None
        there = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                resource = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = resource["metadata"]["name"]
                if self.path == ROOT and name not in there.rayjobs and there.answer is None:
                    there.rayjobs[name] = resource
                    return self.say(201, resource)
                return self.say(there.answer or 409)

            def do_GET(self) -> None:
                found = there.rayjobs.get(self.path.removeprefix(f"{ROOT}/"))
                self.say(there.answer or (200 if found else 404), found)

            def do_DELETE(self) -> None:
                found = there.rayjobs.pop(self.path.removeprefix(f"{ROOT}/"), None)
                self.say(there.answer or (200 if found else 404), found)

            def say(self, status: int, content: Any = None) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(content or {"kind": "Status", "code": status}).encode())

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def kubernetes() -> Iterator[Kubernetes]:
    """The server."""
    there = Kubernetes()
    threading.Thread(target=there.server.serve_forever, daemon=True).start()
    yield there
    there.server.shutdown()
    there.server.server_close()


@pytest.fixture
def jobs(kubernetes: Kubernetes) -> KubeRayJobs:
    """The backend, with the manifest of infra/."""
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{kubernetes.server.server_port}"
    configuration.retries = False
    api = client.CustomObjectsApi(client.ApiClient(configuration))
    return KubeRayJobs(api, "unetpp", MANIFEST)


def test_a_job_is_a_resource_of_its_name_and_is_made_once(jobs: KubeRayJobs, kubernetes: Kubernetes) -> None:
    assert jobs.status("unetpp-predict-1") is None
    assert jobs.submit("unetpp-predict-1", "unetpp predict --model m", {"night": "20261124", "flow_run": "f"})
    assert not jobs.submit("unetpp-predict-1", "unetpp predict --model m", {})
    resource = kubernetes.rayjobs["unetpp-predict-1"]
    assert (resource["apiVersion"], resource["kind"]) == ("ray.io/v1", "RayJob")
    assert resource["spec"]["jobId"] == "unetpp-predict-1"
    assert resource["spec"]["entrypoint"] == "unetpp predict --model m"
    assert resource["metadata"]["annotations"] == {"unetpp/night": "20261124", "unetpp/flow-run": "f"}
    assert resource["spec"]["rayClusterSpec"] == MANIFEST["spec"]["rayClusterSpec"]
    assert MANIFEST["metadata"]["name"] == "unetpp"  # the template stays one


@pytest.mark.parametrize(
    ("status", "meant"),
    [
        ({}, JobStatus(State.PENDING)),
        ({"jobDeploymentStatus": "Initializing"}, JobStatus(State.PENDING)),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, JobStatus(State.RUNNING)),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, JobStatus(State.SUCCEEDED, 0)),
        ({"jobStatus": "STOPPED"}, JobStatus(State.STOPPED)),
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "failed with exit code 20, see"},
            JobStatus(State.FAILED, 20, "failed with exit code 20, see"),
        ),
        (
            {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"},
            JobStatus(State.FAILED, None, "PreRunningDeadlineExceeded"),
        ),
        (
            {"jobDeploymentStatus": "ValidationFailed", "message": "num-cpus is given twice"},
            JobStatus(State.FAILED, 10, "KubeRay refuses its manifest: num-cpus is given twice"),
        ),
    ],
)
def test_what_kuberay_says_of_a_job_is_understood(
    jobs: KubeRayJobs, kubernetes: Kubernetes, status: dict[str, str], meant: JobStatus
) -> None:
    jobs.submit("job", "unetpp predict", {})
    kubernetes.rayjobs["job"]["status"] = status
    assert jobs.status("job") == meant


def test_a_job_that_failed_for_good_is_not_made_again_and_a_lost_one_is(
    jobs: KubeRayJobs, kubernetes: Kubernetes
) -> None:
    assert ensure(jobs, "job", "unetpp predict", {}) == ("job", False)
    assert ensure(jobs, "job", "unetpp predict", {}) == ("job", True)
    kubernetes.rayjobs["job"]["status"] = {"jobStatus": "FAILED", "message": "exit code 1"}
    assert ensure(jobs, "job", "unetpp predict", {}) == ("job-a1", False)


def test_why_a_job_failed_is_said_by_its_resource_where_its_cluster_is_gone(
    jobs: KubeRayJobs, kubernetes: Kubernetes
) -> None:
    assert ensure(jobs, "job", "unetpp predict", {}) == ("job", False)
    kubernetes.rayjobs["job"]["status"] = {
        "jobDeploymentStatus": "ValidationFailed",
        "message": "num-cpus is given twice",
    }
    with pytest.raises(JobError, match="num-cpus is given twice") as refused:
        ensure(jobs, "job", "unetpp predict", {})
    assert refused.value.exit_code == ExitCode.CONFIG


def test_stopping_deletes_the_resource(jobs: KubeRayJobs, kubernetes: Kubernetes) -> None:
    jobs.submit("job", "unetpp predict", {})
    assert stop(jobs, "job", poll_s=0.01) is None
    assert kubernetes.rayjobs == {}
    jobs.ask_to_stop("job")  # once more is fine


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (403, ConfigError, "the role of infra/kuberay"),
        (404, ConfigError, "no place for rayjobs in unetpp: install the KubeRay operator"),
        (422, ConfigError, "refuses the RayJob"),
        (500, TransientError, "500"),
    ],
)
def test_a_refusal_is_a_sentence(
    jobs: KubeRayJobs, kubernetes: Kubernetes, answer: int, error: type[Exception], words: str
) -> None:
    kubernetes.answer = answer
    with pytest.raises(error, match=words):
        jobs.submit("job", "unetpp predict", {})


def test_no_answer_is_passing(jobs: KubeRayJobs, kubernetes: Kubernetes) -> None:
    kubernetes.server.shutdown()
    kubernetes.server.server_close()
    with pytest.raises(TransientError, match="does not answer"):
        jobs.status("job")


@pytest.mark.parametrize("content", ["", "- a", "kind: RayJob", "kind: RayCluster\nmetadata: {}\nspec: {}", "a: b: c"])
def test_a_manifest_of_something_else_is_told(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.yaml").write_text(content)
    monkeypatch.setenv("UNETPP_RAYJOB", str(tmp_path / "job.yaml"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"job.yaml holds no RayJob; wanted one such as"):
        KubeRayJobs.from_environment()

"""Jobs on Kubernetes: one KubeRay `RayJob` resource a job, with a cluster of its own that goes when the job ends.

The resource is called like the job, so that Kubernetes itself refuses a second one. What a job's cluster looks like is
a manifest (`UNETPP_RAYJOB`, see infra/kuberay/rayjob.yaml) in which the name, the command and the metadata are filled
in. Source: KubeRay v1 API, `RayJobSpec` and `RayJobStatus`.
"""

import os
import re
from pathlib import Path
from typing import Any, Self

import yaml

from flows.jobs_api import RayJobs
from flows.ray_jobs import JobStatus, State
from jobs.contract import ExitCode
from unetpp.errors import ConfigError, TransientError

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
ANNOTATION = "unetpp/"
TIMEOUT_S = 30.0


class KubeRayJobs:
    """The RayJobs of one namespace."""

    survives = True

    def __init__(self, api: Any, namespace: str, manifest: dict[str, Any]) -> None:
        """Args: a `kubernetes.client.CustomObjectsApi`, the namespace, and a RayJob to fill in."""
        self._api, self._namespace, self._manifest = api, namespace, manifest
        self.where = f"namespace {namespace}"

    @classmethod
    def from_environment(cls) -> Self:
        """From the service account of the pod we are in, else from the kubeconfig.

        ConfigError where the client, the credentials or the manifest are missing.
        """
        try:
            from kubernetes import client, config
        except ImportError:
            raise ConfigError(
                "jobs is `kuberay`, which needs the kubernetes package: pip install 'unetpp[kuberay]'"
            ) from None
        path = Path(os.environ.get("UNETPP_RAYJOB") or "infra/kuberay/rayjob.yaml")
        try:
            manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"UNETPP_RAYJOB: {path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            manifest = None
        match manifest:
            case {"kind": "RayJob", "metadata": dict(metadata), "spec": dict()}:
                namespace = metadata.get("namespace", "default")
            case _:
                raise ConfigError(
                    f"UNETPP_RAYJOB: {path} holds no RayJob; wanted one such as infra/kuberay/rayjob.yaml"
                )
        try:
            config.load_config()
        except config.ConfigException as error:
            raise ConfigError(f"no way to Kubernetes: {error}") from None
        return cls(client.CustomObjectsApi(), namespace, manifest)

    def status(self, submission_id: str) -> JobStatus | None:
        """See `JobBackend`."""
        resource = self._get(submission_id)
        if resource is None:
            return None
        status = resource.get("status") or {}
        job, deployment = status.get("jobStatus") or "", status.get("jobDeploymentStatus") or ""
        message = str(status.get("message") or status.get("reason") or "")
        if job == State.SUCCEEDED:
            return JobStatus(State.SUCCEEDED, 0, message)
        if job in (State.FAILED, State.STOPPED):
            return JobStatus(State(job), _exit_code(message), message)
        if deployment == "ValidationFailed":
            return JobStatus(State.FAILED, int(ExitCode.CONFIG), f"KubeRay refuses its manifest: {message}")
        if deployment == "Failed":  # it never ran: no room in time, or its cluster did not come up
            return JobStatus(State.FAILED, None, message or "its cluster did not come up")
        return JobStatus(State.RUNNING if job == State.RUNNING else State.PENDING, None, message)

    def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
        """See `JobBackend`."""
        template = self._manifest
        resource = {
            **template,
            "metadata": {
                **template["metadata"],
                "name": submission_id,
                "annotations": {
                    **template["metadata"].get("annotations", {}),
                    **{f"{ANNOTATION}{name.replace('_', '-')}": value for name, value in metadata.items()},
                },
            },
            "spec": {**template["spec"], "jobId": submission_id, "entrypoint": command},
        }
        return self._call("create_namespaced_custom_object", resource) is not None

    def log(self, submission_id: str) -> str:
        """See `JobBackend`. From the job's own Ray dashboard; nothing where that cannot be reached from here."""
        resource = self._get(submission_id)
        address = ((resource or {}).get("status") or {}).get("dashboardURL")
        if not address:
            return ""
        try:
            return RayJobs(address if "://" in address else f"http://{address}").log(submission_id)
        except (TransientError, ConfigError):
            return ""

    def ask_to_stop(self, submission_id: str) -> None:
        """See `JobBackend`. The resource is deleted: its finalizer stops the job before the cluster goes."""
        self._call("delete_namespaced_custom_object", submission_id)

    def url(self, submission_id: str) -> str | None:
        """See `JobBackend`."""
        return None

    def _get(self, name: str) -> dict[str, Any] | None:
        return self._call("get_namespaced_custom_object", name)

    def _call(self, verb: str, subject: Any) -> dict[str, Any] | None:
        """One request; None where there is no such resource, or, for `create`, already one."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer: dict[str, Any] = getattr(self._api, verb)(
                GROUP, VERSION, self._namespace, PLURAL, subject, _request_timeout=TIMEOUT_S
            )
        except ApiException as error:
            if error.status == (409 if verb.startswith("create") else 404):
                return None
            if error.status == 404:
                raise ConfigError(
                    f"Kubernetes has no place for rayjobs in {self._namespace}: install the KubeRay operator and apply "
                    "infra/kuberay/namespace.yaml or name another namespace in the manifest"
                ) from None
            if error.status in (401, 403):
                raise ConfigError(
                    f"Kubernetes refuses {verb.split('_')[0]} of rayjobs in {self._namespace}: give the service "
                    "account the role of infra/kuberay/namespace.yaml"
                ) from None
            if error.status in (400, 422):
                raise ConfigError(f"Kubernetes refuses the RayJob: {error.body}") from None
            raise TransientError(f"Kubernetes answers {error.status} {error.reason}") from error
        except HTTPError as error:
            raise TransientError(f"Kubernetes does not answer ({type(error).__name__})") from error
        return answer


def _exit_code(message: str) -> int | None:
    found = re.search(r"exit code:? (-?\d+)", message)
    return int(found[1]) if found else None

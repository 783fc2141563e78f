"""Jobs on a Ray cluster, by its Jobs API: plain HTTP, so that a flow needs no Ray of its own.

Source: Ray documentation, "Ray Jobs REST API". `RAY_API_SERVER_ADDRESS` names the cluster; `RAY_AUTH_TOKEN` or the file
`RAY_AUTH_TOKEN_PATH` (default ~/.ray/auth_token) holds its token, unless `RAY_AUTH_MODE` is `disabled`.
"""

import os
import time
from pathlib import Path
from typing import Any

import httpx

from flows.ray_jobs import JobStatus, State
from unetpp.errors import ConfigError, TransientError

RAY_VERSION = "2.60"
TIMEOUT_S = 30.0
AGENT_S = 120.0
"""How long a head that has just started may have no agent to start jobs with."""


class RayJobs:
    """The jobs of one Ray cluster."""

    survives = True

    def __init__(self, address: str) -> None:
        try:
            url = httpx.URL(address.rstrip("/"))
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(
                f"the Ray cluster's address is {address!r}; wanted that of its dashboard, such as http://head:8265"
            )
        self.where = address.rstrip("/")
        token = _token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._has_token = bool(token)
        self._http = httpx.Client(base_url=self.where, headers=headers, timeout=TIMEOUT_S)

    def version(self) -> str:
        """The cluster's Ray version. ConfigError where it is not the one that the jobs are made for."""
        response = self._ask("GET", "/api/version")
        try:
            version = str(response.json()["ray_version"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.where} answers, but is no Ray dashboard: check RAY_API_SERVER_ADDRESS") from None
        if version.split(".")[:2] != RAY_VERSION.split("."):
            raise ConfigError(
                f"the cluster at {self.where} runs Ray {version}, and the jobs need Ray {RAY_VERSION}: start it from "
                "the image of this project, or install the versions of constraints.txt there"
            )
        return version

    def status(self, submission_id: str) -> JobStatus | None:
        """See `JobBackend`."""
        response = self._ask("GET", f"/api/jobs/{submission_id}")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        info = self._content(response)
        state, message = State(info["status"]), str(info.get("message") or "")
        code = 0 if state is State.SUCCEEDED else info.get("driver_exit_code")
        return JobStatus(state, code, message.splitlines()[0] if message else "")

    def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
        """See `JobBackend`. The cluster's version is checked before."""
        self.version()
        job = {"submission_id": submission_id, "entrypoint": command, "metadata": metadata}
        deadline = time.monotonic() + AGENT_S
        while True:
            response = self._ask("POST", "/api/jobs/", json=job)
            if response.is_success:
                return True
            if "already exists" in response.text:
                return False
            if "No available agent" not in response.text:
                self._content(response)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the Ray head at {self.where} has no agent to start a job with. Two heads on one host? Give the "
                    "second one its own --dashboard-agent-listen-port"
                )
            time.sleep(3)

    def log(self, submission_id: str) -> str:
        """See `JobBackend`."""
        response = self._ask("GET", f"/api/jobs/{submission_id}/logs")
        if response.status_code == httpx.codes.NOT_FOUND:
            return ""
        return str(self._content(response).get("logs") or "")

    def ask_to_stop(self, submission_id: str) -> None:
        """See `JobBackend`. How long it may drain is the cluster's RAY_JOB_STOP_WAIT_TIME_S."""
        response = self._ask("POST", f"/api/jobs/{submission_id}/stop")
        if response.status_code != httpx.codes.NOT_FOUND:
            self._content(response)

    def url(self, submission_id: str) -> str | None:
        """See `JobBackend`."""
        return f"{self.where}/#/jobs/{submission_id}"

    def usage(self) -> dict[str, tuple[float, float]]:
        """What is used, and what there is, of every resource of the cluster."""
        status = self._content(self._ask("GET", "/api/cluster_status")).get("data", {}).get("clusterStatus") or {}
        usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
        return {name: (float(used), float(total)) for name, (used, total) in usage.items()}

    def _ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **body)
        except httpx.HTTPError as error:
            raise TransientError(
                f"no Ray cluster answers at {self.where} ({type(error).__name__}): is it up, and is "
                "RAY_API_SERVER_ADDRESS its dashboard's address?"
            ) from error
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            seen = "refuses the token" if self._has_token else "wants a token, and there is none"
            raise ConfigError(
                f"the Ray cluster at {self.where} {seen}: set RAY_AUTH_TOKEN_PATH to a file with the token that the "
                "head was started with"
            )
        if response.status_code in (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, 504):
            raise TransientError(f"the Ray cluster at {self.where} answers {response.status_code}")
        return response

    def _content(self, response: httpx.Response) -> dict[str, Any]:
        """The JSON of an answer; TransientError for one that says that something went wrong inside."""
        if not response.is_success:
            words = response.text.strip().splitlines() or [""]
            raise TransientError(f"the Ray cluster at {self.where} answers {response.status_code}: {words[-1][:300]}")
        try:
            content = response.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ConfigError(f"{self.where} answers, but not as a Ray dashboard does: check RAY_API_SERVER_ADDRESS")
        return content


def _token() -> str | None:
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH names {named}, which cannot be read: {error.strerror}") from None
        return None

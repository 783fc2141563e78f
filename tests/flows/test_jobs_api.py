"""What a person is told when the cluster is not what it should be. A real cluster is in tests/cluster."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.jobs_api import RayJobs
from unetpp.errors import ConfigError, TransientError


class Answers:
    """A server that gives one answer to everything."""

    def __init__(self) -> None:
        self.status, self.content = 200, json.dumps({"ray_version": "2.60.0"})
        self.authorization: str | None = None
        answers = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answers.authorization = self.headers.get("Authorization")
                self.send_response(answers.status)
                self.end_headers()
                self.wfile.write(answers.content.encode())

            do_POST = do_GET

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def answers() -> Iterator[Answers]:
    """The server."""
    there = Answers()
    thread = threading.Thread(target=there.server.serve_forever, daemon=True)
    thread.start()
    yield there
    there.server.shutdown()
    there.server.server_close()


def test_another_version_of_ray_is_refused_before_anything_is_started(answers: Answers) -> None:
    answers.content = json.dumps({"ray_version": "2.49.1"})
    with pytest.raises(ConfigError, match=r"runs Ray 2\.49\.1, and the jobs need Ray 2\.60"):
        RayJobs(answers.url).submit("job", "unetpp predict", {})


@pytest.mark.parametrize("content", ["<html>", "[]", '{"version": 1}'])
def test_something_else_at_the_address_is_told(answers: Answers, content: str) -> None:
    answers.content = content
    with pytest.raises(ConfigError, match="check RAY_API_SERVER_ADDRESS"):
        RayJobs(answers.url).version()


def test_nothing_at_the_address_is_told() -> None:
    with pytest.raises(TransientError, match=r"no Ray cluster answers at http://127\.0\.0\.1:1 "):
        RayJobs("http://127.0.0.1:1").status("job")


@pytest.mark.parametrize("address", ["ray://head:10001", "head:8265", "http://", "http://head:dashboard"])
def test_what_is_no_address_of_a_dashboard_is_told(address: str) -> None:
    with pytest.raises(ConfigError, match="wanted that of its dashboard, such as http://head:8265"):
        RayJobs(address)


def test_a_cluster_that_wants_a_token_says_so(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    answers.status = 401
    with pytest.raises(ConfigError, match="wants a token, and there is none: set RAY_AUTH_TOKEN_PATH"):
        RayJobs(answers.url).status("job")


def test_a_wrong_token_is_told_without_the_token(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("canary-token\n")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    answers.status = 403
    with pytest.raises(ConfigError, match="refuses the token") as refused:
        RayJobs(answers.url).status("job")
    assert answers.authorization == "Bearer canary-token"
    assert "canary" not in str(refused.value)


def test_a_token_file_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH names .*absent, which cannot be read"):
        RayJobs("http://127.0.0.1:1")


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_cluster_in_trouble_may_answer_later(answers: Answers, status: int) -> None:
    answers.status, answers.content = status, "Traceback\nRuntimeError: no"
    with pytest.raises(TransientError, match=str(status)):
        RayJobs(answers.url).status("job")

"""What the doctor says of a clock and of versions. A whole site is in tests/cluster."""

import http.server
import importlib.util
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

import flows
from flows.config import DoctorConfig
from flows.doctor import Finding, examine
from jobs import registry, storage
from jobs.registry import CurrentModel


@pytest.fixture
def clock() -> Iterator[list[float]]:
    """Seconds that a server's clock, of the URL in AWS_ENDPOINT_URL, is ahead of ours."""
    ahead = [0.0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", formatdate(time.time() + ahead[0], usegmt=True))
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            yield ahead
        server.shutdown()


@pytest.mark.parametrize(("ahead_s", "state"), [(0, "ok"), (30, "ok"), (3600, "wrong"), (-3600, "wrong")])
def test_a_wrong_clock_is_found(clock: list[float], ahead_s: float, state: str) -> None:
    clock[0] = ahead_s
    from flows import doctor

    url = doctor._store_url(DoctorConfig(models="s3://models/x"))
    finding = doctor._check("clock", url, doctor._clock, "")
    assert finding.state == state
    assert ("set the clock" in finding.fix) == (state == "wrong")


def test_what_was_not_asked_for_says_how_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    findings = {finding.what: finding for finding in examine(DoctorConfig(output=str(tmp_path)))}
    assert findings["output"].state == "ok"
    assert findings["disk"].state in ("ok", "wrong")
    assert {what for what, finding in findings.items() if finding.state == "not asked"} == set(findings) - {
        "output",
        "disk",
    }
    assert "RAY_API_SERVER_ADDRESS" in findings["ray"].seen


def test_what_cannot_be_asked_is_found_and_the_rest_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    asked = DoctorConfig(ray="http://127.0.0.1:1", gpus=1, prefect="http://127.0.0.1:port/api")
    findings = {finding.what: finding for finding in examine(asked)}
    for what in ("ray", "ray resources", "gpus"):
        assert findings[what].state == "wrong"
        assert "RAY_AUTH_TOKEN_PATH names" in findings[what].seen
    assert findings["automations"].state == "wrong"
    assert "does not answer (InvalidURL)" in findings["prefect"].seen


def test_an_input_is_listed_and_read_however_it_is_spelt(place: str) -> None:
    storage.write_bytes(f"{place}/images/a.png", b"image")
    for spelt in (f"{place}/images", f"{place}/images/"):
        (finding, *_) = examine(DoctorConfig(input=spelt))
        assert (finding.state, finding.seen) == ("ok", f"{spelt}: listed, and a.png read, 5 bytes")


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    findings = {finding.what: finding for finding in examine(DoctorConfig(output=str(tmp_path / "file" / "below")))}
    assert findings["output"].state == "wrong"
    assert findings["output"].fix


@pytest.fixture
def models(tmp_path: Path) -> str:
    """A registry whose current model has its files, which are no model."""
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    model = CurrentModel(digest="a" * 64, level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="first")
    assert registry.promote(str(tmp_path / "models"), 1, model, str(folder))
    return str(tmp_path / "models")


def model_finding(models: str) -> Finding:
    (finding,) = [each for each in examine(DoctorConfig(models=models)) if each.what == "model"]
    return finding


def test_where_torch_is_not_a_models_files_are_looked_for(models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert model_finding(models)[1:] == (
        "ok",
        "number 1 is aaaaaaaaaa, level L2; its files are there, and were not loaded, which takes torch",
        "",
    )
    (Path(models) / ("a" * 64) / "model.safetensors").unlink()
    assert (model_finding(models).state, "unetpp rollback" in model_finding(models).fix) == ("wrong", True)


def test_a_torch_that_cannot_be_imported_says_nothing_against_the_model(
    models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12 is not there')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(flows.__file__).parents[1]}")
    finding = model_finding(models)
    assert (finding.state, finding.fix) == ("wrong", "install the project here again: make setup")
    assert "ImportError: libcudart.so.12 is not there" in finding.seen

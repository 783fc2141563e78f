"""Places that only fsspec knows: read as any other, never written."""

import functools
import http.server
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from jobs import predict, storage
from jobs.contract import PredictConfig
from jobs.table import read_masks
from tests.jobs.test_archives import tar_of
from unetpp.errors import ConfigError, ImageError, StorageError


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 20, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that knows ranges, as real ones do."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if asked is None or not path.is_file():
            super().do_GET()
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        content = path.read_bytes()[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a tar of two."""
    root = tmp_path / "served"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (root / name).write_bytes(_png(number))
    (root / "x.tar").write_bytes(tar_of({"d.png": _png(4), "e.png": _png(5)}))
    return root


@pytest.fixture(params=["http", "memory"])
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """Where the folder's files are for fsspec alone."""
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.put(str(folder), "/served", recursive=True)
        yield "memory://served"
        memory.rm("/served", recursive=True)
        return
    handler = functools.partial(_Ranges, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_fsspec_reads_is_segmented(served: str, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    where = {"model": str(tiny_model), "backend": "inline", "threads": 1}
    here = PredictConfig.model_validate({**where, "input": str(folder), "output": f"{tmp_path}/here"})
    there = PredictConfig.model_validate({**where, "input": served, "output": f"{tmp_path}/there"})
    assert predict.run(here).num_predicted == predict.run(there).num_predicted == 5
    masks = [
        {row["key"]: row["mask_png"] for row in read_masks(f"{tmp_path}/{name}").to_pylist()}
        for name in ("here", "there")
    ]
    assert masks[0] == masks[1]
    assert predict.run(there).status == "unchanged"


def test_a_version_is_read_or_nothing(served: str, folder: Path) -> None:
    listed = {found.key: found for found in storage.list_objects(served)}
    assert sorted(listed) == ["a.png", "b.png", "sub/c.png", "x.tar"]
    content, uri, etag = _png(0), f"{served}/a.png", listed["a.png"].etag
    assert storage.read_bytes(uri, etag) == content
    assert storage.read_range(uri, 10, 30, etag) == content[10:30]
    found = storage.find(uri)
    assert found is not None
    assert (found.etag, found.size_bytes) == (etag, len(content))
    assert storage.find(f"{served}/absent.png") is None
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{served}/absent.png")
    with pytest.raises(ImageError, match="gone"):
        storage.read_bytes(f"{served}/absent.png", etag)
    if served.startswith("memory"):
        fsspec.filesystem("memory").pipe("/served/a.png", _png(7)[: len(content)])
    else:
        os.utime(folder / "a.png", (1, 1))
    with pytest.raises(ImageError, match="changed"):
        storage.read_bytes(uri, etag)


def test_it_is_never_written(served: str) -> None:
    for write in (
        lambda: storage.write_bytes(f"{served}/new", b""),
        lambda: storage.put_if_absent(f"{served}/new", b""),
        lambda: storage.delete(f"{served}/a.png"),
    ):
        with pytest.raises(ConfigError, match="can be read, not written"):
            write()


@pytest.mark.parametrize(
    "name", ["X-Amz-Signature", "x-goog-credential", "sig", "Signature", "access_token", "api-key"]
)
def test_a_secret_in_a_query_is_refused_and_not_shown(tiny_model: Path, tmp_path: Path, name: str) -> None:
    uri = f"https://host/a.png?versionId=1&{name}=CANARY"
    (tmp_path / "l.csv").write_text(f"uri\n{uri}\n")
    words = {"model": str(tiny_model), "output": f"{tmp_path}/out", "backend": "inline", "threads": 1}
    for look in (
        lambda: storage.canonical(uri),
        lambda: storage.find(uri),
        lambda: predict.run(PredictConfig.model_validate({**words, "input": f"{tmp_path}/l.csv"})),
    ):
        with pytest.raises(ConfigError, match=f"a location at host holds a secret, '{name}'") as refused:
            look()
        assert "CANARY" not in str(refused.value)
    assert "CANARY" not in "".join(path.read_text("latin-1") for path in tmp_path.glob("out/**/*") if path.is_file())


def test_a_query_that_tells_no_secret_is_part_of_an_address() -> None:
    assert storage.canonical("https://host/images?id=7&key=a.png") == "https://host/images?id=7&key=a.png"


def test_a_dead_server_is_a_store_that_is_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.foreign.MAX_ATTEMPTS", 2)
    with pytest.raises(StorageError, match="cannot be read"):
        storage.read_bytes("http://127.0.0.1:9/a.png")

"""A real S3 server on loopback, for as long as it is needed."""

import os
import random
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from s3fs import S3FileSystem

from infra import seaweedfs
from infra.cluster import is_free

KEY_ID, SECRET = "key-of-the-tests", "canary-secret-of-the-tests"
BUCKETS = ("archive", "output")


class SeaweedFS:
    """SeaweedFS with buckets `archive` and `output` and everything that it stores in `folder`.

    environment: the AWS_* variables that lead to it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._s3_port, *self._ports = _free_ports(5)
        self.url = f"http://127.0.0.1:{self._s3_port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers."""
        command = seaweedfs.command(
            self._folder,
            s3_port=self._s3_port,
            ports=dict(zip(seaweedfs.SERVICES, self._ports, strict=True)),
            buckets=BUCKETS,
            key_id=KEY_ID,
            secret=SECRET,
        )
        with (self._folder / "log").open("wb") as log:
            environment = {**os.environ, **seaweedfs.ENVIRONMENT}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self._wait_until_answering()
        self._wait_for_buckets()

    def kill(self) -> None:
        """kill -9: its data is temporary, and a gentle end takes it more than ten seconds."""
        self.process.kill()
        self.process.wait()

    def _log(self) -> str:
        return (self._folder / "log").read_text()[-2000:]

    def _wait_until_answering(self) -> None:
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url, timeout=5)
            except urllib.error.HTTPError:
                return  # 403: it is there, and wants credentials
            except OSError:
                assert self.process.poll() is None, f"SeaweedFS ended:\n{self._log()}"
                time.sleep(0.2)
        raise AssertionError(f"SeaweedFS does not answer:\n{self._log()}")

    def _wait_for_buckets(self) -> None:
        """The server answers some moments before it has made the buckets that it was told to."""
        client = S3FileSystem(key=KEY_ID, secret=SECRET, endpoint_url=self.url, use_listings_cache=False)
        for _ in range(300):
            if all(client.exists(bucket) for bucket in BUCKETS):
                return
            time.sleep(0.1)
        raise AssertionError(f"SeaweedFS did not make the buckets {BUCKETS}")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _free_ports(number: int) -> list[int]:
    """Ports that are free together with the one 10000 above, where SeaweedFS puts gRPC."""
    found: list[int] = []
    while len(found) < number:
        port = random.SystemRandom().randrange(20_000, 45_000)
        if port not in found and all(is_free(candidate) for candidate in (port, port + 10_000)):
            found.append(port)
    return found

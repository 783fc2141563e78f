"""Half an hour of nights: images arrive all the time, a schedule of a few minutes, drains and kills on the way.

    python -m tests.cluster.soak --minutes 30 --out tests/bench/results/nights_soak.json

At the end every image that arrived has one row with a mask, over all runs; memory of supervisors and drivers, and the
number of lines in Prefect's log, are in the result.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch

from infra.cluster import Site, free_base_port
from jobs import registry
from jobs.registry import CurrentModel
from tests.bench.setting import setting
from tests.cluster.conftest import Nights, put_images, wait_for
from unetpp.checkpoint import digest, save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus

INPUT, OUTPUT, MODELS = "s3://archive/soak", "s3://output/soak", "s3://models/soak"


class Arrivals:
    """Images that come into the archive, a few a second."""

    def __init__(self, per_second: float) -> None:
        self.number, self._pause_s, self._ended = 0, 1 / per_second, threading.Event()
        self._thread = threading.Thread(target=self._arrive, daemon=True)
        self._thread.start()

    def _arrive(self) -> None:
        while not self._ended.wait(self._pause_s):
            put_images(INPUT, 1, self.number)
            self.number += 1

    def stop(self) -> None:
        """No more."""
        self._ended.set()
        self._thread.join()


class Memory:
    """Resident megabytes of supervisors and drivers, every few seconds."""

    def __init__(self) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._started, self._ended = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(3):
            for process in psutil.process_iter():
                try:
                    words = " ".join(process.cmdline())
                    kind = (
                        "supervisor"
                        if "prefect.engine" in words
                        else "driver"
                        if "unetpp predict" in words and "/bin/sh" not in words
                        else "worker"
                        if "prefect worker start" in words
                        else "server"
                        if "prefect.server.api.server" in words
                        else None
                    )
                    if kind:
                        megabytes = process.memory_info().rss / 2**20
                        self.samples[kind].append((time.monotonic() - self._started, megabytes))
                except psutil.Error:
                    continue

    def by_thirds(self) -> dict[str, list[dict[str, float]]]:
        """Median and maximum of each kind in the first, second and last third."""
        self._ended.set()
        self._thread.join()
        end = time.monotonic() - self._started
        thirds: dict[str, list[dict[str, float]]] = {}
        for kind, samples in self.samples.items():
            thirds[kind] = []
            for third in range(3):
                found = sorted(rss for at, rss in samples if third * end / 3 <= at < (third + 1) * end / 3)
                if found:
                    thirds[kind].append({"median_mb": round(found[len(found) // 2]), "max_mb": round(found[-1])})
        return thirds


def give_model() -> None:
    """A registry with a small model."""
    torch.manual_seed(7)
    model = UNetPlusPlus(ModelConfig(level=2, filters=(16, 32, 64)))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder))
        current = CurrentModel(digest=digest(model), level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="given")
        registry.promote(MODELS, 1, current, folder)


def active(nights: Nights) -> list[dict[str, Any]]:
    """Flow runs that are at work."""
    wanted = {"state": {"type": {"any_": ["RUNNING"]}}}
    found: list[dict[str, Any]] = nights.ask("POST", "/flow_runs/filter", json={"flow_runs": wanted})
    return found


def drain(nights: Nights) -> None:
    """Cancel the night that works."""
    for run in active(nights):
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        nights.ask("POST", f"/flow_runs/{run['id']}/set_state", json=state)


def finish(nights: Nights, config: dict[str, Any]) -> None:
    """A last night, for what came after the one before; it is cancelled while a scheduled or resumed one works."""
    give_up = time.monotonic() + 600
    while True:
        wait_for(lambda: not active(nights), 300)
        last = nights.start("archive", config | {"again": True})
        ended = nights.ended(last)
        if ended["type"] == "COMPLETED":
            return
        assert ended["type"] == "CANCELLED", (ended, nights.log(last))
        assert time.monotonic() < give_up, ended
        time.sleep(5)


def soak(nights: Nights, minutes: float, period_minutes: int, seed: int) -> dict[str, Any]:
    """The half hour, and what was seen."""
    rng, give_up = random.Random(seed), time.monotonic() + 60 * minutes
    config = {
        "models": MODELS,
        "input": INPUT,
        "output": OUTPUT,
        "period_minutes": period_minutes,
        "predict": {"shard_images": 8, "write": ["parquet"]},
    }
    put_images(INPUT, 50, 100_000)
    arrivals, memory = Arrivals(2.0), Memory()
    schedule = {
        "active": True,
        "slug": "soak",
        "schedule": {"interval": 60 * period_minutes},
        "parameters": {"config": config},
    }
    nights.ask("POST", f"/deployments/{nights.deployment('archive')['id']}/schedules", json=[schedule])
    acts = {
        "drain": lambda: drain(nights),
        "kill the flow": nights.kill_flow,
        "kill the worker": nights.kill_worker,
        "kill a node": nights.kill_node,
    }
    words = [*acts, "drain"]
    rng.shuffle(words)
    done: list[tuple[float, str]] = []
    started = time.monotonic()
    for number, word in enumerate(words):
        due = started + 60 * minutes * (number + 1) / (len(words) + 1)
        while time.monotonic() < due or not active(nights):
            assert time.monotonic() < give_up, f"no night was at work when it was time to {word}"
            time.sleep(1)
        time.sleep(rng.uniform(0, 15))
        acts[word]()
        done.append((round(time.monotonic() - started), word))
        print(done[-1], Counter(nights.jobs("soak").values()), arrivals.number, flush=True)
    while time.monotonic() < give_up:
        time.sleep(1)
    arrivals.stop()
    (ours,) = [
        each
        for each in nights.ask("GET", f"/deployments/{nights.deployment('archive')['id']}/schedules")
        if each["slug"] == "soak"
    ]
    nights.ask("DELETE", f"/deployments/{nights.deployment('archive')['id']}/schedules/{ours['id']}")
    finish(nights, config)

    rows = nights.rows(OUTPUT)
    keys = Counter(row["key"] for row in rows)
    runs = nights.ask("POST", "/flow_runs/filter", json={"limit": 200})
    num_lines = sum(nights.log(run["id"]).count("\n") + 1 for run in runs if run["state_type"] != "SCHEDULED")
    return {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "seed": seed,
        "acts": done,
        "flow_runs": Counter(run["state_name"] for run in runs),
        "ray_jobs": Counter(nights.jobs("soak").values()),
        "num_images": arrivals.number + 50,
        "num_rows": len(rows),
        "num_keys": len(keys),
        "num_keys_twice": sum(number > 1 for number in keys.values()),
        "num_failed_rows": sum(row["error_code"] is not None for row in rows),
        "log_lines": num_lines,
        "memory_by_thirds": memory.by_thirds(),
    }


def main() -> None:
    """Start a site, soak it, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--period-minutes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        site = Site(Path(folder), free_base_port())
        try:
            site.up()
            os.environ.update(site.store_environment() | site.ray_environment())
            give_model()
            report = soak(Nights(site), asked.minutes, asked.period_minutes, asked.seed)
        finally:
            site.down()
    asked.out.write_text(json.dumps({**setting(), **report}, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    assert report["num_rows"] == report["num_keys"] == report["num_images"], "lost or twice"
    assert report["num_failed_rows"] == 0


if __name__ == "__main__":
    main()

"""How the end of a run looks on a cluster: do summaries reach the driver at once, do the workers end together?

    python -m tests.bench.cluster_tail --out tests/bench/results/cluster_tail.json

A local Ray cluster: a head that does no work, and nodes with one worker each. Who did a shard is read from the run's
notes while it works, when it was committed from its part. An image takes a fixed time besides its forward (`--rest-s`),
so that the workers are as fast as each other although the machine has fewer cores than the cluster has nodes.
"""

import argparse
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray.cluster_utils import Cluster

from jobs import backends, predict
from jobs.contract import PredictConfig
from jobs.sink import Footer
from tests.bench.setting import setting
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus

REST = """
import importlib.abc, importlib.machinery, os, sys, time

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "unetpp.openvino_engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            forward = module.OpenVINOEngine.__call__
            def rested(self, tiles_BHWC, core):
                time.sleep(float(os.environ["REST_S"]))
                return forward(self, tiles_BHWC, core)
            module.OpenVINOEngine.__call__ = rested
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


class Watcher:
    """Sees, by polling, which worker begins which shard and when."""

    def __init__(self, output: Path) -> None:
        self._hints = output / "runs" / "r00001" / "hints"
        self._ended = threading.Event()
        self.begun: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            for note in self._hints.glob("shard-*"):
                shard = int(note.name.split(".")[0].removeprefix("shard-"))
                if shard not in self.begun:
                    try:
                        owner, began = note.read_text(), note.stat().st_mtime
                    except FileNotFoundError:
                        continue
                    if owner:
                        self.begun[shard] = (owner, began)

    def stop(self) -> None:
        """No more."""
        self._ended.set()
        self._thread.join()


def measure(folder: Path, num_images: int, shard_images: int, num_nodes: int) -> dict[str, Any]:
    """One run on a cluster of its own."""
    rng = np.random.default_rng(0)
    images, output = folder / "images", folder / "out"
    images.mkdir()
    for number in range(num_images):
        Image.fromarray(rng.integers(0, 255, (*rng.integers(64, 400, 2), 3), np.uint8)).save(images / f"{number}.png")
    torch.manual_seed(7)
    save_pretrained(UNetPlusPlus(ModelConfig(level=1, filters=(4, 8))), folder / "model")
    arrived: dict[int, float] = {}
    on_ray = backends.on_ray

    def noting(*words: Any) -> Iterator[Footer]:
        for footer in on_ray(*words):
            arrived[footer.shard] = time.time()
            yield footer

    backends.on_ray = noting  # type: ignore[assignment]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    watcher = Watcher(output)
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        config = PredictConfig(
            model=str(folder / "model"), input=str(images), output=str(output), shard_images=shard_images, threads=1
        )
        started = time.time()
        assert predict.run(config).exit_code == 0
        seconds = time.time() - started
    finally:
        watcher.stop()
        backends.on_ray = on_ray
        ray.shutdown()
        cluster.shutdown()
    committed = {int(part.stem.split("-")[1]): part.stat().st_mtime for part in output.rglob("part-*.parquet")}
    ends: dict[str, float] = {}
    for shard, (owner, _) in watcher.begun.items():
        ends[owner] = max(ends.get(owner, 0.0), committed[shard])
    took = sorted(committed[shard] - began for shard, (_, began) in watcher.begun.items())
    late = sorted(arrived[shard] - committed[shard] for shard in committed)
    return {
        "num_shards": len(committed),
        "num_workers": len(ends),
        "num_shards_seen_begin": len(watcher.begun),
        "run_s": seconds,
        "first_begin_to_last_commit_s": max(committed.values()) - min(began for _, began in watcher.begun.values()),
        "tail_s": max(ends.values()) - float(np.median(list(ends.values()))),
        "shard_s": {"median": float(np.median(took)), "max": took[-1]},
        "commit_to_driver_s": {
            "median": float(np.median(late)),
            "p95": float(np.quantile(late, 0.95)),
            "max": late[-1],
        },
        "worker_ends_s": sorted(round(end - started, 2) for end in ends.values()),
    }


def main() -> None:
    """Measure a few runs, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--shard-images", type=int, default=16)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rest-s", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as site:
        (Path(site) / "sitecustomize.py").write_text(REST)
        os.environ.update(
            {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": site, "REST_S": str(asked.rest_s)}
        )
        for _ in range(asked.repeats):
            with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as folder:
                run = measure(Path(folder), asked.images, asked.shard_images, asked.nodes)
            run["tail_share"] = run["tail_s"] / run["first_begin_to_last_commit_s"]
            runs.append(run)
            print(json.dumps(run), flush=True)
    settings = {name: value for name, value in vars(asked).items() if name != "out"}
    asked.out.write_text(json.dumps({**setting(), "settings": settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Does topology split keep Ray's object store small, however much there is to do?

    python -m tests.bench.split --data <dsb2018> --out tests/bench/results/split.json

n and 10n images of 1024 x 1024 pixels, a small network, topology split on a private Ray of this machine: the most
bytes that the object store held, and what it spilled to disk. The decoded images of the larger run are several times
what the store may hold.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jobs import predict
from jobs.cluster import local_ray
from jobs.contract import PredictConfig
from tests.bench.rounds import Measured, Sample, interleaved, write
from tests.bench.subjects import crops, mosaic, write_images, write_random_model

SIDE = 1024
SMALL = (8, 16, 24, 32, 40)
EVERY_S = 0.1
MOST_MIB = 1024


class Store:
    """Inside the block: the most MiB that the object store of this Ray held, and the MiB that it spilled."""

    def __init__(self) -> None:
        self.peak_mib = self.spilled_mib = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        import ray
        from ray._private.internal_api import node_stats

        (node,) = ray.nodes()
        while not self._ended.wait(EVERY_S):
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats
            self.peak_mib = max(self.peak_mib, stats.object_store_bytes_used / (1 << 20))
            self.spilled_mib = stats.spilled_bytes_total / (1 << 20)

    def __enter__(self) -> "Store":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()


def run(images: Path, model: Path, folder: Path, num_cpus: int) -> Sample:
    """One run on a Ray of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as output, local_ray(num_cpus):
        config = PredictConfig(
            model=str(model), input=(str(images),), output=output, topology="split", threads=1, level=1
        )
        started = time.perf_counter()
        with Store() as store:
            result = predict.run(config)
        assert result.status == "complete", result
        megapixels = result.megapixels
    return {
        "peak_mib": store.peak_mib,
        "spilled_mib": store.spilled_mib,
        "decoded_mib": 3 * megapixels * 1e6 / (1 << 20),
        "wall_s": time.perf_counter() - started,
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=40, help="n")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=4, help="logical CPUs of Ray: how much is on its way at a time")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name:
        folder = Path(name)
        pictures = crops(asked.data, 64)
        write_random_model(folder / "model", SMALL, pictures)
        image_HWC = mosaic(pictures, SIDE)
        for num in (asked.images, 10 * asked.images):
            write_images(folder / f"images-{num}", [image_HWC] * num)
        found: Measured = interleaved(
            {f"{num} images": folder / f"images-{num}" for num in (asked.images, 10 * asked.images)},
            asked.rounds,
            lambda images: run(images, folder / "model", folder, asked.cpus),
        )
    peak = max(sample["peak_mib"] for samples in found.samples.values() for sample in samples)
    spilled = max(sample["spilled_mib"] for samples in found.samples.values() for sample in samples)
    targets = {
        "the object store's most, MiB": {"wanted": MOST_MIB, "seen": peak, "met": peak < MOST_MIB},
        "spilled, MiB": {"wanted": 0, "seen": spilled, "met": spilled == 0},
    }
    write(asked.out, vars(asked), found, (), targets=targets)


if __name__ == "__main__":
    main()

"""Is the work linear in the number of objects? CPU time of `unetpp predict` over 5,000, 25,000 and 100,000 images.

    python -m tests.bench.many_objects --out tests/bench/results/many_objects.json

Loose 64x64 images on a real S3 server, an L1 model, inline, so that the process and its decoder are the whole tree and
their CPU time is exact: what the kernel counts for the process and the children it waited for, the server not.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jobs import storage
from tests.bench.setting import setting
from tests.seaweedfs import SeaweedFS
from unetpp.checkpoint import save_pretrained
from unetpp.config import ModelConfig
from unetpp.model import UNetPlusPlus

SIZES = (5_000, 25_000, 100_000)


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ.update({"AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"})
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    measured = []
    for num_images in asked.sizes:
        with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name, SeaweedFS(Path(name)) as server:
            os.environ.update(server.environment)
            torch.manual_seed(7)
            save_pretrained(UNetPlusPlus(ModelConfig(level=1, filters=(32, 64))), Path(name) / "model")
            with ThreadPoolExecutor(16) as threads:
                names = [f"s3://archive/{number % 100:02d}/{number:06d}.png" for number in range(num_images)]
                list(threads.map(lambda uri: storage.write_bytes(uri, file.getvalue()), names))
            words = ["predict", "--model", f"{name}/model", "--input", "s3://archive", "--output", "s3://output/out"]
            words += ["--backend", "inline", "--threads", "1"]
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            process = subprocess.Popen([sys.executable, "-m", "jobs.cli", *words], stderr=subprocess.DEVNULL)
            process.wait()
            assert process.returncode == 0, process.returncode
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            measured.append(
                {
                    "num_images": num_images,
                    "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                    "wall_s": time.monotonic() - started,
                    "peak_mb": after.ru_maxrss >> 10,
                }
            )
            print(json.dumps(measured[-1]), flush=True)
    slopes = [
        1000 * (later["cpu_s"] - earlier["cpu_s"]) / (later["num_images"] - earlier["num_images"])
        for earlier, later in pairwise(measured)
    ]
    report = {**setting(), "measured": measured, "cpu_ms_per_image": slopes}
    if len(slopes) > 1:
        report["ratio_of_slopes"] = slopes[-1] / slopes[0]
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

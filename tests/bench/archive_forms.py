"""One set of images in every form that is read: the same masks, and what each form costs.

    python -m tests.bench.archive_forms --data <dsb2018> --out tests/bench/results/archive_forms.json

The images of a split, on a real S3 server: loose, as .tar, .tar.gz, .tar.zst, .zip, Parquet, and named by a manifest.
Inline, so that the process and its decoder are the whole tree; CPU time is what the kernel counts for both.
"""

import argparse
import csv
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import predict, storage
from jobs.contract import PredictConfig
from jobs.table import read_masks
from tests.bench.setting import setting
from tests.jobs.test_archives import PACKED
from tests.seaweedfs import SeaweedFS

PLACE, OUTPUT = "s3://archive", "s3://output"


def put(files: dict[str, bytes]) -> dict[str, tuple[str, Callable[[str], str]]]:
    """Put the images in every form: (input, what a loose image's key is called in it) by name of the form."""
    for name, content in files.items():
        storage.write_bytes(f"{PLACE}/loose/{name}", content)
    forms: dict[str, tuple[str, Callable[[str], str]]] = {"loose": (f"{PLACE}/loose", str)}
    for name, pack in PACKED.items():
        storage.write_bytes(f"{PLACE}/{name}", pack(files))
        forms[name] = (f"{PLACE}/{name}", f"{name}#{{}}".format)
    text = io.StringIO()
    csv.writer(text).writerows([("uri", "number"), *((f"loose/{name}", n) for n, name in enumerate(files))])
    storage.write_bytes(f"{PLACE}/list.csv", text.getvalue().encode())
    forms["manifest"] = (f"{PLACE}/list.csv", lambda key: f"loose/{key}")
    return forms


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="nuclei")
    parser.add_argument("--level", type=int)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    os.environ.update({"AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"})
    with (asked.data / "splits.csv").open() as file:
        ids = sorted(row["id"] for row in csv.DictReader(file) if row["split"] == asked.split)
    files = {f"{id_}.png": (asked.data / "images" / f"{id_}.png").read_bytes() for id_ in ids}
    measured: list[dict[str, Any]] = []
    wanted: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as name, SeaweedFS(Path(name)) as server:
        os.environ.update(server.environment)
        for form, (place, key_in) in put(files).items():
            settings = {"model": asked.model, "level": asked.level, "input": place, "output": f"{OUTPUT}/{form}"}
            config = PredictConfig.model_validate({**settings, "backend": "inline", "threads": 1})
            before, started = _cpu_s(), time.monotonic()
            result = predict.run(config)
            cost = {"cpu_s": _cpu_s() - before, "wall_s": time.monotonic() - started}
            rows = read_masks(f"{OUTPUT}/{form}").to_pylist()
            masks = {row["key"]: row["mask_png"] for row in rows}
            wanted = wanted or masks
            assert result.status == "complete", result
            num_same = sum(masks.get(key_in(key)) == mask for key, mask in wanted.items())
            started = time.monotonic()
            assert predict.run(config).status == "unchanged"
            again = {"again_wall_s": time.monotonic() - started}
            measured.append({"form": form, "num_images": len(masks), "num_same_masks": num_same, **cost, **again})
            print(json.dumps(measured[-1]), flush=True)
    report = {**setting(), "model": asked.model, "level": asked.level, "measured": measured}
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    assert all(each["num_same_masks"] == each["num_images"] == len(files) for each in measured)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    main()

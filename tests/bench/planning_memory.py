"""What planning holds in memory: peak of a process that plans 20,000 and 2,000,000 objects, a tenth of them new.

    python -m tests.bench.planning_memory --out tests/bench/results/planning_memory.json

Each size in a process of its own. The listing is made up a page at a time; what is done before is read from the
committed parts of a real output, as in a run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import done, manifest, planning, sink
from jobs.manifest import Listed
from jobs.planning import ShardSize
from jobs.storage import StoredObject
from tests.bench.setting import setting

SIZES = (20_000, 2_000_000)
DIGEST, SOURCE = "0" * 64, "s3://bucket/images"


def listing(num_objects: int) -> Iterator[StoredObject]:
    """Objects in the order of their keys, as a store lists them."""
    for number in range(num_objects):
        yield StoredObject(f"plate-{number // 1000:05d}/well-{number:09d}.png", f"{number:032x}", 10_000)


def write_table(output: str, num_objects: int) -> None:
    """Commit nine of ten objects, in parts of many shards' size: few files, so that planning is what is measured."""
    rows: list[dict[str, Any]] = []
    parts = iter(range(1_000_000))

    def commit() -> None:
        number = next(parts)
        uri = f"{sink.parts_uri(output, DIGEST, 'r00001')}/{sink.part_name(number)}"
        sink.commit(uri, rows, run="r00001", manifest_sha256="0", shard=number, seconds=1.0, root=output)
        rows.clear()

    for found in listing(num_objects):
        if int(found.etag, 16) % 10 == 0:
            continue
        row = dict.fromkeys(sink.SCHEMA.names)
        row |= {"key": found.key, "source_uri": SOURCE, "etag": found.etag, "window_y": 0, "window_x": 0}
        row |= {"window_h": 64, "window_w": 64, "height": 64, "width": 64, "num_windows": 1, "window_px": 0, "level": 1}
        row |= {"mask_png": b"png", "class_pixels": [4096, 0], "uncertainty": 0.0, "model_digest": DIGEST}
        row |= {"seconds": 0.1, "attempts": 1, "schema_version": sink.SCHEMA_VERSION}
        rows.append(row)
        if len(rows) == 4096:
            commit()
    commit()


def plan(output: str, num_objects: int) -> dict[str, int]:
    """Plan as a run does, and say what it took at most."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = done.done_before(
        output, DIGEST, sources={SOURCE}, write=("parquet",), written_by_run={"r00001": ("parquet",)}, waiting=()
    )
    planned = planning.plan(
        (Listed(0, *found) for found in listing(num_objects)), sources=[SOURCE], done=before, size=ShardSize(64)
    )
    size = len(manifest.encode(planned.table))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"num_listed": planned.num_listed, "num_new": len(planned.table), "manifest_bytes": size}
    return {"num_objects": num_objects, **found, "imported_kb": baseline, "peak_kb": peak}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plan", nargs=2, metavar=("OUTPUT", "NUM"), help="one measurement, in this process")
    asked = parser.parse_args()
    if asked.plan:
        print(json.dumps(plan(asked.plan[0], int(asked.plan[1]))))
        return
    measured = []
    for num_objects in SIZES:
        with tempfile.TemporaryDirectory(prefix="unetpp-bench-") as output:
            write_table(output, num_objects)
            words = [sys.executable, "-m", "tests.bench.planning_memory", "--plan", output, str(num_objects)]
            measured.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
            print(json.dumps(measured[-1]), flush=True)
    grown = (measured[-1]["peak_kb"] - measured[0]["peak_kb"]) / 1024
    report = {**setting(), "measured": measured, "grown_mib": grown}
    asked.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

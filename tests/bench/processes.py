"""What a command costs: CPU time of every process that it starts, wall time, and memory, in a process of its own.

Orphans are adopted by the process that measures, so that daemons (Ray's) count like children. CPU time is the larger
of two counts: what the kernel adds up for processes that were waited for, and what was last seen of each process. Both
miss a little, neither counts too much: a process that nobody waits for loses what it did after the last look.
"""

import ctypes
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOOK_S = 0.1
END_S = 30.0
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
TICKS_S = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Cost:
    """CPU and wall time in seconds; `peak_mib`: the largest sum of resident sizes, shared pages counted in each."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    started: float
    """`time.time()` at its start."""
    output: str
    """Its standard output."""

    def figures(self) -> dict[str, float]:
        """CPU, wall and memory, for a report."""
        return {name: value for name, value in asdict(self).items() if name in ("cpu_s", "wall_s", "peak_mib")}


def new_output(folder: Path) -> Path:
    """An empty folder for one run, to be left there until the last run is over.

    ext4 gives no inode away that was freed in the last minutes: a file that is made after many were deleted searches
    past all of them, so that a run would pay for its predecessor's clearing up.
    """
    return Path(tempfile.mkdtemp(dir=folder, prefix="output-"))


class CommandError(Exception):
    """A command that was measured did not end well; the text is the end of what it said."""


def measured(
    words: Sequence[str | Path], environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Cost:
    """Run a command to its end, and what it leaves behind. CommandError where it fails.

    One at a time in a process: every child of this process that ends meanwhile is taken for a part of the command.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = _waited_for_s()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
        )
        tree = _Tree()
        status = _follow(process.pid, tree)
        wall_s = time.perf_counter() - clock
        process.returncode = os.waitstatus_to_exitcode(status)
        _end_the_rest(tree)
        cpu_s = max(_waited_for_s() - before, tree.seen_s)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if process.returncode:
        what = f"{' '.join(map(str, words[:6]))} ended with {process.returncode}"
        raise CommandError("\n".join([what, texts[0][-400:], texts[1][-800:]]))
    return Cost(cpu_s, wall_s, tree.peak_mib, started, texts[0])


def last_line(cost: Cost) -> str:
    """The last line that a command printed: of programs that print their result."""
    return cost.output.strip().splitlines()[-1]


class _Tree:
    """The descendants of this process, as far as they were seen."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._seconds: dict[tuple[int, int], float] = {}

    @property
    def seen_s(self) -> float:
        """CPU seconds of all that were seen, each by itself."""
        return sum(self._seconds.values())

    def look(self) -> list[int]:
        """Look at all of them; their ids."""
        parents, seen = {}, {}
        for name in os.listdir("/proc"):
            if name.isdigit() and (fields := _stat(name)):
                parents[int(name)] = int(fields[1])
                seen[int(name)] = fields
        found = [pid for pid in seen if _is_below(pid, os.getpid(), parents)]
        for pid in found:
            fields = seen[pid]
            self._seconds[pid, int(fields[19])] = (int(fields[11]) + int(fields[12])) / TICKS_S
        self.peak_mib = max(self.peak_mib, sum(int(seen[pid][21]) for pid in found) * PAGE_MIB)
        return found


def _stat(pid: str) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; none where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _is_below(pid: int, ancestor: int, parents: Mapping[int, int]) -> bool:
    while pid := parents.get(pid, 0):
        if pid == ancestor:
            return True
    return False


def _follow(pid: int, tree: _Tree) -> int:
    """Look and reap until a child ends; its status."""
    next_look = 0.0
    while True:
        if time.monotonic() >= next_look:
            tree.look()
            next_look = time.monotonic() + LOOK_S
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == pid:
            return status
        if not ended:
            time.sleep(0.005)


def _end_the_rest(tree: _Tree) -> None:
    """Wait for what a command left behind; after a while, kill it."""
    until = time.monotonic() + END_S
    while tree.look():
        if time.monotonic() > until:
            for pid in tree.look():
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _waited_for_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def environment(threads: int, **more: Any) -> dict[str, str]:
    """Variables for a process whose numerical libraries take so many threads, and Ray's for a quiet start."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "DO_NOT_TRACK": "1"}
    return {**dict.fromkeys(names, str(threads)), **quiet, **{name: str(value) for name, value in more.items()}}

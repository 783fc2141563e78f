"""Notes when imports and functions begin and end, in every Python process whose PYTHONPATH has this folder.

Python imports a module of this name when it starts. Notes are lines of JSON in the file that UNETPP_BENCH_NOTES names:
process, span, begin and end as `time.time()`, and the process's CPU seconds meanwhile. Of a function the first call
alone; names that are not there are left out, so that older revisions are watched by the same probe.
"""

import functools
import importlib.abc
import importlib.util
import json
import os
import sys
import time
from types import ModuleType
from typing import Any

FUNCTIONS = {
    "jobs.predict": ["run", "open_run", "seal"],
    "jobs.shard": ["load_predictor", "Worker.__call__", "write_shard"],
    "jobs.worker": ["Worker.__call__"],
    "jobs.sink": ["commit"],
    "jobs.guarded": ["DecodePool.decode"],
    "unetpp.predictor": ["Predictor.predict"],
    "ray": ["init", "shutdown"],
}
IMPORTS = ("torch", "openvino", "pyarrow", "ray", "ray.data", "jobs.cli", "jobs.predict", "jobs.shard", *FUNCTIONS)


def now() -> tuple[float, float]:
    """The clock's time, and the process's CPU seconds so far."""
    return time.time(), time.process_time()


def note(span: str, begin: tuple[float, float]) -> None:
    """Write down a span that ends now."""
    (began, used), (ended, used_now) = begin, now()
    found = {"pid": os.getpid(), "span": span, "begin": began, "end": ended, "cpu_s": used_now - used}
    line = json.dumps(found) + "\n"
    file = os.open(os.environ["UNETPP_BENCH_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, line.encode())
    os.close(file)


def timed(owner: Any, name: str, span: str) -> None:
    """Put a function in its own place that notes its first call."""
    function = getattr(owner, name)
    done: list[bool] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if done:
            return function(*args, **kwargs)
        done.append(True)
        begin = now()
        try:
            return function(*args, **kwargs)
        finally:
            note(span, begin)

    setattr(owner, name, wrapper)


def watch(module: ModuleType) -> None:
    """Watch the functions of a module that was just imported."""
    for path in FUNCTIONS.get(module.__name__, []):
        owner: Any = module
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each, None)
        if hasattr(owner, name):
            timed(owner, name, f"{module.__name__}.{path}")


class Watcher(importlib.abc.MetaPathFinder):
    """Finds modules as Python does, and times their execution."""

    def __init__(self) -> None:
        self._found: set[str] = set()

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        """The spec of a module to be watched, once; None for the others."""
        if name not in IMPORTS or name in self._found:
            return None
        self._found.add(name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                begin = now()
                execute(module)
                note(f"import {name}", begin)
                watch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "UNETPP_BENCH_NOTES" in os.environ:
    note("python", (time.time(), 0.0))
    sys.meta_path.insert(0, Watcher())

"""Processes without a past: for what forks, which a process with the threads of many tests may not survive."""

import multiprocessing
from collections.abc import Callable
from typing import Any

LIMIT_S = 900
"""Against what hangs: far above what any of these takes on a slow and busy machine."""


def in_a_fresh_process(work: Callable[..., None], *args: Any) -> None:
    """Run a function of a test module in a new interpreter; AssertionError where it fails there."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    process.join(LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{work.__name__} ended with {process.exitcode}: see what it printed"

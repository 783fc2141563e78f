"""Run one job as a process of this machine: `python -m jobs.<job>`; show its lines, read its result."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from threading import Thread
from typing import IO, TypeVar

from pydantic import BaseModel, ValidationError

from jobs.config_file import write_yaml
from unetpp.errors import JobError

Result = TypeVar("Result", bound=BaseModel)

TAIL_LINES = 40
STOP_TIMEOUT_S = 60


def run_job(job: str, config: BaseModel, result_class: type[Result]) -> Result:
    """Run `python -m jobs.<job>` to its end and return its result; its lines go to our stderr as they come.

    Raises:
        JobError: the job ended with another exit code than 0, or left no result; it carries the exit code.
    """
    with tempfile.TemporaryDirectory(prefix="unetpp-") as scratch:
        config_file, result_file = Path(scratch) / "config.yaml", Path(scratch) / "result.json"
        config_file.write_text(write_yaml(config), encoding="utf-8")
        command = [sys.executable, "-m", f"jobs.{job}", "--config", str(config_file), "--result", str(result_file)]
        exit_code, tail = _follow(command)
        if exit_code != 0:
            raise JobError(job, exit_code, "\n".join(tail))
        try:
            return result_class.model_validate_json(result_file.read_bytes())
        except (OSError, ValidationError) as error:
            raise JobError(job, exit_code, f"it left no readable result: {error}") from None


def _follow(command: list[str]) -> tuple[int, deque[str]]:
    """Run `command`, pass its lines on, return its exit code and last lines. It is stopped if we are."""
    environment = {**os.environ, "COLUMNS": str(shutil.get_terminal_size().columns), "PYTHONUNBUFFERED": "1"}
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the job once, from _stop, and not a second time from the terminal
    ) as process:
        assert process.stdout is not None
        reader = Thread(target=_pass_on, args=(process.stdout, tail), daemon=True)
        reader.start()
        try:
            exit_code = process.wait()
        except BaseException:
            _stop(process)
            raise
        finally:
            # Bounded: a process the job left behind may hold the pipe open.
            reader.join(timeout=5)
    return exit_code, tail


def _pass_on(lines: IO[str], tail: deque[str]) -> None:
    for line in lines:
        sys.stderr.write(line)
        sys.stderr.flush()
        tail.append(line.rstrip("\n"))


def _stop(process: subprocess.Popen[str]) -> None:
    """Interrupt the job, so that it ends resumable; kill it if it does not end."""
    process.terminate()  # not SIGINT, which whatever a shell starts in the background ignores
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()

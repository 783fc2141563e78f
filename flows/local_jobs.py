"""Jobs as processes of this machine: what a laptop has. Only the process that started them knows them."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from flows.ray_jobs import JobStatus, State


class LocalJobs:
    """The jobs that this process has started."""

    survives = False
    where = "this machine"

    def __init__(self) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="unetpp-jobs-")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()

    def status(self, submission_id: str) -> JobStatus | None:
        """See `JobBackend`."""
        process = self._processes.get(submission_id)
        if process is None:
            return None
        code = process.poll()
        if code is None:
            return JobStatus(State.RUNNING)
        if code == 0:
            return JobStatus(State.SUCCEEDED, 0)
        return JobStatus(State.STOPPED if submission_id in self._stopped else State.FAILED, code)

    def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
        """See `JobBackend`. `unetpp` is that of this Python."""
        if submission_id in self._processes:
            return False
        program, job, *words = shlex.split(command)
        assert program == "unetpp", command
        with self._log_file(submission_id).open("wb") as log:
            self._processes[submission_id] = subprocess.Popen(
                [sys.executable, "-m", f"jobs.{job}", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": str(shutil.get_terminal_size().columns), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches the job once, from ask_to_stop, and not from the terminal
            )
        return True

    def log(self, submission_id: str) -> str:
        """See `JobBackend`."""
        return self._log_file(submission_id).read_text(errors="replace")

    def ask_to_stop(self, submission_id: str) -> None:
        """See `JobBackend`. SIGTERM and not SIGINT, which whatever a shell starts in the background ignores."""
        process = self._processes.get(submission_id)
        if process is not None and process.poll() is None:
            self._stopped.add(submission_id)
            process.terminate()

    def url(self, submission_id: str) -> str | None:
        """See `JobBackend`."""
        return None

    def _log_file(self, submission_id: str) -> Path:
        return Path(self._dir.name) / f"{submission_id}.log"

"""A job as a process: its result, its exit code, its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.local_jobs import run_job
from jobs.contract import ExitCode, PredictConfig, PredictResult, SynthConfig, SynthResult
from unetpp.errors import JobError


def test_a_job_hands_back_its_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_job("synth", SynthConfig(out=str(tmp_path / "set"), num=2, size=32), SynthResult)
    assert result.num_images == 2
    assert len(list((tmp_path / "set" / "images").iterdir())) == 2
    assert capfd.readouterr().out == ""  # its lines are log lines: they go to stderr


def test_a_failed_job_keeps_its_exit_code_and_last_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = PredictConfig(model=str(tmp_path / "absent"), input=str(tmp_path / "in"), output=str(tmp_path / "out"))
    with pytest.raises(JobError) as failed:
        run_job("predict", config, PredictResult)
    assert failed.value.exit_code == ExitCode.MODEL
    assert "unetpp: " in failed.value.log_tail
    assert failed.value.log_tail in capfd.readouterr().err


def test_an_interrupted_flow_stops_its_job(tmp_path: Path) -> None:
    code = (
        "from flows.local_jobs import run_job\n"
        "from jobs.contract import SynthConfig, SynthResult\n"
        f"run_job('synth', SynthConfig(out={str(tmp_path / 'set')!r}, num=1_000_000), SynthResult)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # What a shell starts in the background ignores SIGINT, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as flow:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "set").glob("images/*")) and time.monotonic() < deadline:
            time.sleep(0.2)
        (job,) = psutil.Process(flow.pid).children()
        os.kill(flow.pid, signal.SIGINT)
        flow.communicate(timeout=60)
    assert flow.returncode != 0
    job.wait(timeout=1)
    assert not job.is_running()

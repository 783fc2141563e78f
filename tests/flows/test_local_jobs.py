"""Jobs as processes of this machine."""

import time
from pathlib import Path

from flows.local_jobs import LocalJobs
from flows.ray_jobs import State, follow, stop
from jobs.config_file import write_command
from jobs.contract import ExitCode, PredictConfig, SynthConfig, SynthResult


def test_a_job_is_started_once_followed_and_leaves_its_result(tmp_path: Path) -> None:
    jobs, lines = LocalJobs(), list[str]()
    config = SynthConfig(out=str(tmp_path / "set"), num=2, size=32, result=str(tmp_path / "result.json"))
    assert jobs.status("job") is None
    assert jobs.submit("job", write_command("synth", config), {})
    assert not jobs.submit("job", write_command("synth", config), {})
    status = follow(jobs, "job", say=lines.append, poll_s=0.1)
    assert status is not None
    assert (status.state, status.exit_code) == (State.SUCCEEDED, 0)
    assert SynthResult.model_validate_json((tmp_path / "result.json").read_bytes()).num_images == 2
    assert any("synthesised" in line for line in lines)


def test_a_failed_job_keeps_its_exit_code_and_its_lines(tmp_path: Path) -> None:
    jobs = LocalJobs()
    config = PredictConfig(model=str(tmp_path / "absent"), input=str(tmp_path / "in"), output=str(tmp_path / "out"))
    jobs.submit("job", write_command("predict", config), {})
    status = follow(jobs, "job", say=lambda line: None, poll_s=0.1)
    assert status is not None
    assert (status.state, status.exit_code) == (State.FAILED, ExitCode.MODEL)
    assert "unetpp: " in jobs.log("job")


def test_a_stopped_job_ends(tmp_path: Path) -> None:
    jobs = LocalJobs()
    jobs.submit("job", write_command("synth", SynthConfig(out=str(tmp_path / "set"), num=1_000_000)), {})
    deadline = time.monotonic() + 60
    while not list((tmp_path / "set").glob("images/*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    status = stop(jobs, "job")
    assert status is not None
    assert status.state is State.STOPPED

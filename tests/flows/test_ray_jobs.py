"""The life of a job, told to a cluster that remembers what it was asked."""

import string
import time
from typing import Any

import pytest

from flows import ray_jobs
from flows.ray_jobs import MAX_ATTEMPTS, MAX_ID_LENGTH, MAX_NAMES, JobStatus, State, ensure, follow, stop, submission_id
from jobs.contract import ExitCode
from unetpp.errors import JobError, TransientError

RUNNING, SUCCEEDED, STOPPED = JobStatus(State.RUNNING), JobStatus(State.SUCCEEDED, 0), JobStatus(State.STOPPED)


def failed(exit_code: int | None) -> JobStatus:
    return JobStatus(State.FAILED, exit_code)


class Cluster:
    """Jobs that end as they are told to: of each the states that it is seen in, one after the other."""

    where, survives = "a cluster", True

    def __init__(self, **jobs: list[JobStatus | Exception | None]) -> None:
        self.jobs = {name.replace("_", "-"): list(states) for name, states in jobs.items()}
        self.submitted: list[str] = []
        self.stopped: list[str] = []
        self.text = ""

    def status(self, submission_id: str) -> JobStatus | None:
        states = self.jobs.get(submission_id, [None])
        state = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
        self.submitted.append(submission_id)
        self.jobs[submission_id] = [RUNNING]
        return True

    def log(self, submission_id: str) -> str:
        return self.text

    def ask_to_stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        self.jobs[submission_id] = [RUNNING, STOPPED]

    def url(self, submission_id: str) -> str | None:
        return None


def ensured(cluster: Cluster, **how: bool) -> tuple[str, bool]:
    return ensure(cluster, "job", "unetpp predict", {}, **how)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- names


def test_a_name_fits_kubernetes_and_says_stage_and_night() -> None:
    name = submission_id("evaluate", "20261124-242203", {"config": "c"})
    assert name.startswith("unetpp-evaluate-20261124-242203-")
    assert len(name + "-a99") <= MAX_ID_LENGTH
    assert set(name) <= set(string.ascii_lowercase + string.digits + "-")


def test_a_name_changes_with_what_changes_the_output_and_with_nothing_else() -> None:
    name = submission_id("predict", "20261124", {"a": 1, "b": [2]})
    assert name == submission_id("predict", "20261124", {"b": [2], "a": 1})
    others = {
        submission_id("predict", "20261125", {"a": 1, "b": [2]}),
        submission_id("predict", "20261124", {"a": 1, "b": [3]}),
        submission_id("evaluate", "20261124", {"a": 1, "b": [2]}),
        submission_id("predict", None, {"a": 1, "b": [2]}),
    }
    assert len(others | {name}) == 5


# ------------------------------------------------------------------------------------------------- ensure


def test_a_job_that_nobody_knows_is_started() -> None:
    cluster = Cluster()
    assert ensured(cluster) == ("job", False)
    assert cluster.submitted == ["job"]


@pytest.mark.parametrize("status", [JobStatus(State.PENDING), RUNNING, SUCCEEDED])
def test_a_job_that_waits_runs_or_is_done_is_attached_to(status: JobStatus) -> None:
    cluster = Cluster(job=[status])
    assert ensured(cluster) == ("job", True)
    assert cluster.submitted == []


@pytest.mark.parametrize(
    "status", [failed(1), failed(4), failed(None), failed(-9), failed(137), STOPPED], ids=lambda status: str(status[:2])
)
def test_a_job_that_may_end_better_is_tried_again(status: JobStatus) -> None:
    assert ensured(Cluster(job=[status])) == ("job-a1", False)
    assert ensured(Cluster(job=[status], job_a1=[status])) == ("job-a2", False)
    assert ensured(Cluster(job=[status], job_a1=[RUNNING])) == ("job-a1", True)


@pytest.mark.parametrize("code", [3, 5, 10, 11, 20])
def test_a_job_that_would_end_the_same_way_is_not_tried_again(code: int) -> None:
    cluster = Cluster(job=[failed(code)])
    cluster.text = "unetpp: no such bucket\n"
    with pytest.raises(JobError, match="no such bucket") as refused:
        ensured(cluster)
    assert refused.value.exit_code == code
    assert "again=true" in str(refused.value)
    assert cluster.submitted == []


def test_there_are_three_attempts_and_then_none() -> None:
    cluster = Cluster(job=[failed(1)], job_a1=[failed(1)], job_a2=[failed(1)])
    with pytest.raises(JobError, match="the last attempt"):
        ensured(cluster)
    assert len(cluster.jobs) == MAX_ATTEMPTS
    assert cluster.submitted == []


def test_an_attempt_that_was_stopped_is_none_of_the_three() -> None:
    stopped = Cluster(job=[STOPPED], job_a1=[STOPPED], job_a2=[failed(1)], job_a3=[STOPPED])
    assert ensured(stopped) == ("job-a4", False)
    stopped.jobs |= {"job-a4": [failed(1)], "job-a5": [failed(1)]}
    with pytest.raises(JobError, match="the last attempt"):
        ensured(stopped)


def test_a_night_that_was_looked_at_often_has_its_three_attempts_still() -> None:
    looked_at = Cluster(job=[SUCCEEDED], job_a1=[SUCCEEDED], job_a2=[SUCCEEDED], job_a3=[failed(1)])
    assert ensured(looked_at) == ("job-a4", False)
    looked_at.jobs |= {"job-a4": [failed(1)], "job-a5": [failed(1)]}
    with pytest.raises(JobError, match="the last attempt"):
        ensured(looked_at)


@pytest.mark.parametrize("again", [False, True])
def test_a_job_whose_names_are_used_up_says_what_helps(again: bool) -> None:
    named = Cluster(job=[STOPPED], **{f"job_a{number}": [STOPPED] for number in range(1, MAX_NAMES)})
    with pytest.raises(JobError, match=f"a cluster remembers {MAX_NAMES} jobs that did the same.*delete them there"):
        ensured(named, again=again)


def test_somebody_who_mended_it_may_ask_again() -> None:
    assert ensured(Cluster(job=[failed(20)]), again=True) == ("job-a1", False)
    assert ensured(Cluster(job=[failed(1)], job_a1=[failed(1)], job_a2=[failed(1)]), again=True) == ("job-a3", False)
    assert ensured(Cluster(job=[RUNNING]), again=True) == ("job", True)


@pytest.mark.parametrize("before", [[failed(None)] * 3, [failed(1), failed(20)]], ids=["three losses", "one for good"])
def test_what_was_mended_has_three_attempts_anew(before: list[JobStatus]) -> None:
    def after(*endings: JobStatus) -> Cluster:
        attempts = [*before, *endings]
        return Cluster(**{f"job_a{number}" if number else "job": [each] for number, each in enumerate(attempts)})

    for endings in ([STOPPED], [failed(None)], [failed(None), STOPPED, failed(1)]):
        assert ensured(after(*endings)) == (f"job-a{len(before) + len(endings)}", False)
    with pytest.raises(JobError, match="the last attempt"):
        ensured(after(failed(None), STOPPED, failed(1), failed(None)))


def test_what_was_done_once_has_three_attempts_anew() -> None:
    cluster = Cluster(job=[failed(1)], job_a1=[failed(1)], job_a2=[SUCCEEDED], job_a3=[failed(1)])
    assert ensured(cluster) == ("job-a4", False)


def test_the_last_attempt_decides() -> None:
    assert ensured(Cluster(job=[failed(20)], job_a1=[failed(4)])) == ("job-a2", False)


def test_a_job_whose_output_is_gone_runs_again() -> None:
    cluster = Cluster(job=[SUCCEEDED])
    assert ensure(cluster, "job", "c", {}, is_done=lambda: False) == ("job-a1", False)


def test_a_job_is_asked_for_until_the_cluster_answers() -> None:
    class Dropping(Cluster):
        """The first answer to a start is lost on its way."""

        def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
            if submission_id in self.submitted:
                return False
            super().submit(submission_id, command, metadata)
            raise silence

    silence = TransientError("the Ray cluster answers 502")
    cluster = Dropping(job=[silence, silence, None])
    assert ensure(cluster, "job", "c", {}, poll_s=0.001) == ("job", True)
    assert cluster.submitted == ["job"]
    with pytest.raises(TransientError, match="502"):
        ensure(Cluster(job=[silence]), "job", "c", {}, grace_s=0.05, poll_s=0.001)


def test_two_that_start_at_once_share_the_job() -> None:
    class Raced(Cluster):
        def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
            return False  # somebody else was faster

    assert ensured(Raced()) == ("job", True)


# ------------------------------------------------------------------------------------------------- follow


def followed(cluster: Cluster, lines: list[str] | None = None, **how: Any) -> JobStatus | None:
    said = [] if lines is None else lines
    return follow(cluster, "job", say=said.append, poll_s=0.001, **how)


def test_a_job_is_followed_to_its_end() -> None:
    assert followed(Cluster(job=[JobStatus(State.PENDING), RUNNING, RUNNING, failed(5)])) == failed(5)


def test_a_job_that_the_cluster_forgot_is_lost() -> None:
    assert followed(Cluster(job=[RUNNING, None])) is None


def test_a_silent_cluster_is_waited_for() -> None:
    silence = TransientError("no Ray cluster answers")
    assert followed(Cluster(job=[RUNNING, silence, silence, silence, SUCCEEDED])) == SUCCEEDED


def test_a_cluster_that_stays_silent_has_lost_its_job() -> None:
    assert followed(Cluster(job=[RUNNING, TransientError("no Ray cluster answers")]), grace_s=0.05) is None


def test_every_line_of_the_log_is_passed_on_once_and_whole() -> None:
    class Talking(Cluster):
        parts = ("a\nb", "a\nbb\n", "a\nbb\nc", "a\nbb\nccc")

        def log(self, submission_id: str) -> str:
            return self.parts[min(len(self.jobs["job"]) * -1 + 4, 3)]

    lines: list[str] = []
    followed(Talking(job=[RUNNING, RUNNING, RUNNING, SUCCEEDED]), lines)
    assert lines == ["a", "bb", "ccc"]


def test_a_log_that_cannot_be_read_stops_nothing() -> None:
    class Mute(Cluster):
        def log(self, submission_id: str) -> str:
            raise TransientError("the agent is away")

    assert followed(Mute(job=[RUNNING, SUCCEEDED])) == SUCCEEDED


def test_at_the_deadline_the_job_is_stopped_and_the_next_start_goes_on() -> None:
    cluster = Cluster(job=[RUNNING])
    with pytest.raises(JobError, match="deadline") as ended:
        followed(cluster, deadline=time.monotonic() - 1)
    assert ended.value.exit_code == ExitCode.INTERRUPTED
    assert cluster.stopped == ["job"]
    assert ensured(cluster) == ("job-a1", False)


def test_at_the_deadline_a_job_that_others_follow_goes_on() -> None:
    cluster = Cluster(job=[RUNNING])
    with pytest.raises(JobError, match="it goes on, since flow run a, b follows it too") as ended:
        followed(cluster, others=lambda: {"b", "a"}, deadline=time.monotonic() - 1)
    assert ended.value.exit_code == ExitCode.INTERRUPTED
    assert cluster.stopped == []
    assert ensured(cluster) == ("job", True)


class Stubborn(Cluster):
    """Its jobs run on, whatever they are told; of the calls to stop one, the first `num_lost` fail."""

    num_lost = 0

    def ask_to_stop(self, submission_id: str) -> None:
        self.stopped.append(submission_id)
        if len(self.stopped) <= self.num_lost:
            raise TransientError("the Ray cluster answers 502")


@pytest.mark.parametrize(
    ("num_lost", "said"), [(0, "it was told to stop, but had not ended"), (10**9, "it may run on")]
)
def test_a_job_that_runs_on_after_the_deadline_is_not_called_stopped(num_lost: int, said: str) -> None:
    cluster = Stubborn(job=[RUNNING])
    cluster.num_lost = num_lost
    with pytest.raises(JobError, match=said) as ended:
        followed(cluster, deadline=time.monotonic() - 1, stop_s=0.05)
    assert ended.value.exit_code == ExitCode.INTERRUPTED


def test_a_silent_cluster_is_told_to_stop_a_job_until_it_answers() -> None:
    silence = TransientError("the Ray cluster answers 502")
    cluster = Stubborn(job=[RUNNING, silence, silence, RUNNING, silence, STOPPED])
    cluster.num_lost = 2
    with pytest.raises(JobError, match="it was stopped"):
        followed(cluster, deadline=time.monotonic() - 1)
    assert cluster.stopped == ["job"] * 3
    with pytest.raises(TransientError, match="502"):
        stop(Stubborn(job=[silence]), "job", timeout_s=0.05, poll_s=0.001)


def test_stopping_waits_for_the_end() -> None:
    cluster = Cluster(job=[RUNNING])
    assert stop(cluster, "job", poll_s=0.001) == STOPPED
    assert ray_jobs.MAX_ATTEMPTS == 3

"""The life of one job: named after what it changes, started once, followed to its end, stopped gently.

Where it runs is behind `JobBackend`: a Ray cluster by its Jobs API (`flows.jobs_api`), a Kubernetes cluster by RayJob
resources (`flows.kuberay`), or this machine (`flows.local_jobs`).

The name is the guard against doing things twice. Whoever wants the same job, after a crash or from another place, asks
for the same name: a job that is waiting or running is attached to, and an ended one is tried again, under the next
name, only where that makes sense.
"""

import logging
import random
import time
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from jobs.contract import ExitCode, fingerprint
from unetpp.errors import ConfigError, JobError, TransientError

logger = logging.getLogger(__name__)

Words = ParamSpec("Words")
Answer = TypeVar("Answer")

MAX_ATTEMPTS = 3
"""Of a job that fails. One that was stopped says nothing against the next: that goes on from there."""
MAX_NAMES = 100
"""So many attempts can be told apart, those that were stopped and those that somebody asked for included."""
MAX_ID_LENGTH = 47
"""Of a RayJob: Kubernetes adds 16 characters of its own to reach the 63 that a name may have."""
GRACE_S = 300.0
"""How long a cluster may not answer before a job is given up: as lost, or as one that cannot be asked for."""
STOP_S = 120.0
"""How long a job may take to drain and end after it was told to stop."""
POLL_S = 5.0
LOG_BYTES_PER_S = 50_000
"""The Jobs API gives a log only whole: the longer it is, the less often it is asked for."""
TAIL_LINES = 40

TRY_AGAIN = frozenset({None, int(ExitCode.OTHER), int(ExitCode.INTERRUPTED)})
"""Exit codes after which another attempt may end better; None: nobody knows, the job was lost."""


class State(StrEnum):
    """How a job stands."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    @property
    def is_active(self) -> bool:
        """It is waiting or running."""
        return self in (State.PENDING, State.RUNNING)


class JobStatus(NamedTuple):
    """What a backend says of a job; `exit_code` is that of its process, None where nobody saw it end by itself."""

    state: State
    exit_code: int | None = None
    message: str = ""


class JobBackend(Protocol):
    """A place where jobs run. Every call is bounded in time; TransientError: the same call may succeed later."""

    @property
    def where(self) -> str:
        """The place, for people."""

    @property
    def survives(self) -> bool:
        """Whether jobs there go on when the process that started them dies."""

    def status(self, submission_id: str) -> JobStatus | None:
        """How a job stands; None where nobody knows it."""

    def submit(self, submission_id: str, command: str, metadata: dict[str, str]) -> bool:
        """Start `command` under this name; False where the name is taken."""

    def log(self, submission_id: str) -> str:
        """All that the job has printed so far."""

    def ask_to_stop(self, submission_id: str) -> None:
        """Tell the job to end (SIGTERM): it drains. A job that has ended, or is not there, is fine."""

    def url(self, submission_id: str) -> str | None:
        """A page about the job."""


class Submission(NamedTuple):
    """A job under the name it really has."""

    submission_id: str
    attached: bool
    """It was there before."""


def submission_id(stage: str, night: str | None, spec: dict[str, object]) -> str:
    """Name a job after its stage, its night and what changes its output; at most 43 characters of [a-z0-9-].

    Args:
        stage: the job, such as `predict`.
        night: which night's work it is; None where it is the same work on every night, as training is.
        spec: what changes the output and nothing else: no resources, no limits, no names of runs.
    """
    name = "-".join(["unetpp", stage, *([night] if night else []), fingerprint(spec)[:10]])
    assert len(name) + len("-a99") <= MAX_ID_LENGTH, name
    return name


def ensure(
    backend: JobBackend,
    name: str,
    command: str,
    metadata: dict[str, str],
    *,
    is_done: Callable[[], bool] = lambda: True,
    again: bool = False,
    grace_s: float = GRACE_S,
    poll_s: float = POLL_S,
) -> Submission:
    """See to it that a job runs, or has run, once.

    A job of this name that is waiting, running or done is attached to. One that ended with exit code 1 or 4, or was
    lost, or whose result is gone, is followed by `-a1`, that by `-a2`, and then by none; those that were done, or were
    stopped, by a deadline or by hand, do not count. One that was done, and one that only `again` could start, has
    three attempts anew.

    Args:
        backend: where it runs.
        name: from `submission_id`.
        command: its command line.
        metadata: kept beside the job, for people.
        is_done: whether the output of a job that succeeded is still there.
        again: somebody mended what was wrong: start another attempt whatever the last one's exit code was, and
            however many there were.
        grace_s: how long the cluster may be silent. A start whose answer got lost is attached to.
        poll_s: seconds between two questions to a silent cluster.

    Raises:
        JobError: it ended in a way that another attempt would not change, or too often.
        ConfigError, TransientError: of the backend, the second after `grace_s` of silence.
    """

    def patiently(ask: Callable[Words, Answer], *words: Words.args, **named: Words.kwargs) -> Answer:
        return _patiently(name, time.monotonic() + grace_s, poll_s, ask, *words, **named)

    attempts: list[tuple[str, JobStatus]] = []
    while len(attempts) < MAX_NAMES:
        this = name if not attempts else f"{name}-a{len(attempts)}"
        if (status := patiently(backend.status, this)) is None:
            break
        attempts.append((this, status))
    if attempts:
        last, status = attempts[-1]
        if status.state.is_active or (status.state is State.SUCCEEDED and is_done()):
            return Submission(last, attached=True)
        if len(attempts) >= MAX_NAMES:
            raise JobError(
                last,
                status.exit_code,
                f"{backend.where} remembers {MAX_NAMES} jobs that did the same, as many as can be told apart: delete "
                f"them there, {name} last (ray job delete, or kubectl delete rayjob)",
            )
        if not again and _only_again_helps([status for _, status in attempts]):
            why = "That was the last attempt" if _may_try_again(status) else "Another attempt would end the same way"
            raise JobError(
                last,
                status.exit_code,
                f"{_tail(backend, last) or status.message}\n"
                f"{why}: mend what it says, then start the flow with again=true",
            )
        logger.info("%s: %s; trying again as %s", last, _ending(status), this)
    return Submission(this, attached=not patiently(backend.submit, this, command, metadata))


def follow(
    backend: JobBackend,
    name: str,
    *,
    say: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
    others: Callable[[], Collection[str]] = tuple,
    deadline: float | None = None,
    poll_s: float = POLL_S,
    grace_s: float = GRACE_S,
    stop_s: float = STOP_S,
) -> JobStatus | None:
    """Wait for the end of a job and pass its lines on. Its status is the truth, its log is decoration.

    Args:
        backend: where it runs.
        name: of the submission.
        say: takes every line of the log, once.
        tick: called at every look, for progress.
        others: the other flow runs that follow it; a job that has some is not stopped.
        deadline: monotonic time at which the job is stopped.
        poll_s: seconds between two looks.
        grace_s: how long the cluster may be silent.
        stop_s: how long the job may take to end at the deadline.

    Returns:
        How it ended; None: the job is lost, the cluster does not know it any more or is gone.

    Raises:
        JobError: the deadline came first; the job was told to stop, and the next start goes on from there. It says so
            where the job had not ended yet, or could not be told.
    """
    log = _Log(backend, name, say)
    silent_since: float | None = None
    while True:
        try:
            status = backend.status(name)
            silent_since = None
        except TransientError as error:
            silent_since = silent_since or time.monotonic()
            logger.warning("%s: %s; the job may well go on, asking again", name, error)
            if time.monotonic() - silent_since > grace_s:
                return None
            time.sleep(poll_s)
            continue
        if status is None:
            return None
        log.pass_on(at_the_end=not status.state.is_active)
        tick()
        if not status.state.is_active:
            return status
        if deadline is not None and time.monotonic() > deadline:
            if found := others():
                raise JobError(
                    name,
                    int(ExitCode.INTERRUPTED),
                    f"the deadline came before its end; it goes on, since flow run {', '.join(sorted(found))} follows "
                    "it too. The next start attaches to it, or finds its result",
                )
            how = stop_in_words(backend, name, timeout_s=stop_s, poll_s=poll_s)
            log.pass_on(at_the_end=True)
            raise JobError(
                name,
                int(ExitCode.INTERRUPTED),
                f"the deadline came before its end: {how}, and what is done is kept. The next start goes on from "
                "there; give it more time with deadline_hours, or more workers",
            )
        time.sleep(poll_s * random.uniform(0.8, 1.2))


def stop(backend: JobBackend, name: str, *, timeout_s: float = STOP_S, poll_s: float = POLL_S) -> JobStatus | None:
    """Tell a job that has not ended to end, let it drain, and wait until it has; the last that is known of it then.

    It may still be active after `timeout_s`. TransientError where the cluster did not answer until then: it may run on.
    """
    deadline, poll_s = time.monotonic() + timeout_s, min(poll_s, 1.0)
    status = _patiently(name, deadline, poll_s, backend.status, name)
    if status is not None and status.state.is_active:
        _patiently(name, deadline, poll_s, backend.ask_to_stop, name)
    while status is not None and status.state.is_active and time.monotonic() <= deadline:
        time.sleep(poll_s)
        status = _patiently(name, deadline, poll_s, backend.status, name)
    return status


def stop_in_words(backend: JobBackend, name: str, *, timeout_s: float = STOP_S, poll_s: float = POLL_S) -> str:
    """Stop a job; how that went, in words, also where the cluster did not answer."""
    try:
        status = stop(backend, name, timeout_s=timeout_s, poll_s=poll_s)
    except TransientError as error:
        return f"the cluster did not say whether it stopped, so it may run on ({error})"
    if status is None or status.state is State.STOPPED:
        return "it was stopped"
    if status.state.is_active:
        return f"it was told to stop, but had not ended {timeout_s:.0f} s later"
    return "it ended by itself"


def _patiently(
    name: str,
    deadline: float,
    poll_s: float,
    ask: Callable[Words, Answer],
    *words: Words.args,
    **named: Words.kwargs,
) -> Answer:
    """Ask the cluster about a job until it answers; TransientError where it has not by the deadline."""
    while True:
        try:
            return ask(*words, **named)
        except TransientError as error:
            if time.monotonic() >= deadline:
                raise
            logger.warning("%s: %s; asking again", name, error)
            time.sleep(poll_s)


def _only_again_helps(endings: list[JobStatus]) -> bool:
    """Whether nobody starts another attempt after these unless asked to; one that was, has the count begin anew."""
    spent, refused = 0, False
    for status in endings:
        if refused or status.state is State.SUCCEEDED:
            spent = 0
        spent += status.state is State.FAILED
        refused = spent >= MAX_ATTEMPTS or not _may_try_again(status)
    return refused


def _may_try_again(status: JobStatus) -> bool:
    if status.state is not State.FAILED:
        return True  # stopped by somebody, or its output was taken away
    code = status.exit_code
    return code in TRY_AGAIN or (code is not None and (code < 0 or code > 128))  # ended by a signal: lost


def _ending(status: JobStatus) -> str:
    match status.state:
        case State.SUCCEEDED:
            return "it succeeded, but its output is not there any more"
        case State.STOPPED:
            return "it was stopped"
        case _:
            code = "no exit code" if status.exit_code is None else f"exit code {status.exit_code}"
            return f"it ended with {code}" + (f" ({status.message})" if status.exit_code is None else "")


def _tail(backend: JobBackend, name: str) -> str:
    try:
        return "\n".join(backend.log(name).splitlines()[-TAIL_LINES:])
    except (TransientError, ConfigError) as error:
        return f"(its log cannot be read: {error})"


class _Log:
    """Passes on each line of a growing log once, asking for it the less often the longer it is."""

    def __init__(self, backend: JobBackend, name: str, say: Callable[[str], None]) -> None:
        self._backend, self._name, self._say = backend, name, say
        self._offset, self._next = 0, 0.0

    def pass_on(self, *, at_the_end: bool) -> None:
        """Pass on what is new; a line that is still being written waits for its end."""
        if time.monotonic() < self._next and not at_the_end:
            return
        try:
            text = self._backend.log(self._name)
        except TransientError as error:
            logger.debug("%s: no log now: %s", self._name, error)
            return
        end = len(text) if at_the_end else text.rfind("\n") + 1
        for line in text[self._offset : end].splitlines():
            self._say(line)
        self._offset = max(self._offset, end)
        self._next = time.monotonic() + len(text) / LOG_BYTES_PER_S

"""What a person sees while a run works, and how it is interrupted."""

import contextlib
import logging
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from jobs.sink import Footer
from unetpp.errors import BreakerError

logger = logging.getLogger(__name__)

LOG_EVERY_S = 5.0
BREAKER_IMAGES = 500


class Breaker:
    """Stops a run in which most images fail: bad data costs rows, a bad setting must not cost a million of them."""

    def __init__(self, run: str, max_failed_share: float) -> None:
        self._run, self._max_failed_share = run, max_failed_share
        self._failures: Counter[str] = Counter()
        self._num_images = 0

    def count(self, footer: Footer) -> None:
        """One more shard is committed. BreakerError where too many images failed since this call began."""
        self._failures.update(footer.failures)
        self._num_images += footer.num_predicted + footer.num_failed
        num_failed = self._failures.total()
        if self._num_images >= BREAKER_IMAGES and num_failed > self._max_failed_share * self._num_images:
            causes = ", ".join(f"{code} {number}" for code, number in self._failures.most_common())
            raise BreakerError(
                f"{num_failed} of {self._num_images} images failed ({causes}), more than max_failed_share "
                f"{self._max_failed_share:g}: run {self._run} stops here. See their `error` in the table; to go on all "
                "the same, start again with --max-failed-share 1"
            )


class Progress:
    """Images done of a run, rate and time left: a bar on a terminal, else a log line every few seconds."""

    def __init__(self, run: str, num_images: int, num_done: int) -> None:
        self.run, self.num_images, self.num_done = run, num_images, num_done
        self._num_before, self._num_failed = num_done, 0
        self._started = self._logged = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
        if self._bar is not None:
            self._task = self._bar.add_task(run, total=num_images, completed=num_done, failed=0)

    def advance(self, footer: Footer) -> None:
        """One more shard is committed."""
        self.num_done += footer.num_predicted + footer.num_failed
        self._num_failed += footer.num_failed
        if self._bar is not None:
            self._bar.update(self._task, completed=self.num_done, failed=self._num_failed)
        elif time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            self._log()

    def _log(self) -> None:
        rate = (self.num_done - self._num_before) / max(time.monotonic() - self._started, 1e-9)
        left_s = (self.num_images - self.num_done) / max(rate, 1e-9)
        logger.info(
            "%s: %d of %d images, %d failed, %.1f images/s, %d s left",
            self.run,
            self.num_done,
            self.num_images,
            self._num_failed,
            rate,
            left_s,
        )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.num_done > self._num_before:
            self._log()


def _bar() -> Bar:
    return Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGTERM does what Ctrl-C does: KeyboardInterrupt. Only a main thread can ask for it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt, signal.SIGTERM):
        yield


class Drain:
    """How work ends early: what is in flight may end, nothing new begins. Asked for by the first SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    @property
    def is_asked(self) -> bool:
        """Nothing new is to begin."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Let what is in flight end, and begin nothing new."""
        self._asked.set()


@contextlib.contextmanager
def draining(drain: Drain, grace_s: float, on_ask: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside the block the first SIGTERM or Ctrl-C asks `drain`; a second one, or `grace_s`, is a KeyboardInterrupt.

    `on_ask` is called once, in a thread of its own, to tell others. Only a main thread can be asked.
    """
    timer: threading.Timer | None = None

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal timer
        if drain.is_asked or not grace_s:
            raise KeyboardInterrupt
        drain.ask()
        logger.info("stopping: shards in flight get %g s to be committed; once more stops at once", grace_s)
        threading.Thread(target=on_ask, daemon=True).start()
        timer = threading.Timer(grace_s, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
        timer.daemon = True
        timer.start()

    try:
        with _handled(interrupt, signal.SIGTERM, signal.SIGINT):
            yield
    finally:
        if timer is not None:
            timer.cancel()


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that is ignored, as Ctrl-C is by what a shell starts in the background, stays ignored.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)

"""How fast requests may follow each other."""

import threading
import time

MIN_GAP_S, MAX_GAP_S = 0.01, 1.0


class Pace:
    """The least time between two requests of a client: none until the store complains, doubled each time it does.

    All threads share it, so that a store that cannot keep up gets fewer requests, not the same ones more often.
    """

    def __init__(self) -> None:
        self._gap_s, self._next = 0.0, 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Sleep until it is this request's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap_s
        time.sleep(turn - now)

    def throttled(self) -> None:
        """The store wants fewer requests."""
        with self._lock:
            self._gap_s = min(max(2 * self._gap_s, MIN_GAP_S), MAX_GAP_S)

    def succeeded(self) -> None:
        """A request was served: a little faster again."""
        with self._lock:
            self._gap_s = self._gap_s * 0.95 if self._gap_s > MIN_GAP_S / 10 else 0.0

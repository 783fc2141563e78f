"""How this project's log lines look: one line an event on stderr, ours from INFO. Set by processes, not by imports."""

import logging

OURS = ("unetpp", "jobs", "flows")


def configure(level: int = logging.INFO) -> None:
    """Send our log lines to stderr; a second call changes nothing but the level.

    The handler is on our own loggers: Ray and Prefect put theirs on the root, and take away what they find there.
    """
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
            logger.propagate = False

"""How this project's log lines look: one line an event on stderr, ours from INFO, other libraries' from WARNING."""

import logging

OURS = ("unetpp", "jobs", "flows")


def configure(level: int = logging.INFO) -> None:
    """Send log lines to stderr; a second call changes nothing but the level."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
        logging.getLogger().addHandler(handler)
    for name in OURS:
        logging.getLogger(name).setLevel(level)

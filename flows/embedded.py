"""Prefect without a server to care for: imported before Prefect, it makes a flow on a laptop quiet and self-contained.

Prefect reads its environment while it is imported, so every module that is a command imports this one first. Where an
API is configured (PREFECT_API_URL), its log gets our lines, and nothing else is changed.
"""

import logging
import os

SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a cold start takes over 20 s on a busy machine
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # a failed stage is told once, in our own words
    "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}

if "PREFECT_API_URL" not in os.environ:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
else:
    for name in ("flows", "jobs"):
        logging.getLogger(name).setLevel(logging.INFO)

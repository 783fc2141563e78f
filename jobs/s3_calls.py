"""Requests to object storage, through s3fs: who asks, how often again, and what becomes of an error.

This module owns the retries of object storage: those of s3fs and botocore are off, so that none multiply.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import stamina
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem
from stamina.instrumentation import RetryDetails, set_on_retry_hooks

from jobs.s3_errors import TRANSPORT_ERRORS, Corrupt, Damaged, Refused, no_answer, storage_error
from jobs.s3_pace import Pace
from jobs.s3_uri import endpoint_of, split
from unetpp.errors import StorageError

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

CONNECT_TIMEOUT_S, STALL_TIMEOUT_S = 5, 60
MAX_ATTEMPTS, RETRY_SECONDS, MAX_WAIT_S = 9, 120.0, 20.0
SILENT_TRIES = 4
NUM_CONNECTIONS = 32


class _Client(S3FileSystem):
    """s3fs without retries of its own."""

    retries = 1


class Calls:
    """One account's requests, each retried within bounds where what fails may pass. For many threads."""

    def __init__(self, profile: str | None = None) -> None:
        named = {} if profile is None else {"profile": profile, "endpoint_url": endpoint_of(profile)}
        self._pace = Pace()
        self.client = _Client(
            **named,
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": STALL_TIMEOUT_S,
                "max_pool_connections": NUM_CONNECTIONS,
                "retries": {"mode": "standard", "total_max_attempts": 1},
            },
        )
        self._has_answered = False

    @property
    def endpoint(self) -> str:
        """The URL that requests go to."""
        return str(self.client.s3.meta.endpoint_url)

    def call(self, uri: str, operation: str, **arguments: object) -> dict[str, Any]:
        """The answer to one operation of the S3 API for `uri`. StorageError where there is none, or it is a no."""
        try:
            return self.ask(uri, operation, **arguments)
        except Refused as refused:
            raise self.error(uri, refused) from refused.__cause__

    def ask(self, uri: str, operation: str, **arguments: object) -> dict[str, Any]:
        """As `call`, with Refused for an answer that says no."""
        return self.retried(uri, lambda: self.client._call_s3(operation, **arguments))

    def error(self, uri: str, refused: Refused) -> StorageError:
        """What to say of an answer that says no."""
        return storage_error(uri, split(uri)[0], self.endpoint, refused)

    def retried(self, uri: str, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run `call` on the client's loop. Refused where the store says no; StorageError where it says nothing."""
        num_silent = 0

        def may_pass(error: Exception) -> bool:
            nonlocal num_silent
            num_silent += 1
            self._has_answered |= Refused.of(error) is not None
            # An endpoint that never answered is a wrong address more often than an outage: say so within seconds.
            return self._may_pass(error) and (self._has_answered or num_silent < SILENT_TRIES)

        try:
            for attempt in stamina.retry_context(
                on=may_pass,
                attempts=MAX_ATTEMPTS,
                timeout=RETRY_SECONDS,
                wait_initial=0.2,
                wait_max=MAX_WAIT_S,
                wait_jitter=0.5,
            ):
                with attempt:
                    self._pace.wait()
                    answer: Answer = sync(self.client.loop, call)
                    self._pace.succeeded()
            self._has_answered = True
            return answer
        except (FlexibleChecksumError, Damaged, Corrupt):
            raise
        except (OSError, ClientError, BotoCoreError, ResponseParserError, ValueError) as error:
            if (refused := Refused.of(error)) is not None:
                self._has_answered = True
                raise refused from error
            raise no_answer(uri, error) from error

    def _may_pass(self, error: Exception) -> bool:
        """Transport errors, 5xx, throttling, and 409: two conditional writes of one name at one moment."""
        if (refused := Refused.of(error)) is None:
            return isinstance(error, TRANSPORT_ERRORS)
        if refused.status in (429, 503) or refused.code == "SlowDown":
            self._pace.throttled()
        return refused.status >= 500 or refused.status in (409, 429) or refused.code in ("SlowDown", "RequestTimeout")


def _say_retry(details: RetryDetails) -> None:
    logger.info("%s: next try in %.1f s", type(details.caused_by).__name__, details.wait_for)
    logger.debug("%s", details.caused_by)


set_on_retry_hooks([_say_retry])

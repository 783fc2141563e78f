"""The exception tree.

```
UnetppError                  arguments are data, the text is made in __str__: survives pickling between processes
|- ConfigError(ValueError)   the caller can fix it       -> stop now, never retried           exit 10
|- ModelError                weights and config disagree -> stop now, never retried           exit 11
|- ImageError                this one object is bad      -> a row with error_code; the run goes on   exit 20 of no image
|- TransientError            the same call may succeed   -> retried by one owner only         exit 20 once given up
|- BreakerError              too many images are bad   -> the run stops, resumable           exit 5
|- AbandonedError            another call took over    -> this one stops                     exit 4
|- DeviceError               the GPU is broken         -> the process ends, another goes on  exit 1
|- StorageError              the store is out of order   -> the run stops, resumable           exit 20
`- JobError                  a job ended badly           -> the flow fails, with job id and log tail
```

Every message says what was seen, what was wanted and what to do.
"""

from typing import Literal

ImageErrorCode = Literal[
    "decode",
    "too_large",
    "archive",
    "numeric",
    "forgotten",
    "gone",
    "changed",
    "integrity",
    "unreadable",
    "crash",
    "timeout",
]

PERMANENT_IMAGE_ERRORS: frozenset[ImageErrorCode] = frozenset(
    {"decode", "too_large", "archive", "numeric", "forgotten"}
)
"""Codes that a second try on the same bytes cannot change."""


class UnetppError(Exception):
    """Anything this project raises on purpose."""


class ConfigError(UnetppError, ValueError):
    """The caller asked for something that cannot be done, and can fix it."""


class ModelError(UnetppError):
    """A model folder is absent, damaged, or its weights and config disagree."""


class ImageError(UnetppError):
    """One image is bad.

    `code` is one of `ImageErrorCode`, `detail` a sentence; both end in the image's row.
    """

    def __init__(self, code: ImageErrorCode, detail: str) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


class TransientError(UnetppError):
    """A store or a network failed in a way that the same call may survive later."""


class BreakerError(UnetppError):
    """So many images failed that something else than the images must be wrong."""


class AbandonedError(UnetppError):
    """The run was given up by a call with other settings, which took over what it had not done."""


class DeviceError(UnetppError):
    """The GPU computes nothing more for this process, whatever it is given.

    No image is to blame, so none becomes a failed row: the process ends, and another one takes over what it had begun.
    """


class StorageError(UnetppError):
    """The store refuses or cannot: no such bucket, wrong credentials, forbidden, no answer, no space.

    No image is to blame, so none becomes a failed row: the run stops with nothing half done, and a rerun resumes it.
    """


class JobError(UnetppError):
    """A submitted job ended badly.

    `job` names it, `exit_code` is its own (None when unknown), `reason` says what happened, or has its last lines.
    """

    def __init__(self, job: str, exit_code: int | None, reason: str) -> None:
        super().__init__(job, exit_code, reason)
        self.job = job
        self.exit_code = exit_code
        self.reason = reason

    def __str__(self) -> str:
        code = "" if self.exit_code is None else f" (exit code {self.exit_code})"
        return f"job {self.job}{code}: {self.reason}"

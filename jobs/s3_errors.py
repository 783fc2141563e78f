"""What object storage answers when it does not serve: which errors may pass, and a sentence for each that does not."""

from urllib.parse import urlsplit

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import FSTimeoutError

from unetpp.errors import ConfigError, StorageError

CREDENTIAL_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
ARCHIVED = "InvalidObjectState"


class Damaged(Exception):
    """A body is not what was stored; the next one may be."""


class Corrupt(Exception):
    """Body after body is not what was stored."""


TRANSPORT_ERRORS = (
    ConnectionError,
    HTTPClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    ResponseParserError,
    FSTimeoutError,
    TimeoutError,
    Damaged,
)


class Refused(Exception):
    """The store answered, and not with what was asked for."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

    @classmethod
    def of(cls, error: BaseException) -> "Refused | None":
        """The answer in an error of botocore, or in its cause; None where there is none."""
        answer = error if isinstance(error, ClientError) else error.__cause__
        if not isinstance(answer, ClientError):
            return None
        body = answer.response.get("Error", {})
        status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return cls(int(status), str(body.get("Code", "")), str(body.get("Message", "")))


def storage_error(uri: str, bucket: str, endpoint: str, refused: Refused) -> StorageError:
    """The sentence for what the store answered."""
    if refused.code == "NoSuchBucket" or (refused.status == 404 and not refused.code.startswith("NoSuchKey")):
        return StorageError(
            f"there is no bucket {bucket!r} at {endpoint} (wanted for {uri}): check its name, or create it"
        )
    said = f"{refused.status} {refused.code}".strip() + (f", {refused.message}" if refused.message else "")
    if refused.code in CREDENTIAL_CODES:
        return StorageError(
            f"{endpoint} does not accept the credentials for {uri} ({said}): check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the profile that AWS_PROFILE names"
        )
    if refused.code == "RequestTimeTooSkewed":
        return StorageError(f"{endpoint} refuses {uri} since this machine's clock is wrong ({said}): set the clock")
    if refused.code == ARCHIVED:
        return StorageError(f"{uri} is in an archive storage class ({said}): restore it first, or leave it out")
    if refused.status in (401, 403):
        return StorageError(
            f"{endpoint} forbids access to {uri} ({said}): check the credentials, and what they may read and write"
        )
    if refused.status >= 500 or refused.status in (409, 429):
        return StorageError(f"{endpoint} kept failing for {uri} ({said}): try again when it is well; nothing is lost")
    return StorageError(f"{endpoint} refuses {uri} ({said})")


def no_answer(uri: str, error: Exception) -> Exception:
    """The sentence for a request that was never answered, or not to the end."""
    match error:
        case NoCredentialsError() | PartialCredentialsError() | CredentialRetrievalError():
            return StorageError(no_credentials(uri))
        case ProfileNotFound():
            return ConfigError(f"{error}: correct AWS_PROFILE, or add the profile to the AWS config file")
        case EndpointConnectionError():
            address = urlsplit(error.kwargs.get("endpoint_url", ""))
            return StorageError(
                f"no answer from {address.scheme}://{address.netloc} (for {uri}): "
                "check AWS_ENDPOINT_URL and the network"
            )
        case ValueError():
            return ConfigError(f"{uri}: {error}; check AWS_ENDPOINT_URL and the bucket's name")
        case _:
            return StorageError(
                f"{uri}: the connection failed again and again ({type(error).__name__}: {error}); try again once the "
                "store is well; nothing is lost"
            )


def no_credentials(uri: str) -> str:
    """What to do where there are none."""
    return f"no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"

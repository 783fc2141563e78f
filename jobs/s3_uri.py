"""What an `s3://` URI says: `s3://profile@bucket/key`, the profile one of the AWS config files."""

from unetpp.errors import ConfigError


def split(uri: str) -> tuple[str, str]:
    """(bucket, key), the key exactly as it is written."""
    _, bucket, key = _parts(uri)
    return bucket, key


def without_profile(uri: str) -> str:
    """s3://bucket/key of s3://profile@bucket/key."""
    bucket, key = split(uri)
    return f"s3://{bucket}/{key}" if key else f"s3://{bucket}"


def profile_of(uri: str) -> str | None:
    """The storage profile that a location names; None where it names none."""
    return _parts(uri)[0] or None


def _parts(uri: str) -> tuple[str, str, str]:
    """(profile, bucket, key). ConfigError, which tells no secret, for a location that is none."""
    host, _, key = uri.removeprefix("s3://").partition("/")
    profile, at, bucket = host.rpartition("@")
    if ":" in host:  # a secret may have a slash of its own, before the @
        before, _, after = uri.rpartition("@")
        raise ConfigError(
            f"an s3:// location{f' ending in {after!r}' if before else ''} holds a password, or a port: never write "
            "one into a location; put keys and endpoint_url into a profile of the AWS config files, and name that: "
            "s3://profile@bucket/prefix"
        )
    if not bucket or (at and not profile):
        raise ConfigError(f"{uri!r} names no bucket; wanted s3://bucket/prefix or s3://profile@bucket/prefix")
    return profile, bucket, key


def endpoint_of(profile: str) -> str | None:
    """The endpoint_url of a profile; None: AWS itself. The AWS_ENDPOINT_URL of the environment is another store's."""
    import botocore.session  # takes a while to load, and most locations name no profile
    from botocore.exceptions import ProfileNotFound

    try:
        settings = botocore.session.Session(profile=profile).get_scoped_config()
    except ProfileNotFound:
        raise ConfigError(
            f"there is no storage profile {profile!r}: add a section [profile {profile}] with its keys and "
            "endpoint_url to the AWS config file (~/.aws/config, or AWS_CONFIG_FILE)"
        ) from None
    region = settings.get("region", "us-east-1")
    return settings.get("endpoint_url") or f"https://s3.{region}.amazonaws.com"

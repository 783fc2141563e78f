"""What an `s3://` URI says: `s3://profile@bucket/key`, the profile one of the AWS config files."""

from unetpp.errors import ConfigError


def split(uri: str) -> tuple[str, str]:
    """(bucket, key), the key exactly as it is written."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    profile, at, bucket = bucket.rpartition("@")
    if ":" in profile:
        raise ConfigError(
            f"a location in the bucket {bucket!r} holds a password: never write one into a location; put the keys into "
            "a profile of the AWS config files, and name that: s3://profile@bucket/prefix"
        )
    if not bucket or (at and not profile):
        raise ConfigError(f"{uri!r} names no bucket; wanted s3://bucket/prefix or s3://profile@bucket/prefix")
    return bucket, key


def without_profile(uri: str) -> str:
    """s3://bucket/key of s3://profile@bucket/key."""
    bucket, key = split(uri)
    return f"s3://{bucket}/{key}" if key else f"s3://{bucket}"


def profile_of(uri: str) -> str | None:
    """The storage profile that a location names; None where it names none."""
    return uri.removeprefix("s3://").partition("/")[0].rpartition("@")[0] or None


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

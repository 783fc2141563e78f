"""SeaweedFS on loopback: an S3 server from a Python package, for a site on one machine and for the tests."""

import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENT = {"GOMEMLIMIT": "512MiB"}
SERVICES = ("master", "filer", "volume", "admin")


def command(
    folder: Path, *, s3_port: int, ports: Mapping[str, int], buckets: tuple[str, ...], key_id: str, secret: str
) -> list[str]:
    """Return what starts a server that keeps everything in `folder` and knows one account, which may do all.

    `ports` has one for each of SERVICES; SeaweedFS also takes the ones 10000 above.
    """
    identity = {
        "name": "unetpp",
        "credentials": [{"accessKey": key_id, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    accounts = folder / "accounts.json"
    accounts.touch(mode=0o600)
    accounts.write_text(json.dumps({"identities": [identity]}))
    return [
        str(Path(sysconfig.get_path("scripts")) / "weed"),
        "-logtostderr=true",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        f"-s3.port={s3_port}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{service}.port={ports[service]}" for service in SERVICES),
        f"-s3.config={accounts}",
        f"-bucket={','.join(buckets)}",
    ]

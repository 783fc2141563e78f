"""Make the secrets of compose.yaml, once: `python infra/compose/make_secrets.py`. What is there stays as it is."""

import json
import secrets
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"


def main() -> None:
    """Write what is missing; only the owner can read it."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    key, secret = secrets.token_hex(10), secrets.token_hex(24)
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    account = {"name": "unetpp", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
    pair = {
        "store_accounts.json": json.dumps({"identities": [account]}),
        "store_credentials": f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n",
    }
    single = {
        "database_password": secrets.token_hex(24),
        "prefect_password": f"unetpp:{secrets.token_hex(24)}",
        "ray_token": secrets.token_hex(24),
    }
    if not all((FOLDER / name).exists() for name in pair):  # the two belong together
        single |= pair
    for name, content in single.items():
        file = FOLDER / name
        if name in pair or not file.exists():
            file.touch(mode=0o644)  # compose gives it to users of other numbers; the folder is closed
            file.write_text(content)


if __name__ == "__main__":
    main()

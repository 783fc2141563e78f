"""Print the digest of a model: `python -m jobs.check_model URI`. It was loaded, so it is whole."""

import sys

from jobs.command_line import run_plain
from jobs.models import fetch_model
from unetpp.checkpoint import digest, from_pretrained

if __name__ == "__main__":
    sys.exit(
        run_plain(
            "jobs.check_model", lambda: sys.stdout.write(digest(from_pretrained(fetch_model(sys.argv[1]))) + "\n") and 0
        )
    )

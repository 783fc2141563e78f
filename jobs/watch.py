"""How far the newest run of an output is, from its own records: cheap enough to ask every few seconds."""

from pydantic import BaseModel, ConfigDict

from jobs import storage
from unetpp.errors import StorageError


class RunProgress(BaseModel):
    """Images done of the newest run of an output; `num_done` is what its driver last said."""

    model_config = ConfigDict(frozen=True)

    run: str
    num_images: int
    num_done: int
    is_sealed: bool


class Watch:
    """Follows the newest run of an output."""

    def __init__(self, output: str) -> None:
        self._output = storage.canonical(output)
        self._run = 0

    def look(self) -> RunProgress | None:
        """How far it is now; None while there is no run, or nothing of it can be read."""
        try:
            while (not self._run and self._find_first()) or storage.exists(self._uri(self._run + 1, "run.json")):
                self._run += 1
            if not self._run:
                return None
            record = storage.read_json(self._uri(self._run, "run.json"))
            num_images, num_done = int(record["num_images"]), 0
            if is_sealed := storage.exists(self._uri(self._run, "_SUCCESS.json")):
                num_done = num_images
            elif (lease := self._newest_lease()) is not None:
                num_done = int(lease.get("num_done", 0))
        except (FileNotFoundError, StorageError, KeyError, ValueError):
            return None
        return RunProgress(run=record["run"], num_images=num_images, num_done=num_done, is_sealed=is_sealed)

    def _find_first(self) -> bool:
        """Begin at the newest run that is there, found once by a listing."""
        runs_uri = storage.join(self._output, "runs")
        found = [entry.key for entry in storage.list_objects(runs_uri, missing_ok=True)]
        numbers = [int(key[1:6]) for key in found if key.endswith("/run.json") and key[1:6].isdecimal()]
        self._run = max(numbers, default=1) - 1
        return bool(numbers)

    def _newest_lease(self) -> dict[str, int] | None:
        hints_uri = self._uri(self._run, "hints")
        leases = [
            (int(entry.key[6:-5]), entry.key)
            for entry in storage.list_objects(hints_uri, missing_ok=True)
            if entry.key.startswith("lease-") and entry.key[6:-5].isdecimal()
        ]
        if not leases:
            return None
        lease: dict[str, int] = storage.read_json(storage.join(hints_uri, max(leases)[1]))
        return lease

    def _uri(self, run: int, name: str) -> str:
        return storage.join(self._output, "runs", f"r{run:05d}", name)

"""Which model is current: `<models>/<digest>/` holds a model, the highest `current-<5 digits>.json` names it.

Nothing is ever rewritten: a promotion, and a rollback too, puts the next number.
"""

import re

from jobs import storage
from unetpp.config import Frozen, Level
from unetpp.errors import StorageError

_CURRENT = re.compile(r"current-(\d{5})\.json")


class CurrentModel(Frozen):
    """The content of one `current-<5 digits>.json`."""

    digest: str
    level: Level
    val_iou: float
    labelled_fingerprint: str
    gate: str


def model_uri(models: str, digest: str) -> str:
    """Return where the model of this digest lives."""
    return storage.join(models, digest)


def current(models: str) -> tuple[int, CurrentModel | None]:
    """Return the highest number and its model; (0, None) where nothing was promoted yet."""
    numbers = [
        int(match[1]) for entry in storage.list_objects(models, missing_ok=True) if (match := _matches(entry.key))
    ]
    if not numbers:
        return 0, None
    uri = storage.join(models, _name(max(numbers)))
    try:
        return max(numbers), CurrentModel.model_validate_json(storage.read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri} does not name a model: {error}; remove it or write the next number") from None


def promote(models: str, number: int, model: CurrentModel, source_uri: str) -> bool:
    """Copy a model to `<models>/<digest>/` and make it number `number`; False if that number is taken."""
    storage.upload_folder(storage.download_folder(source_uri), model_uri(models, model.digest), last="config.json")
    content = model.model_dump_json(indent=2).encode()
    return storage.put_if_absent(storage.join(models, _name(number)), content)


def _name(number: int) -> str:
    return f"current-{number:05d}.json"


def _matches(key: str) -> re.Match[str] | None:
    return _CURRENT.fullmatch(key)

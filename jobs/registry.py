"""Which model is current: `<models>/<digest>/` holds a model, the highest `current-<5 digits>.json` names it.

Nothing is ever rewritten: a promotion, and a rollback too, puts the next number.
"""

import re
from collections.abc import Iterable

from jobs import storage
from jobs.models import fetch_model, is_there
from unetpp.config import Frozen, Level
from unetpp.errors import ConfigError, ModelError, StorageError

_CURRENT = re.compile(r"current-(\d{5})\.json")
_ROLLED_BACK = "rolled back from "


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


def has_int8(models: str, digest: str) -> bool:
    """Return whether the model of this digest has an int8 form, by its config. ModelError where the model is gone."""
    uri = model_uri(models, digest)
    try:
        return storage.read_json(storage.join(uri, "config.json")).get("quantised") is not None
    except FileNotFoundError:
        raise ModelError(
            f"there is no model at {uri}: copy it there again, or go back: unetpp rollback --models {models}"
        ) from None


def current(models: str) -> tuple[int, CurrentModel | None]:
    """Return the highest number and its model; (0, None) where nothing was promoted yet."""
    numbers = [
        int(match[1]) for entry in storage.list_objects(models, missing_ok=True) if (match := _matches(entry.key))
    ]
    if not numbers:
        return 0, None
    return max(numbers), read(models, max(numbers))


def promote(models: str, number: int, model: CurrentModel, source_uri: str) -> bool:
    """Copy a model to `<models>/<digest>/` and make it number `number`; False if another one has that number.

    A folder that is there stays as it is: it is the same model, and may have an int8 form since.
    """
    if not is_there(there := model_uri(models, model.digest)):
        storage.upload_folder(fetch_model(source_uri), there, last="config.json")
    return _put(models, number, model)


def rollback(models: str) -> tuple[int, CurrentModel]:
    """Make the model that was current before this one current again, by writing the next number.

    ConfigError where there is none.
    """
    models = storage.canonical(models)
    while True:
        number, now = current(models)
        if now is None:
            raise ConfigError(f"{models} has no current model: there is nothing to go back from")
        way = _way_to(read(models, each) for each in range(1, number + 1))
        if len(way) < 2:
            raise ConfigError(f"{now.digest[:10]} is the first model of {models}: there is none to go back to")
        before = way[-2]
        if not storage.exists(storage.join(model_uri(models, before.digest), "config.json")):
            raise ConfigError(f"{model_uri(models, before.digest)} is gone: {models} cannot go back to it")
        again = before.model_copy(update={"gate": f"{_ROLLED_BACK}{now.digest[:10]} (number {number})"})
        if _put(models, number + 1, again):
            return number + 1, again


def _way_to(history: Iterable[CurrentModel | None]) -> list[CurrentModel]:
    """The models that were current one after the other until now, without those that were gone back from."""
    way: list[CurrentModel] = []
    for model in history:
        if model is None:
            continue
        if model.gate.startswith(_ROLLED_BACK):
            there = [index for index, each in enumerate(way[:-1]) if each.digest == model.digest]
            way = way[: there[-1] + 1] if there else way[:-1]
        if not way or way[-1].digest != model.digest:
            way.append(model)
    return way


def read(models: str, number: int) -> CurrentModel | None:
    """Return the model that was given this number; None where there is no such number."""
    uri = storage.join(models, _name(number))
    try:
        return CurrentModel.model_validate_json(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(f"{uri} does not name a model: {error}; remove it or write the next number") from None


def _put(models: str, number: int, model: CurrentModel) -> bool:
    uri = storage.join(models, _name(number))
    is_new = storage.put_if_absent(uri, model.model_dump_json(indent=2).encode())
    # A refused write may be our own, if its first answer was lost; whoever else wrote the same did what was wanted.
    return is_new or read(models, number) == model


def _name(number: int) -> str:
    return f"current-{number:05d}.json"


def _matches(key: str) -> re.Match[str] | None:
    return _CURRENT.fullmatch(key)

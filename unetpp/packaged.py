"""Models that come with the package, by name: `unetpp/models/<name>/`. Imports no torch.

A place that is one word, and no folder here, is the name of a packaged model. `packaged:<name>` is one wherever it is
said: the spelling for records and other machines, whose own copy of the package it means.
"""

import os
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from unetpp.errors import ModelError

SCHEME = "packaged:"
ROOT: Traversable = resources.files("unetpp") / "models"


def names() -> tuple[str, ...]:
    """Names of the packaged models."""
    if not ROOT.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in ROOT.iterdir() if entry.joinpath("config.json").is_file()))


def name_of(place: str | Path) -> str | None:
    """The packaged model that `place` names; None where it is a folder, a path or a URI.

    ModelError for one word that is neither a folder nor a packaged model.
    """
    text = os.fspath(place)
    if text.startswith(SCHEME):
        return text.removeprefix(SCHEME)
    is_word = bool(text) and text == os.path.basename(text)
    if not is_word or os.path.isdir(text):
        return None
    if text not in names():
        raise _unknown(text, "no folder of that name is here")
    return text


def resolve(place: str | Path) -> Path:
    """The folder that `place` means: a packaged model's, else itself. ModelError where it names a model that is not."""
    name = name_of(place)
    if name is None:
        return Path(place)
    if name not in names():
        raise _unknown(name, "it is said to come with the package")
    return Path(str(ROOT / name))


def _unknown(name: str, why: str) -> ModelError:
    known = ", ".join(names()) or "none"
    return ModelError(
        f"there is no model {name!r}: {why}, and the packaged models are {known}; give a folder, a URI or such a name"
    )

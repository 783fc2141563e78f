"""Model folders behind URIs and names."""

from pathlib import Path

from jobs import storage
from jobs.contract import fingerprint
from unetpp import packaged
from unetpp.card import CONFIG, WEIGHTS
from unetpp.errors import ModelError


def canonical(uri: str) -> str:
    """One spelling for one place, as `storage.canonical`; for a packaged model one that holds on every machine.

    ModelError for one word that is neither a folder nor a packaged model.
    """
    name = packaged.name_of(uri)
    return storage.canonical(uri) if name is None else f"{packaged.SCHEME}{name}"


def version(uri: str) -> str:
    """What tells the files at a model's place from those that lay there before, without reading them."""
    folder = storage.canonical(uri) if packaged.name_of(uri) is None else str(packaged.resolve(uri))
    return fingerprint({found.key: found.etag for found in storage.list_objects(folder, missing_ok=True)})


def is_there(uri: str) -> bool:
    """Whether a model folder was written to `uri`, whole."""
    return all(storage.exists(storage.join(uri, name)) for name in (CONFIG, WEIGHTS))


def fetch_model(uri: str) -> Path:
    """A local folder with the model at `uri`: a packaged one's, a local one, a remote one copied once per content.

    ModelError where there is none.
    """
    if packaged.name_of(uri) is not None:
        return packaged.resolve(uri)
    try:
        return storage.download_folder(uri)
    except FileNotFoundError:
        raise ModelError(
            f"there is no model at {uri}: wanted a folder with config.json and model.safetensors, "
            "as train and prune write it"
        ) from None


def refuse_another(uri: str, digest: str, run: str, opened_with: str, otherwise: str) -> None:
    """ModelError where the model at `uri` is not the one that a run was opened with; it says what else to do."""
    if digest != opened_with:
        raise ModelError(
            f"{uri} holds model {digest[:10]}, but run {run} was opened with {opened_with[:10]}: put that model back, "
            f"or {otherwise}"
        )

"""Model folders behind URIs."""

from pathlib import Path

from jobs import storage
from unetpp.errors import ModelError


def fetch_model(uri: str) -> Path:
    """A local folder with the model at `uri`, copied once per content if remote. ModelError where there is none."""
    try:
        return storage.download_folder(uri)
    except FileNotFoundError:
        raise ModelError(
            f"there is no model at {uri}: wanted a folder with config.json and model.safetensors, "
            "as train and prune write it"
        ) from None

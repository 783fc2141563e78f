"""Errors cross process borders: what they say must arrive."""

import pickle

import pytest

from unetpp.errors import (
    ConfigError,
    DeviceError,
    ImageError,
    JobError,
    ModelError,
    StorageError,
    TransientError,
    UnetppError,
)


@pytest.mark.parametrize(
    "error",
    [
        UnetppError("seen, wanted"),
        ConfigError("seen, wanted"),
        ModelError("seen, wanted"),
        TransientError("seen, wanted"),
        DeviceError("seen, wanted"),
        StorageError("seen, wanted"),
        ImageError("decode", "cut short"),
        JobError("train", 11, "last line"),
    ],
)
def test_errors_survive_pickle(error: UnetppError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))

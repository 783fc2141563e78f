"""Where weights come from: the code and the machine that made them, the labelled set that they were trained on."""

import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from jobs import storage
from jobs.labelled import LabelledSet
from unetpp.card import UNSTATED, TrainingData

SOURCE_DIR = Path(__file__).parents[1]
PACKAGES = ("unetpp", "torch", "ray", "numpy")
TIMEOUT_S = 10


def provenance() -> dict[str, str | int | None]:
    """Code and environment of this process, flat and without names of hosts or people; None for what there is not.

    Call it where the weights are computed: `cpu` and `gpu` are this machine's. `commit` is git's, with `-dirty` where
    files differ from it; without git the version of `unetpp` has to say which code it was.
    """
    return {
        **{name: _version(name) for name in PACKAGES},
        "commit": git_commit(SOURCE_DIR),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def git_commit(source_dir: Path) -> str | None:
    """The commit that a working tree is at; None where the folder is no working tree's root, or git is not there.

    An installed package may lie within the working tree of another project, whose commit says nothing.
    """
    if not (source_dir / ".git").exists():
        return None
    words = ["git", "-C", str(source_dir), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def data_name(uri: str) -> str:
    """What a labelled set is called: the last part of its place, which tells nothing of the machine."""
    return storage.plain(storage.canonical(uri)).rpartition("/")[2]


def training_data(labelled: LabelledSet, splits: Sequence[str], licence: str = UNSTATED) -> TrainingData:
    """What a model's card says of the set that it was trained on; `splits` are those for training and validation."""
    return TrainingData(
        name=data_name(labelled.uri),
        fingerprint=labelled.fingerprint,
        splits={name: len(labelled.split(name)) for name in splits},
        licence=licence,
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or None)

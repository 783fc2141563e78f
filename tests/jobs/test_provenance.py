"""Weights know which code, which machine and which images they come from."""

import json
import platform
import socket
import subprocess
from pathlib import Path

import torch

from jobs.contract import SynthConfig, TrainConfig
from jobs.dataset import open_labelled_set
from jobs.provenance import data_name, git_commit, provenance, training_data
from jobs.synth import run as synthesise


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_environment_is_named_and_nobody_else(tmp_path: Path) -> None:
    found = provenance()
    assert found == json.loads(json.dumps(found))
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["ray"]
    assert found["cpu"]
    assert found["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert socket.gethostname() not in json.dumps(found)


def test_the_commit_is_that_of_the_tree_itself(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "site-packages").mkdir()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    assert git_commit(tmp_path / "site-packages") is None  # installed within another project's tree
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"


def test_the_set_is_named_without_where_it_lies(tmp_path: Path) -> None:
    assert data_name(f"{tmp_path}/nuclei/") == "nuclei"
    assert data_name("s3://lab@bucket/sets/nuclei") == "nuclei"
    synthesise(SynthConfig(out=str(tmp_path / "set"), num=8, size=32))
    labelled = open_labelled_set(str(tmp_path / "set"))
    data = training_data(labelled, ("train", "val"), "CC0-1.0")
    assert (data.name, data.fingerprint, data.licence) == ("set", labelled.fingerprint, "CC0-1.0")
    assert data.splits == {name: len(labelled.split(name)) for name in ("train", "val")}


def test_words_for_the_card_start_no_new_training() -> None:
    plain = TrainConfig(data="d", output="o")
    told = TrainConfig(data="d", output="o", licence="Apache-2.0", data_licence="CC0-1.0", intended_use="nuclei")
    assert told.run_fingerprint() == plain.run_fingerprint()

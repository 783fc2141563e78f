"""The README's commands, as a newcomer types them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

SHORT = " --epochs 1 --steps-per-epoch 2 --model.filters 2,4,8,8,8"
"""Training is what takes long; two steps of a tiny network leave every other word as it is."""


def _block(language: str, holding: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and holding in text]
    return found


@pytest.fixture
def newcomer(tmp_path: Path) -> dict[str, str]:
    """Environment of a shell in an empty folder, with the project's commands on its PATH."""
    shutil.copytree(ROOT / "infra", tmp_path / "infra")
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_readme_commands_run(newcomer: dict[str, str], tmp_path: Path) -> None:
    commands = _block("bash", "unetpp prune")
    commands = re.sub(r"--model\.filters \S+|--epochs \d+|--steps-per-epoch \d+", "", commands)
    commands = re.sub(r"(unetpp train (?:.*\\\n)*.*)", rf"\1{SHORT}", commands).replace("--num 64", "--num 24")
    script = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=tmp_path, env=newcomer, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "24 images -> 24 rows" in done.stdout
    python = "\n".join(text for kind, text in BLOCKS if kind == "python")
    prepare = "from unetpp.images import decode_image\nfrom pathlib import Path\n"
    prepare += "images = [decode_image(path.read_bytes()) for path in Path('demo/set/images').iterdir()]\n"
    check = "\nassert [mask.shape for mask in masks] == [image.shape[:2] for image in images]"
    done = subprocess.run(
        [sys.executable, "-c", prepare + python + check],
        cwd=tmp_path,
        env={**newcomer, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readmes_archive_is_read_beside_its_folder(newcomer: dict[str, str], tmp_path: Path) -> None:
    commands = "unetpp synth --out demo/set --num 8\n" + _block("bash", "packed.tar.gz")
    script = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=tmp_path, env=newcomer, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (named,) = re.findall(r"--exclude '\*(\S+)'", commands)
    num_left_out = sum(path.name.endswith(named) for path in (tmp_path / "demo/set/images").iterdir())
    assert f"{2 * (8 - num_left_out)} images" in done.stdout


def test_every_command_that_the_readme_names_is_there() -> None:
    from jobs.cli import JOBS

    named = set(re.findall(r"^\| `unetpp (\w+)", README, re.MULTILINE))
    assert named == {*JOBS, "submit", "doctor"}
    for flow in re.findall(r"^\| `python -m (flows\.\w+)`", README, re.MULTILINE):
        assert (ROOT / f"{flow.replace('.', '/')}.py").is_file()


def test_every_file_that_the_readme_names_is_there_and_every_module_is_named() -> None:
    (tree,) = re.findall(r"^```\n(unetpp/ .*?)^```", README, re.MULTILINE | re.DOTALL)
    named, folder = set(re.findall(r"`((?:unetpp|jobs|flows|infra|tests)/[\w/.]+)`", README)), ""
    for line in tree.splitlines():
        if heading := re.match(r"\w+/", line):
            folder = heading[0]
        named |= {folder + name for name in re.findall(r"\w+\.py", line)}
    assert len(named) > 25
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    modules = {
        f"{path.parent.name}/{path.name}" for name in ("unetpp", "jobs", "flows") for path in (ROOT / name).glob("*.py")
    }
    assert sorted(name for name in modules - named if not name.endswith("__init__.py")) == []

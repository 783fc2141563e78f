"""Jobs take a packaged model by its name: in this process, from an installed package, and on Ray's workers."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jobs import models, registry, storage
from jobs.contract import EvaluateConfig, PredictConfig, PredictResult, PruneConfig, RebuildConfig, RetryConfig
from jobs.evaluate import run as evaluate
from jobs.predict import run as predict
from jobs.prune import run as prune
from jobs.rebuild import run as rebuild
from jobs.registry import CurrentModel
from jobs.retry import run as retry
from unetpp import packaged
from unetpp.checkpoint import digest, from_pretrained
from unetpp.errors import ConfigError, ModelError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the one packaged model; the working directory is an empty one."""
    shutil.copytree(tiny_model, tmp_path / "models" / "tiny")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(packaged, "ROOT", tmp_path / "models")
    monkeypatch.chdir(tmp_path / "here")
    return "tiny"


def segment(model: str, archive: Path, tmp_path: Path) -> PredictResult:
    settings = {"input": str(archive), "output": str(tmp_path / "out"), "backend": "inline", "threads": 1}
    return predict(PredictConfig.model_validate({"model": model, **settings}))


def test_the_name_and_the_folder_are_the_same_work(tiny: str, tiny_model: Path, archive: Path, tmp_path: Path) -> None:
    """What is done before is looked up by the digest, not by how the model was called."""
    by_name = segment(tiny, archive, tmp_path)
    assert by_name.status == "complete"
    by_folder = segment(str(tiny_model), archive, tmp_path)
    assert (by_folder.status, by_folder.model_digest) == ("unchanged", by_name.model_digest)


def test_an_unfinished_run_is_resumed_by_the_other_spelling(
    tiny: str, tiny_model: Path, archive: Path, tmp_path: Path
) -> None:
    first = segment(tiny, archive, tmp_path)
    run_dir = tmp_path / "out" / "runs" / "r00001"
    (run_dir / "_SUCCESS.json").unlink()
    next((tmp_path / "out" / "table").rglob("part-00000.parquet")).unlink()
    assert segment(str(tiny_model), archive, tmp_path).runs == first.runs


def test_a_run_says_which_model_it_was_in_a_way_that_holds_elsewhere(tiny: str, archive: Path, tmp_path: Path) -> None:
    segment(tiny, archive, tmp_path)
    run = str(tmp_path / "out" / "runs" / "r00001")
    assert json.loads(Path(run, "run.json").read_text())["config"]["model"] == "packaged:tiny"
    assert rebuild(RebuildConfig(run=run)).num_predicted == 12
    assert retry(RetryConfig(run=run, backend="inline")).status == "unchanged"
    shutil.rmtree(tmp_path / "models")  # a machine whose package has no such model can make the report all the same
    assert rebuild(RebuildConfig(run=run)).num_predicted == 12


def test_every_door_takes_a_name(tiny: str, tiny_model: Path, tmp_path: Path) -> None:
    assert models.fetch_model(tiny) == tmp_path / "models" / "tiny"
    assert models.canonical(tiny) == models.canonical("packaged:tiny") == "packaged:tiny"
    assert models.canonical(f"./{tiny}") == str(tmp_path / "here" / "tiny")
    result = prune(PruneConfig(model=tiny, level=1, out=str(tmp_path / "pruned")))
    assert result.digest == digest(from_pretrained(tiny_model, 1))
    current = CurrentModel(digest="f" * 64, level=2, val_iou=0.5, labelled_fingerprint="f" * 64, gate="given")
    assert registry.promote(str(tmp_path / "registry"), 1, current, tiny)
    assert storage.exists(tmp_path / "registry" / current.digest / "model.safetensors")
    with pytest.raises(ModelError, match="the packaged models are tiny"):
        models.fetch_model("small")


def test_other_weights_at_a_place_are_another_version(tiny: str, tiny_model: Path, tmp_path: Path) -> None:
    assert models.version(tiny) == models.version(str(tiny_model))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    before = models.version(str(copy))
    assert models.version(str(copy)) == before
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    assert models.version(str(copy)) != before
    assert models.is_there(str(copy))
    (copy / "model.safetensors").unlink()
    assert not models.is_there(str(copy))


def test_the_package_is_not_written_to(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="comes with the package, which is not written to"):
        evaluate(EvaluateConfig(model=tiny, data=str(tmp_path), update_card=True))


def test_workers_of_an_installed_package_find_its_model(tiny_model: Path, archive: Path, tmp_path: Path) -> None:
    """A wheel is built of the sources and a model, unpacked where nothing else is, and asked for the model by name."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("unetpp", "jobs", "flows"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "models"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(tiny_model, source / "unetpp" / "models" / "tiny")
    (source / "unetpp" / "models" / "tiny" / "level_choice.png").write_bytes(b"png")
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([sys.executable, *build, "--wheel-dir", str(tmp_path), str(source)], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    installed = {path.name for path in (site / "unetpp" / "models" / "tiny").iterdir()}
    assert installed == {"config.json", "model.safetensors", "README.md", "level_choice.png"}

    words = ["predict", "--model", "tiny", "--input", archive, "--output", tmp_path / "out", "--num-workers", "1"]
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *map(str, words)],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "12 images -> 12 rows: 12 predicted" in done.stdout
    record = json.loads((tmp_path / "out" / "runs" / "r00001" / "run.json").read_text())
    assert record["config"]["model"] == "packaged:tiny"
    assert record["model_digest"] == digest(from_pretrained(tiny_model, 2), mode="fast", precision="f32")

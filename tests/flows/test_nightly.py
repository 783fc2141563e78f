"""One real night on an ephemeral Prefect: train, measure, prune, gate, segment; and the nights after it."""

import flows.embedded  # noqa: F401  before Prefect is imported

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pyarrow.dataset
import pytest
from prefect.artifacts import Artifact
from prefect.testing.utilities import prefect_test_harness

from flows import publish, stages
from flows.backfill import backfill
from flows.config import BackfillConfig, NightlyConfig, TrainFlowConfig
from flows.nightly import nightly
from flows.outcome import GateResult, TrainOutcome
from jobs import registry
from jobs.config_file import write_yaml
from jobs.contract import EvaluateResult, ExitCode, PredictResult, PruneResult
from unetpp.errors import ConfigError, JobError, TransientError

Night = tuple[TrainOutcome, PredictResult]


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    """A temporary Prefect of this module's own."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def first_night(prefect_server: None, night_config: NightlyConfig) -> Night:
    """What the first night returned."""
    return nightly(night_config)


def files_below(*folders: str) -> dict[Path, tuple[int, int]]:
    """Every file with its size and time of change."""
    paths = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    paths = [path for path in paths if not path.name.startswith("unetpp-predict-")]  # what the last call said
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def overrun(config: object, until: float) -> None:
    """A job that is stopped by the deadline."""
    time.sleep(max(0.0, until - time.monotonic()))
    raise JobError("job", int(ExitCode.INTERRUPTED), "the deadline came before its end")


def train_config(night: NightlyConfig) -> TrainFlowConfig:
    return TrainFlowConfig(**{name: getattr(night, name) for name in TrainFlowConfig.model_fields})


# --------------------------------------------------------------------------------------------- the first night


def test_a_night_measures_every_level_and_keeps_one(first_night: Night) -> None:
    outcome, _ = first_night
    names = [report.name for report in outcome.measured.reports]
    assert names[:2] == ["L1", "L2"]
    assert outcome.measured.split == "val"
    within = [choice.level for choice in outcome.pruned.choices if choice.within_tolerance]
    assert outcome.pruned.level in within


def test_the_first_model_becomes_the_current_one(first_night: Night, night_config: NightlyConfig) -> None:
    outcome, _ = first_night
    number, model = registry.current(night_config.models)
    assert number == 1
    assert model is not None
    assert (model.digest, model.level) == (outcome.pruned.digest, outcome.pruned.level)
    assert model.val_iou == stages.level_iou(outcome.measured, outcome.pruned.level)
    folder = Path(night_config.models) / model.digest
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "README.md"}


def test_every_image_of_the_archive_is_one_row(first_night: Night, night_config: NightlyConfig) -> None:
    _, predicted = first_night
    keys = sorted(path.name for path in Path(night_config.input).iterdir())
    table = pyarrow.dataset.dataset(Path(night_config.output) / "table", partitioning="hive").to_table()
    assert sorted(table["key"].to_pylist()) == keys
    assert (predicted.status, predicted.num_predicted, predicted.num_failed) == ("complete", len(keys), 0)
    assert Path(predicted.report_uri or "").is_file()


def test_a_night_publishes_levels_counts_and_the_report(first_night: Night) -> None:
    outcome, predicted = first_night
    levels, archive, report = (Artifact.get(key) for key in ("levels", "archive", "report"))
    assert levels is not None
    assert archive is not None
    assert report is not None
    assert f'"level": "L{outcome.pruned.level}"' in str(levels.data)
    assert levels.description == outcome.gate.reason
    assert f"{predicted.num_listed} images -> {predicted.num_listed} rows" in str(archive.data)
    assert f"file://{predicted.report_uri}" in str(report.data)


# ------------------------------------------------------------------------------------------- the nights after


def test_a_second_night_does_nothing_and_says_so(
    first_night: Night, night_config: NightlyConfig, tmp_path: Path
) -> None:
    """As a command, with an embedded Prefect in a home of its own: what a person at a laptop sees."""
    places = (night_config.models, night_config.work, night_config.output)
    before = files_below(*places)
    file = tmp_path / "night.yaml"
    file.write_text(write_yaml(night_config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.nightly", "--config", str(file)],
        env={**environment, "PREFECT_HOME": str(tmp_path / "prefect")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == ExitCode.DONE, done.stderr
    assert files_below(*places) == before
    for stage in ("train", "evaluate", "prune", "gate"):
        assert f"flows.stages: {stage}: unchanged" in done.stderr
    num_images = first_night[1].num_listed
    assert f"unchanged  {num_images} images -> {num_images} rows" in done.stdout
    assert first_night[1].report_uri is not None
    assert first_night[1].report_uri in done.stdout
    ours = re.compile(r"\d\d:\d\d:\d\d (INFO|WARNING) +(flows|jobs|unetpp)\.|(unchanged|note|table|report|  ) ")
    assert [line for line in done.stderr.splitlines() if line and not ours.match(line)] == []


def test_a_night_in_int8_goes_on_in_float32_until_there_is_an_int8_form(
    first_night: Night, night_config: NightlyConfig, caplog: pytest.LogCaptureFixture
) -> None:
    predict = night_config.predict.model_copy(update={"engine": "openvino-int8"})
    changed = {"predict": predict, "on_new_model": "all", "output": f"{night_config.output}-int8"}
    asked = night_config.model_copy(update=changed)
    outcome, float32 = nightly(asked)
    assert outcome.quantised is None
    assert f"{outcome.pruned.digest[:10]} has no int8 form, so it computes in float32" in caplog.text
    caplog.clear()
    outcome, int8 = nightly(asked.model_copy(update={"quantise": True, "max_iou_drop": 0.9}))
    assert outcome.quantised is not None
    assert outcome.quantised.accepted
    assert outcome.quantised.digest == outcome.pruned.digest
    assert registry.has_int8(night_config.models, outcome.pruned.digest)
    assert "has no int8 form" not in caplog.text
    assert int8.num_predicted == float32.num_predicted == int8.num_listed
    assert int8.model_digest != float32.model_digest
    outcome, again = nightly(asked.model_copy(update={"quantise": True, "max_iou_drop": 0.9}))
    assert outcome.quantised is None  # it has one
    assert (again.status, again.model_digest) == ("unchanged", int8.model_digest)


def test_a_night_that_fails_passes_the_jobs_exit_code_on(first_night: Night, night_config: NightlyConfig) -> None:
    broken = night_config.model_copy(update={"input": night_config.input + "-absent"})
    with pytest.raises(JobError) as failed:
        nightly(broken)
    assert failed.value.job.startswith("unetpp-predict-")
    assert failed.value.exit_code == ExitCode.CONFIG


def test_a_training_that_took_too_long_leaves_time_for_the_archive(
    night_config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fallback with the current model has a deadline of its own."""
    left: list[float] = []
    monkeypatch.setattr(registry, "current", lambda models: (1, "a model"))
    monkeypatch.setattr("flows.nightly.make_model", overrun)
    monkeypatch.setattr("flows.nightly.segment", lambda config, night, until: left.append(until - time.monotonic()))
    with pytest.raises(JobError, match="the deadline"):
        nightly.fn(night_config.model_copy(update={"night": date(2026, 3, 24), "deadline_hours": 0.0001}))
    assert left[0] > 0


def test_every_night_of_a_range_has_its_own_time_and_stops_no_other(
    night_config: NightlyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []

    def segment(config: object, night: str, until: float) -> None:
        left.append(until - time.monotonic())
        if night == "20260325":
            raise TransientError("the Ray cluster answers 502")
        overrun(config, until)

    monkeypatch.setattr(stages, "is_night_done", lambda config, name: None)
    monkeypatch.setattr(publish, "publish_nights", lambda rows: None)
    monkeypatch.setattr("flows.backfill.segment", segment)
    with pytest.raises(JobError, match="2 of 2 nights failed"):
        backfill.fn(
            BackfillConfig(
                models=night_config.models,
                input=night_config.input,
                output=night_config.output,
                first=date(2026, 3, 24),
                last=date(2026, 3, 25),
                deadline_hours=0.0001,
            )
        )
    assert min(left) > 0


def test_without_a_current_model_an_archive_is_refused(night_config: NightlyConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no current model"):
        stages.predict_stage.fn(
            night_config.model_copy(update={"models": str(tmp_path)}), "20260324", time.monotonic() + 600
        )


def test_a_changed_mask_or_option_makes_the_labelled_set_new(labelled_dir: Path) -> None:
    before = stages.labelled_fingerprint(str(labelled_dir))
    (labelled_dir / "notes.txt").write_text("not part of the labels")
    assert stages.labelled_fingerprint(str(labelled_dir)) == before
    mask = next((labelled_dir / "masks").iterdir())
    content, times = mask.read_bytes(), (mask.stat().st_atime_ns, mask.stat().st_mtime_ns)
    mask.write_bytes(content + b"\0")
    assert stages.labelled_fingerprint(str(labelled_dir)) != before
    mask.write_bytes(content)
    os.utime(mask, ns=times)
    assert stages.labelled_fingerprint(str(labelled_dir)) == before


# ------------------------------------------------------------------------------------------------------ the gate


def decide(night: NightlyConfig, measured: EvaluateResult, pruned: PruneResult, iou: float) -> GateResult:
    """What the gate says of a model that scored `iou` at every level."""
    reports = tuple(
        report.model_copy(update={"score": report.score.model_copy(update={"mean_iou": iou})})
        for report in measured.reports
    )
    scored = measured.model_copy(update={"reports": reports})
    labelled = stages.labelled_fingerprint(night.data)
    return stages.gate_stage(train_config(night), labelled, scored, pruned, time.monotonic() + 600)


def test_another_choice_of_a_level_leaves_the_first_ones_model(first_night: Night, night_config: NightlyConfig) -> None:
    """So that the digest in the first one's record stays that of the weights it names."""
    outcome, _ = first_night
    before = files_below(outcome.pruned.model_uri)
    other = train_config(night_config).model_copy(update={"tolerance": 0.9})
    labelled = stages.labelled_fingerprint(night_config.data)
    pruned = stages.prune_stage(other, labelled, outcome.trained, time.monotonic() + 600)
    assert pruned.level == 1
    assert pruned.model_uri != outcome.pruned.model_uri
    assert files_below(outcome.pruned.model_uri) == before


def test_what_prune_chooses_by_is_measured_again_where_it_is_gone(
    first_night: Night, night_config: NightlyConfig
) -> None:
    outcome, _ = first_night
    config, labelled = train_config(night_config), stages.labelled_fingerprint(night_config.data)
    trained, until = outcome.trained, time.monotonic() + 600
    for metrics in Path(night_config.work).glob("evaluate/*/metrics.json"):
        metrics.unlink()
    stages.evaluate_stage(config, labelled, trained.model_uri, trained.digest, until)
    other = config.model_copy(update={"tolerance": 0.8})
    assert stages.prune_stage(other, labelled, trained, until).level == 1


def test_a_second_registry_gets_the_model_too(first_night: Night, night_config: NightlyConfig, tmp_path: Path) -> None:
    outcome, _ = first_night
    elsewhere = night_config.model_copy(update={"models": str(tmp_path)})
    assert decide(elsewhere, outcome.measured, outcome.pruned, 0.5).accepted
    model = registry.current(str(tmp_path))[1]
    assert model is not None
    assert model.digest == outcome.pruned.digest


def test_a_worse_model_does_not_replace_the_current_one_and_a_better_one_does(
    first_night: Night, night_config: NightlyConfig
) -> None:
    outcome, _ = first_night
    pruned = outcome.pruned.model_copy(update={"digest": "f" * 64})
    worse = decide(night_config, outcome.measured, pruned, -1.0)
    assert not worse.accepted
    assert "does not replace the current model" in worse.reason
    assert registry.current(night_config.models)[0] == 1

    better = decide(night_config.model_copy(update={"gate_margin": 0.01}), outcome.measured, pruned, 1.0)
    assert better.accepted
    number, model = registry.current(night_config.models)
    assert number == 2
    assert model is not None
    assert model.digest == pruned.digest
    assert (Path(night_config.models) / model.digest / "model.safetensors").is_file()

    again = decide(night_config.model_copy(update={"gate_margin": 0.01}), outcome.measured, pruned, 1.0)
    assert again == better
    assert registry.current(night_config.models)[0] == 2

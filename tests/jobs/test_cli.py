"""The command line: where values come from, what a person is told, and how a process ends."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from jobs.cli import JOBS, run_command_line
from jobs.command_line import exit_code, new_app, run_app, set_command
from jobs.config_file import load_config, parse_setting, write_command, write_yaml
from jobs.config_schema import leaves, schema_of
from jobs.contract import ExitCode, TrainConfig
from unetpp.errors import ConfigError, ImageError, JobError, ModelError, StorageError, TransientError, UnetppError

PREDICT = ["predict", "--model", "m", "--input", "i", "--output", "o"]
TRAIN = ["train", "--data", "d", "--output", "o"]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]):
    """Function: words -> (exit code, the config that --print-config shows)."""

    def run(*words: str) -> tuple[int, dict]:
        code = run_command_line(None, [*words, "--print-config"])
        return code, yaml.safe_load(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Function: words -> the sentences of a refusal, which must be exit 10 without a traceback."""

    def run(*words: str) -> list[str]:
        assert run_command_line(None, list(words)) == ExitCode.CONFIG
        caught = capsys.readouterr()
        assert caught.out == ""
        assert "Traceback" not in caught.err
        assert all(line.startswith("unetpp: ") for line in caught.err.splitlines())
        return [line.removeprefix("unetpp: ") for line in caught.err.splitlines()]

    return run


# ---------------------------------------------------------------------------------------- where values come from


def test_a_config_can_be_told_as_a_command(printed, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {
            "data": "d e",
            "output": "o",
            "model": {"level": 2, "filters": [4, 8, 16]},
            "epochs": 3,
            "num_workers": (1, 8),
            "balance_by": "stain",
            "group_weights": {"a": 0.5, "b c": 0.5},
            "augment": {"flip": False},
        }
    )
    program, *words = shlex.split(write_command("train", config))
    assert program == "unetpp"
    assert "--seed" not in words
    assert TrainConfig.model_validate(printed(*words)[1]) == config


@pytest.mark.parametrize(
    ("job", "changed"),
    [
        ("explain", {"run": "r", "key": "-cut/a b.png"}),
        ("explain", {"run": "-r", "key": "--help"}),
        ("predict", {"model": "m", "input": "-i", "output": "o", "exclude": ["-*", "*,a", "[ab]*", ""]}),
        ("inspect", {"data": "d", "leave_out": []}),
        ("train", {"data": "d", "output": "o", "model": {"value_range": {"float32": [-1.0, 1.0]}}}),
        ("train", {"data": "d", "output": "o", "balance_by": "stain", "group_weights": {"𠮷": 0.5, "-é": 0.5}}),
    ],
)
def test_a_command_line_gives_back_whatever_texts_a_config_has(job: str, changed: dict[str, Any], printed) -> None:
    config = JOBS[job].model_validate(changed)
    _, *words = shlex.split(write_command(job, config))
    assert JOBS[job].model_validate(printed(*words)[1]) == config


def test_flags_win_over_settings_and_settings_over_the_file(tmp_path: Path, printed) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("data: from-file\noutput: from-file\nepochs: 3\nseed: 3\nmodel: {level: 2, norm: none}\n")
    code, config = printed(
        "train", "--config", str(file), "--set", "epochs=4", "--set", "seed=4", "--set", "model.level=3", "--seed", "5"
    )
    assert code == 0
    assert (config["data"], config["epochs"], config["seed"]) == ("from-file", 4, 5)
    assert (config["model"]["level"], config["model"]["norm"]) == (3, "none")


def test_a_later_setting_wins(printed) -> None:
    assert printed(*TRAIN, "--set", "seed=1", "--set", "seed=2")[1]["seed"] == 2


def test_a_setting_replaces_a_whole_section_or_one_key_of_it(printed) -> None:
    _, config = printed(*TRAIN, "--set", "model={level: 2, norm: none}", "--set", "model.in-channels=1")
    assert (config["model"]["level"], config["model"]["norm"], config["model"]["in_channels"]) == (2, "none", 1)


def test_lists_are_given_with_commas_or_by_repeating_the_flag(printed) -> None:
    assert printed(*PREDICT, "--write", "parquet,png")[1]["write"] == ["parquet", "png"]
    assert printed(*PREDICT, "--write", "parquet", "--write", "png")[1]["write"] == ["parquet", "png"]
    assert printed(*TRAIN, "--model.filters", "8,16", "--model.level", "1")[1]["model"]["filters"] == [8, 16]


def test_globs_keep_their_commas_and_brackets(printed) -> None:
    _, config = printed(*PREDICT, "--include", "[a,b]*.png", "--include", "*,v2.tif")
    assert config["include"] == ["[a,b]*.png", "*,v2.tif"]


def test_a_place_that_looks_like_a_number_stays_text(printed) -> None:
    assert printed("predict", "--model", "1", "--input", "null", "--output", "2.0")[1]["model"] == "1"


def test_switches_turn_on_and_off(printed) -> None:
    assert printed(*PREDICT)[1]["partial_ok"] is False
    assert printed(*PREDICT, "--partial-ok")[1]["partial_ok"] is True
    assert printed(*TRAIN, "--augment.no-flip")[1]["augment"]["flip"] is False


def test_a_number_choice_is_read_as_a_number(printed) -> None:
    assert printed(*TRAIN, "--model.pad-multiple", "32")[1]["model"]["pad_multiple"] == 32


def test_null_takes_a_value_back(tmp_path: Path, printed) -> None:
    file = tmp_path / "predict.yaml"
    file.write_text("level: 2\n")
    assert printed(*PREDICT, "--config", str(file), "--set", "level=null")[1]["level"] is None


def test_an_empty_file_and_an_empty_section_say_nothing(tmp_path: Path, printed) -> None:
    empty, section = tmp_path / "empty.yaml", tmp_path / "section.yaml"
    empty.write_text("")
    section.write_text("model:\n")
    assert printed(*TRAIN, "--config", str(empty))[0] == 0
    assert printed(*TRAIN, "--config", str(section), "--model.level", "2")[1]["model"]["level"] == 2


@pytest.mark.parametrize(
    ("job", "required"),
    [
        ("train", {"data": "d", "output": "o", "head_weights": {1: 1.0, 2: 2.0}, "model": {"level": 2}}),
        ("evaluate", {"model": "m", "data": "d"}),
        ("prune", {"model": "m", "out": "o", "level": 2}),
        ("predict", {"model": "m", "input": "i", "output": "o", "include": ["*.png"]}),
        ("synth", {"out": "o"}),
    ],
)
def test_a_printed_config_reads_back_as_the_same_config(job: str, required: dict, tmp_path: Path) -> None:
    config = JOBS[job].model_validate(required)
    file = tmp_path / "config.yaml"
    file.write_text(write_yaml(config))
    assert load_config(JOBS[job], file) == config


@given(st.integers() | st.booleans() | st.none() | st.text("abc xyz:-", max_size=12))
def test_a_setting_carries_any_yaml_value(value: object) -> None:
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    assert parse_setting(f"a.b-c={text}") == (("a", "b_c"), value)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predict", "--levle", "3"], "Unknown option: --levle. Did you mean --level? --help lists what there is."),
        ([*PREDICT, "--set", "levle=3"], "unknown key levle; did you mean level?"),
        ([*TRAIN, "--set", "model.levle=3"], "unknown key levle in model; did you mean level?"),
        ([*PREDICT, "--level", "5"], "level: saw 5, wanted a whole number from 1 to 4"),
        ([*PREDICT, "--shard-images", "many"], "shard_images: saw 'many', wanted a whole number from 1 to 4096"),
        ([*PREDICT, "--mode", "fats"], "mode: saw 'fats', wanted fast or accurate; did you mean fast?"),
        ([*PREDICT, "--write", "png"], "write must name parquet: the table is the record of what is done"),
        ([*TRAIN, "--set", "train_split=4"], "train_split: saw 4, wanted text"),
        (
            [*TRAIN, "--crop-px", "100"],
            "crop_px: saw 100, wanted a whole number of at least 16 and that is a multiple of 16",
        ),
        *(
            ([*words, "--seed", seed], f"seed: saw {seed}, wanted a whole number from 0 to 9223372036854775807")
            for words, seed in (
                (TRAIN, "-1"),
                (TRAIN, str(2**64)),
                (["evaluate", "--model", "m", "--data", "d"], "-1"),
                (["prune", "--model", "m", "--out", "o", "--level", "1"], "-1"),
                (["quantise", "--model", "m", "--data", "d"], "-1"),
                (["synth", "--out", "o"], "-1"),
            )
        ),
        ([*TRAIN, "--set", "augment.gamma=[1,x]"], "augment.gamma[1]: saw 'x', wanted a number"),
        ([*TRAIN, "--set", "augment=3"], None),
        (
            [*TRAIN, "--distillation", "0.3", "--model.no-deep-supervision"],
            "distillation 0.3 teaches shallower heads, and the model's only head is at level 4; leave it out, or take "
            "deep_supervision and a deeper level",
        ),
        ([*TRAIN, "--max-time", "0h"], "max_time 0h leaves no time to train: give more, or leave it out"),
        *(
            (
                [*TRAIN, "--crop-px", "16", *words],
                "a crop of 16 px is 1 pixel at level 4, and a worker may compute one crop alone: BatchNorm has nothing "
                "to normalise by; take a larger crop_px, batch_size or micro_batch, fewer num_workers, or model.norm "
                "none",
            )
            for words in (["--batch-size", "1"], ["--micro-batch", "5"], ["--set", "num_workers=[1, 16]"])
        ),
        (
            [*TRAIN, "--compile", "--recompute"],
            "compile and recompute cannot be together: torch.compile knows no recomputing; leave one out",
        ),
        ([*TRAIN, "--model.filters", "8,16"], "model: level 4 needs 5 filters, got 2"),
        ([*TRAIN, "--set", "seed"], "--set seed: wanted a key, `=` and a value, such as --set model.level=3"),
        (
            [*PREDICT, "--set", "level=1", "--set", "level.x=1"],
            "level.x: level is the value 1, not a section with keys",
        ),
        ([*PREDICT, "extra"], "unexpected word 'extra': a value follows its flag; --help lists the flags."),
        (
            ["explain", "r", "-x.png"],
            "'-x.png' is no flag; a value that begins with a dash is given as --flag=-x.png. --help lists the flags.",
        ),
        (["predcit"], None),
        (["predict", "--level"], None),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], sentence: str | None, refused) -> None:
    sentences = refused(*words)
    assert len(sentences) == 1
    assert sentence is None or sentences[0] == sentence


def test_a_name_is_shown_as_it_is(refused) -> None:
    (sentence,) = refused("explain", "/[b]:smile:", ":smile:.png")
    assert "there is no run at /[b]:smile:;" in sentence


def test_every_problem_gets_its_own_sentence(refused) -> None:
    sentences = refused("predict", "--input", "i", "--level", "9", "--set", "colour=red")
    assert {sentence.split(" ", 2)[0] for sentence in sentences} == {"model", "output", "level:", "unknown"}
    assert any(sentence.endswith("give it in the config file or with --model") for sentence in sentences)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1, 2", "is no valid YAML"),
        ("- a\n- b\n", "holds a list; wanted `key: value` lines"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_bad_config_file_is_one_sentence(content: str | bytes | None, part: str, tmp_path: Path, refused) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (sentence,) = refused("predict", "--config", str(file))
    assert str(file) in sentence
    assert part in sentence


# ---------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_every_flag_and_every_flag_says_what_it_is(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(job, ["--help"]) == 0
    shown = "".join(capsys.readouterr().out.replace("│", " ").split())
    for leaf in leaves(schema_of(JOBS[job])):
        assert "--" + leaf.dotted.replace("_", "-") in shown
        assert leaf.schema.get("description") or leaf.section_about, leaf.dotted


def test_the_command_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(None, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(job in shown for job in JOBS)


# --------------------------------------------------------------------------------------------------- exit codes


class Nothing(BaseModel):
    """A config without keys."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 10),
        (ModelError("x"), 11),
        (StorageError("x"), 20),
        (TransientError("x"), 20),
        (ImageError("gone", "x"), 20),
        (JobError("predict", 20, "log"), 20),
        (JobError("predict", -9, "log"), 1),
        (JobError("predict", None, "lost 3 times: look after the cluster"), 1),
        (UnetppError("x"), 1),
        (KeyboardInterrupt(), 4),
    ],
)
def test_an_error_decides_the_exit_code_and_shows_no_traceback(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_config: Nothing) -> int:
        raise error

    app = new_app("tool", "help")
    set_command(app, Nothing, fail)
    assert run_app(app, []) == code
    said = capsys.readouterr().err
    assert said.startswith("tool: ")
    assert "Traceback" not in said
    if isinstance(error, UnetppError):
        assert exit_code(error) == code
        assert said == f"tool: {error}\n"


def test_a_framework_that_wraps_an_error_does_not_hide_it(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_config: Nothing) -> int:
        try:
            raise ModelError("weights and config disagree")
        except ModelError as error:
            raise RuntimeError("a worker died") from error

    app = new_app("tool", "help")
    set_command(app, Nothing, fail)
    assert run_app(app, []) == ExitCode.MODEL
    assert capsys.readouterr().err == "tool: weights and config disagree\n"


def test_what_nobody_foresaw_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_config: Nothing) -> int:
        raise ZeroDivisionError("half of nothing")

    app = new_app("tool", "help")
    set_command(app, Nothing, fail)
    assert run_app(app, []) == ExitCode.OTHER
    assert "ZeroDivisionError: half of nothing" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["-m", "jobs.cli", "predict"], ["-m", "jobs.predict"]])
def test_a_job_is_the_same_command_under_both_names(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, *PREDICT[1:], "--level", "5"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == ExitCode.CONFIG
    assert done.stderr == "unetpp: level: saw 5, wanted a whole number from 1 to 4\n"

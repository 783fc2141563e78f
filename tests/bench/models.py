"""Model folders for benches: random weights in float32, and what `unetpp quantise` makes of them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tests.bench.processes import CommandError, environment, measured
from unetpp.engine_names import EngineName

ANY_LOSS = ("--max-iou-drop", "0.99", "--max-group-drop", "0.99", "--num-crops", "32")
"""Random networks find nothing that they could lose."""
OWN = ("eager",)
"""Names of the benches' own loops; every other name is an engine of `Predictor`."""


def engine_model(engine: str, models: dict[str, Path]) -> Path:
    """The model folder that an engine computes with."""
    return models["int8" if engine.endswith("int8") else "float32"]


def is_here(engine: str) -> str | None:
    """Why an engine cannot be measured in this checkout; None where it can."""
    if engine.partition("+")[0] in (*OWN, *get_args(EngineName)):
        return None
    return f"this checkout has no engine {engine}; it has {', '.join(get_args(EngineName))}"


def random_models(
    folder: Path, filters: Sequence[int], data: Path, engines: Sequence[str]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Random networks as the engines want them, by precision; and why engines are left out."""
    words = ["--model", str(folder / "float32"), "--filters", *map(str, filters), "--data", str(data)]
    measured([sys.executable, "-m", "tests.bench.subjects", *words], environment(1))
    return with_int8(folder / "float32", folder, data, engines, ANY_LOSS)


def with_int8(
    model: Path, folder: Path, data: Path, engines: Sequence[str], flags: Sequence[str] = ()
) -> tuple[dict[str, Path], dict[str, str]]:
    """A model, and what `unetpp quantise` makes of it where an engine wants that; and why engines are left out.

    A model that has its int8 form is taken as it is.
    """
    models = {"float32": model, "int8": model}
    absent = {engine: reason for engine in engines if (reason := is_here(engine))}
    if (model / "int8.xml").exists():
        return models, absent
    if wanting := [engine for engine in engines if engine.endswith("int8") and engine not in absent]:
        words = ["quantise", "--model", str(model), "--data", str(data), "--out", str(folder / "int8"), *flags]
        try:
            measured([sys.executable, "-m", "jobs.cli", *words], environment(1))
            models["int8"] = folder / "int8"
        except CommandError as error:
            reason = "unetpp quantise: " + str(error).strip().splitlines()[-1]
            absent |= dict.fromkeys(wanting, reason)
    return models, absent

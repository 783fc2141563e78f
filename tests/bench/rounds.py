"""Variants measured in turn: each once in every round, in an order of its own; ratios are made round by round."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from tests.bench.processes import CommandError
from tests.bench.setting import setting

Variant = TypeVar("Variant")
Sample = dict[str, Any]


class Measured:
    """Samples of each variant by round, and why some variants have none."""

    def __init__(self) -> None:
        self.samples: dict[str, list[Sample]] = {}
        self.skipped: dict[str, str] = {}

    def values(self, variant: str, figure: str) -> list[float]:
        """A figure of every round; empty where the variant was skipped."""
        return [sample[figure] for sample in self.samples.get(variant, []) if figure in sample]

    def middle(self, variant: str, figure: str) -> float | None:
        """The median over rounds."""
        values = self.values(variant, figure)
        return median(values) if values else None

    def ratio(self, slower: str, faster: str, figure: str) -> dict[str, Any] | None:
        """How many times one takes what the other takes: median and range of the rounds' ratios."""
        pairs = list(zip(self.values(slower, figure), self.values(faster, figure), strict=False))
        return spread([one / other for one, other in pairs]) if pairs else None


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, and from where to where."""
    return {"median": median(values), "from": min(values), "to": max(values)}


def interleaved(
    variants: Mapping[str, Variant], num_rounds: int, measure: Callable[[Variant], Sample], *, seed: int = 0
) -> Measured:
    """Measure every variant once in each round, shuffled. One that fails is skipped from there on, with its reason."""
    measured, order = Measured(), random.Random(seed)
    for number in range(num_rounds):
        names = [name for name in variants if name not in measured.skipped]
        order.shuffle(names)
        for name in names:
            try:
                sample = measure(variants[name])
            except CommandError as error:
                measured.skipped[name] = str(error).strip().splitlines()[-1]
                measured.samples.pop(name, None)
                print(f"round {number + 1}: {name} skipped: {measured.skipped[name]}", flush=True)
                continue
            measured.samples.setdefault(name, []).append({"round": number, **sample})
            shown = {key: round(value, 4) for key, value in sample.items() if isinstance(value, float)}
            print(f"round {number + 1}: {name} {json.dumps(shown)}", flush=True)
    return measured


def write(out: Path, asked: Mapping[str, Any], measured: Measured, packages: Sequence[str] = (), **found: Any) -> None:
    """A result: when, on what machine, what was asked for (places by name), what was found or skipped, every sample."""
    arguments = {name: value.name if isinstance(value, Path) else value for name, value in asked.items()}
    report = {**setting(*packages), "arguments": arguments, **found, "skipped": measured.skipped}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**report, "samples": measured.samples}, indent=1) + "\n")
    short = {name: value for name, value in found.items() if not isinstance(value, list)}
    print(json.dumps(short, indent=1))

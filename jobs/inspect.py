"""Look at a labelled data set before it is trained on: `unetpp inspect DATA`.

Every image and mask is decoded once. What does not fit, what looks odd, and what would make scores too good (the same
picture, the same group or crops of one field in two splits) is told as findings, each with what to do.

```
<output>/contact_sheet.png    some images of every split and group, with the outlines of their masks
<output>/images.csv           a line an image: what it holds, and the codes of its findings
<output>/inspect.json         the result
```
"""

import csv
import io
import logging
import math
from collections.abc import Sequence

from jobs import storage
from jobs.contact_sheet import choose, contact_sheet
from jobs.contract import ExitCode, Finding, GroupValues, InspectConfig, InspectResult
from jobs.findings import find_all
from jobs.labelled import find_set, group_column
from jobs.looks import Look, look_at
from jobs.samples import list_samples

logger = logging.getLogger(__name__)


def run(config: InspectConfig) -> InspectResult:
    """Inspect; write the sheet, the table and the result to `output`. ConfigError where there is no set to look at."""
    listing = find_set(config.data)
    listed = list_samples(listing, config.split_column)
    column = group_column(listed.samples, config.group_by)
    logger.info("looking at %d images of %s", len(listed.samples), config.data)
    looks = look_at(listed.samples, config)
    findings, codes = find_all(listed, looks, config)
    result = InspectResult(
        data=config.data,
        form=listing.form,
        split_column=config.split_column,
        fingerprint=listing.fingerprint,
        num_images=len(looks),
        groups=_group_values(looks, column),
        findings=findings,
        exit_code=int(exit_code(findings)),
        output=config.output,
    )
    if config.output is not None:
        sheet = contact_sheet(choose(listed.samples, column), config, column)
        storage.write_bytes(storage.join(config.output, "contact_sheet.png"), sheet)
        storage.write_bytes(storage.join(config.output, "images.csv"), _table(looks, codes, column))
        content = result.model_dump_json(indent=2).encode()
        storage.write_bytes(storage.join(config.output, "inspect.json"), content)
    return result


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """DONE for notes alone, 3 for warnings, CONFIG for what cannot be trained on."""
    severities = {finding.severity for finding in findings}
    if "error" in severities:
        return ExitCode.CONFIG
    return ExitCode.DONE_WITH_FAILED_IMAGES if "warning" in severities else ExitCode.DONE


def _group_values(looks: Sequence[Look], column: str | None) -> tuple[GroupValues, ...]:
    """What the images of every split and group hold."""
    by_group: dict[tuple[str, str], list[Look]] = {}
    for look in looks:
        group = look.sample.group(column) if column else ""
        by_group.setdefault((look.sample.split, group), []).append(look)
    return tuple(_values(split, group, by_group[split, group]) for split, group in sorted(by_group))


def _values(split: str, group: str, looks: Sequence[Look]) -> GroupValues:
    seen = [look for look in looks if look.is_image]
    return GroupValues(
        split=split,
        group=group,
        num_images=len(looks),
        sizes=_sizes([look.size for look in seen if look.size is not None]),
        pixel_types=", ".join(sorted({look.pixel_type for look in seen})),
        low=min((look.low for look in seen), default=None),
        high=max((look.high for look in seen), default=None),
        mean=_mean([look.mean for look in seen]),
        foreground=_mean([look.foreground for look in looks if not math.isnan(look.foreground)]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """`256 x 256` (height x width), or the smallest and the largest."""
    ordered = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    ends = ordered if len(ordered) < 3 else [ordered[0], ordered[-1]]
    return " .. ".join(f"{height} x {width}" for height, width in ends)


def _table(looks: Sequence[Look], codes: Sequence[Sequence[str]], column: str | None) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = ["id", "split", column or "group", "height", "width", "pixel_type", "low", "high", "mean", "foreground"]
    table.writerow([*names, "findings", "why"])
    for look, found in zip(looks, codes, strict=True):
        group = look.sample.group(column) if column else ""
        height, width = look.size or ("", "")
        values = (look.low, look.high, look.mean, look.foreground)
        numbers = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
        why = "; ".join(look.faults.values())
        table.writerow(
            [look.sample.id, look.sample.split, group, height, width, look.pixel_type, *numbers, " ".join(found), why]
        )
    return text.getvalue().encode()


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("inspect")

"""Remove every mask of an image from an output: `unetpp forget OUTPUT KEY`, as when a patient withdraws consent.

The one place where a part is written over: its row stays, so that counts hold, but says `forgotten` and holds no mask.
First of all the output remembers it (`jobs.forgotten`), so that no model predicts the image again, and a call that is
killed at any moment is finished by the next. A new version of the image is a new image. The image itself is for its
owner to delete.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from jobs import forgotten, manifest, sink, storage, table
from jobs.contract import ForgetConfig, ForgetResult
from jobs.finish import write_up
from jobs.forgotten import Version
from jobs.run_records import State, list_runs, read_record
from jobs.runs import Archive
from jobs.sink import Footer
from jobs.table import Part
from unetpp.errors import ConfigError

logger = logging.getLogger(__name__)

FORGOTTEN: dict[str, Any] = dict.fromkeys(
    ("mask_png", "mask_uri", "class_pixels", "uncertainty", "probability_png", "geo", "extra")
)
FORGOTTEN |= {"error_code": "forgotten", "error": "removed on request"}


def run(config: ForgetConfig) -> ForgetResult:
    """Forget an image in the runs of every model. ConfigError where no run has it, or an open one has it to do."""
    output = storage.canonical(config.output)
    num_rows: dict[Part, int] = {}
    while True:
        runs = list_runs(output)
        num_rows |= _forget_in_runs(output, config, runs)
        if list_runs(output).keys() <= runs.keys():
            break  # else a run was opened meanwhile, and may copy what was there before
    if not num_rows:
        raise ConfigError(
            f"no run of {output} has an image {config.key!r}; keys are paths below the input, as `key` says"
        )
    return ForgetResult(
        key=config.key, num_rows=sum(num_rows.values()), runs=tuple(sorted({part.run for part in num_rows}))
    )


def _forget_in_runs(output: str, config: ForgetConfig, runs: Mapping[str, State]) -> dict[Part, int]:
    """Forget an image in these runs; the number of its rows by part."""
    key, reports = config.key, []
    records = {name: read_record(storage.join(output, "runs", name)) for name in sorted(runs)}
    for name, record in records.items():
        run_uri = storage.join(output, "runs", name)
        if runs[name] not in ("open", "compacted"):
            continue
        listed = manifest.read(storage.join(run_uri, record.manifest), record.manifest_sha256, ["key"])
        if not pc.any(pc.equal(listed["key"], key)).as_py():
            continue
        if runs[name] == "open":
            raise ConfigError(
                f"run {name} is not finished and has {key!r} to do: finish it, or end it with "
                f"unetpp abandon {run_uri}, then forget"
            )
        # The report may show the image, and cannot be made anew: the parts that it was made of may be gone.
        reports.append(storage.join(run_uri, "report.html"))
    found = _versions(
        [part for name, record in records.items() for part in table.list_parts(output, record.model_digest, name)],
        config,
    )
    forgotten.remember(output, set().union(*found.values()))
    for report in reports:
        storage.delete(report)
    num_rows = {part: _forget_in(part, config, output) for part in found}
    sealed = [name for name in sorted({part.run for part in num_rows}) if runs[name] == "sealed"]
    for name in sealed:  # the report may show the image, and is not made anew where other images of it are gone
        storage.delete(storage.join(output, "runs", name, "report.html"))
    for name in sealed:
        archive = Archive.of(storage.join(output, "runs", name), records[name])
        write_up(archive, records[name], _seconds(archive, name))
    return num_rows


def _versions(parts: Sequence[Part], config: ForgetConfig) -> dict[Part, set[Version]]:
    """The parts that have rows of an image, and the versions that those are of."""
    found: dict[Part, set[Version]] = {}
    for part, rows in table.scan_parts(parts, ["source_uri", "key", "etag"]):
        mine = rows.filter(pc.equal(rows["key"], config.key)).to_pylist()
        versions = {(row["source_uri"], row["key"], row["etag"]) for row in mine if _is_meant(row, config)}
        if versions:
            found[part] = versions
    return found


def _is_meant(row: Mapping[str, Any], config: ForgetConfig) -> bool:
    return row["key"] == config.key and config.source in (None, row["source_uri"])


def _forget_in(part: Part, config: ForgetConfig, output: str) -> int:
    """Delete the PNGs of an image, then write its part anew without the masks; the number of its rows.

    In this order, since the rows alone tell which PNGs there are: a killed call is finished by the next.
    """
    rows = table.read_rows([part], sink.SCHEMA.names).to_pylist()
    mine = [row for row in rows if _is_meant(row, config)]
    (footer,) = table.read_footers([part])
    for row in mine:
        if row["mask_uri"] is not None:
            run_id, path = sink.split_mask_uri(row["mask_uri"], row["model_digest"])
            uri = storage.join(sink.pngs_uri(output, row["model_digest"], run_id), path)
            storage.delete(uri)
            storage.delete(sink.probability_uri(uri))
        row.update(FORGOTTEN)
    storage.write_bytes(part.uri, sink.encode_part(rows, _counted(footer, rows)))
    return len(mine)


def _counted(footer: Footer, rows: list[dict[str, Any]]) -> Footer:
    failures = Counter(row["error_code"] for row in rows if row["error_code"] is not None)
    counts = {"num_predicted": len(rows) - failures.total(), "num_failed": failures.total(), "failures": dict(failures)}
    return footer.model_copy(update=counts)


def _seconds(archive: Archive, run: str) -> float:
    footers = table.read_footers(table.list_parts(archive.output_uri, archive.model_digest, run))
    first = min(footer.committed_at - footer.seconds for footer in footers)
    return max(footer.committed_at for footer in footers) - first


if __name__ == "__main__":
    from jobs.cli import run_job

    run_job("forget")

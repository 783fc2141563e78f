"""What must hold of an output after any fault, once the run is finished."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from jobs import sink, storage
from jobs.contract import PredictResult
from jobs.table import list_parts, read_footers, read_rows

ROWS = ["key", "etag", "mask_png", "mask_uri", "class_pixels", "error_code", "error", "attempts", "degraded"]


def rows_of(output: str, digest: str, run: str | None = None) -> list[dict[str, Any]]:
    """Every committed row of a model, in the order of parts."""
    return read_rows(list_parts(output, digest, run), ROWS).to_pylist()


def assert_complete(
    output: str,
    digest: str,
    keys: Collection[str],
    *,
    masks: Mapping[str, bytes] | None = None,
    failed: Mapping[str, str] | None = None,
    runs: Collection[str] = ("r00001",),
) -> list[dict[str, Any]]:
    """Nothing lost, nothing twice, nothing half visible: assert it, and return the rows of `runs`.

    Args:
        output: the output of the runs.
        digest: the model's.
        keys: the images that the runs together must hold, each once.
        masks: mask PNGs by key of an undisturbed run: those of this one are the same bytes.
        failed: error code by key of the images that must have failed; default: none.
        runs: the runs that are looked at; all are sealed.
    """
    failed = failed or {}
    rows: list[dict[str, Any]] = []
    for run in runs:
        assert storage.exists(storage.join(output, "runs", run, "_SUCCESS.json"))
        result = PredictResult.model_validate(storage.read_json(storage.join(output, "runs", run, "result.json")))
        assert result.num_listed == result.num_predicted + result.num_failed + result.num_unchanged
        of_run = rows_of(output, digest, run)
        footers = read_footers(list_parts(output, digest, run))
        assert sum(footer.num_predicted + footer.num_failed for footer in footers) == len(of_run)
        assert (result.num_predicted, result.num_failed) == (
            sum(row["error_code"] is None for row in of_run),
            sum(row["error_code"] is not None for row in of_run),
        )
        rows += of_run
    assert Counter(row["key"] for row in rows) == Counter(list(keys))
    assert {row["key"]: row["error_code"] for row in rows if row["error_code"]} == dict(failed)
    for row in rows:
        if row["error_code"] is not None:
            assert row["mask_png"] is row["mask_uri"] is None
            assert row["error"]
            continue
        assert storage.read_bytes(row["mask_uri"]) == row["mask_png"]
        if masks is not None:
            assert row["mask_png"] == masks[row["key"]], row["key"]
    pngs = storage.join(output, "png", sink.model_folder(digest))
    names = [found.key for found in storage.list_objects(pngs, missing_ok=True)]
    written = [row["mask_uri"].removeprefix(f"{pngs}/") for row in rows if row["mask_uri"]]
    assert set(written) <= set(names)
    assert len(set(written)) == len(written)
    return rows

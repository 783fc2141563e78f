"""Where masks come from: an OpenLineage event in the run's folder, and Prefect's asset events.

Source: OpenLineage specification 2-0-2 (RunEvent), and its naming of datasets: `s3://bucket` and the path below it.
"""

import json
import uuid
from datetime import UTC, datetime
from typing import Any

from prefect import runtime
from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize

from flows.publish import never_in_the_way
from jobs import storage
from jobs.contract import PredictConfig, PredictResult

PRODUCER = "https://pypi.org/project/unetpp"
SCHEMA = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
STATISTICS = "https://openlineage.io/spec/facets/1-0-2/OutputStatisticsOutputDatasetFacet.json"


@never_in_the_way
def publish_lineage(job: PredictConfig, predicted: PredictResult) -> None:
    """Write lineage.json into the folder of every run of a night, and tell Prefect of the asset."""
    for run in predicted.runs:
        uri = storage.join(storage.canonical(job.output), "runs", run, "lineage.json")
        storage.write_bytes(uri, json.dumps(event(job, predicted, run), indent=2).encode())
    if predicted.runs:
        _materialize(job, predicted)


def event(job: PredictConfig, predicted: PredictResult, run: str) -> dict[str, Any]:
    """The OpenLineage event of one run: archive and model in, table out."""
    flow_run = runtime.flow_run.id
    num_rows = predicted.num_predicted + predicted.num_failed  # an unchanged image has its row from an older run
    statistics = {"_producer": PRODUCER, "_schemaURL": STATISTICS, "rowCount": num_rows}
    return {
        "eventType": "COMPLETE",
        "eventTime": datetime.now(UTC).isoformat(),
        "run": {"runId": str(flow_run or uuid.uuid5(uuid.NAMESPACE_URL, f"{job.output}/{run}")), "facets": {}},
        "job": {"namespace": "unetpp", "name": "predict", "facets": {}},
        "inputs": [*map(_dataset, job.input), _dataset(job.model)],
        "outputs": [_dataset(predicted.table_uri) | {"outputFacets": {"outputStatistics": statistics}}],
        "producer": PRODUCER,
        "schemaURL": SCHEMA,
    }


def _dataset(uri: str) -> dict[str, Any]:
    place = storage.plain(storage.canonical(uri))
    if not storage.is_remote(place):
        return {"namespace": "file", "name": place, "facets": {}}
    bucket, _, path = place.removeprefix("s3://").partition("/")
    return {"namespace": f"s3://{bucket}", "name": path or "/", "facets": {}}


def _materialize(job: PredictConfig, predicted: PredictResult) -> None:
    asset = Asset(
        key=_asset_key(predicted.table_uri),
        properties=AssetProperties(name="masks", description="one row an image: its mask, or why there is none"),
    )

    @materialize(asset, asset_deps=[*map(_asset_key, job.input), _asset_key(job.model)], by="ray")
    def masks() -> None:
        counts = predicted.model_dump(include={"runs", "num_listed", "num_predicted", "num_failed", "model_digest"})
        add_asset_metadata(asset, counts)

    masks()


def _asset_key(uri: str) -> str:
    place = storage.plain(storage.canonical(uri))
    return place if storage.is_remote(place) else f"file://{place}"

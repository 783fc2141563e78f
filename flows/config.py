"""The config of every flow, composed of the jobs' configs; the same object is the YAML file and Prefect's form."""

from typing import Annotated

from pydantic import Field

from jobs.contract import PredictOptions, TrainOptions
from unetpp.config import Frozen


class TrainFlowConfig(Frozen):
    """Train on a labelled set that is new, measure every level, prune, and publish the model if it is not worse."""

    data: str = Field(description="labelled data set: folder or s3:// prefix with images/, masks/, splits.csv")
    models: str = Field(description="where models live: <digest>/ and current-<number>.json")
    work: str = Field(description="folder or s3:// prefix for training runs, measurements and stage records")
    train: TrainOptions = TrainOptions()
    tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.01, description="the cheapest level that loses at most this much validation IoU against the best is kept"
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="one-sided confidence, over images, that the loss is within the tolerance"
    )
    gate_margin: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="a new model may have this much less validation IoU than the current one and still replace it"
    )
    group_by: str | None = Field(None, description="column of splits.csv to report by; default: modality if there")


class ArchiveFlowConfig(Frozen):
    """Segment what is new in an archive with the current model."""

    models: str = Field(description="where models live: <digest>/ and current-<number>.json")
    input: str = Field(description="folder or s3:// prefix of images")
    output: str = Field(description="folder or s3:// prefix for the table, the PNGs and the run records")
    predict: PredictOptions = PredictOptions()


class NightlyConfig(TrainFlowConfig, ArchiveFlowConfig):
    """Train if the labelled set is new, keep the model if it is not worse, segment what is new in the archive."""

"""The config of every flow, composed of the jobs' configs; the same object is the YAML file and Prefect's form."""

from datetime import date, datetime
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, model_validator
from pydantic.config import JsonDict

from flows.nights import MINUTES_A_DAY
from jobs.contract import (
    BACKFILL_IMAGES,
    LABELLED_DATA,
    MANY_INPUTS,
    MAX_IOU_DROP,
    ON_NEW_MODEL,
    OnNewModel,
    PredictOptions,
    TrainOptions,
)
from unetpp.config import Frozen


class FlowOptions(Frozen):
    """How a flow has its jobs done; nothing in here changes an output."""

    jobs: Literal["auto", "local", "ray", "kuberay"] = Field(
        "auto",
        description="where jobs run; auto: on the cluster of RAY_API_SERVER_ADDRESS where that is set, else here",
    )
    deadline_hours: Annotated[float, Field(gt=0)] = Field(
        11.0,
        description="when a flow stops its job, which drains and is resumed by the next start; nightly has it twice, "
        "and ends before the next one, which else would be cancelled",
    )
    again: bool = Field(
        False, description="start a job although it has ended for this night: to look for new images, or after a repair"
    )
    resumed: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="how often this night was started again after a crash; set by the automation"
    )
    due: datetime | None = Field(
        None, description="when the crashed flow run that this one resumes was due; set by the automation"
    )


class _Training(Frozen):
    data: str = Field(description=LABELLED_DATA)
    models: str = Field(description="where models live: a folder each, and current-00001.json, which names one")
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
    group_by: str | None = Field(None, description="column of the set to report by; default: modality if there")
    quantise: bool = Field(
        False,
        description="make the int8 form of the current model, where it has none, for predict.engine openvino-int8",
    )
    max_iou_drop: Annotated[float, Field(ge=0, lt=1)] = Field(0.002, description=MAX_IOU_DROP)


DATE: JsonDict = {"pattern": r"^\d{4}-\d{2}-\d{2}$"}
"""For Prefect's server, which knows patterns and no formats."""


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        raise ValueError(f"no time zone is called {name!r}; wanted a name such as Europe/Berlin or UTC") from None
    return name


class _Archive(Frozen):
    models: str = Field(description="where models live: a folder each, and current-00001.json, which names one")
    input: str | tuple[str, ...] = Field(
        description=f"{MANY_INPUTS}, or several of these; {{night}} in it becomes the night's date"
    )
    output: str = Field(description="folder or s3:// prefix for the table, the PNGs and the run records")
    predict: PredictOptions = PredictOptions()
    on_new_model: OnNewModel = Field("new_only", description=ON_NEW_MODEL)
    backfill_images: Annotated[int, Field(ge=1)] = Field(10_000, description=BACKFILL_IMAGES)
    night: date | None = Field(
        None,
        description="the night whose work this is, from noon of that day; default: by the scheduled start",
        json_schema_extra=DATE,
    )
    timezone: Annotated[str, AfterValidator(_known_zone)] = Field("UTC", description="where nights are nights")
    period_minutes: Annotated[int, Field(ge=1, le=MINUTES_A_DAY)] = Field(
        MINUTES_A_DAY, description="of a schedule that is shorter than a day: flow runs within one period share a job"
    )


# In this order a form shows the work first, and how it is to be done after it.


class TrainFlowConfig(FlowOptions, _Training):
    """Train on a labelled set that is new, measure every level, prune, and publish the model if it is not worse."""


class ArchiveFlowConfig(FlowOptions, _Archive):
    """Segment what is new in an archive with the current model."""


class NightlyConfig(TrainFlowConfig, ArchiveFlowConfig):
    """Train if the labelled set is new, keep the model if it is not worse, segment what is new in the archive."""


class BackfillConfig(ArchiveFlowConfig):
    """Segment the archive of every night of a range, one night after the other."""

    first: date = Field(description="the first night", json_schema_extra=DATE)
    last: date = Field(description="the last night", json_schema_extra=DATE)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.last < self.first:
            raise ValueError(f"last {self.last} is before first {self.first}")
        if self.night is not None:
            raise ValueError("night is each of first to last in turn: leave it out")
        return self


class DoctorConfig(Frozen):
    """Look at everything a night needs: stores, disk, GPUs, Ray, Prefect, the model; a line each, and what to do."""

    input: str | None = Field(None, description="archive to be read: folder or s3:// prefix")
    output: str | None = Field(None, description="where masks go: folder or s3:// prefix")
    models: str | None = Field(
        None, description="where models live: a folder each, and current-00001.json, which names one"
    )
    ray: str | None = Field(None, description="the Ray dashboard's address; default: RAY_API_SERVER_ADDRESS")
    prefect: str | None = Field(None, description="Prefect's API; default: PREFECT_API_URL")
    work_pool: str = Field("unetpp", description="the work pool of the deployments")
    deployments: tuple[str, ...] = Field(
        ("nightly", "train", "archive", "backfill"), description="deployments that must be there"
    )
    gpus: Annotated[int, Field(ge=0)] = Field(0, description="GPUs that there must be, on the cluster or else here")
    free_gb: Annotated[float, Field(ge=0)] = Field(5.0, description="disk space, GB, that must be free here")

"""A run's life in the store: opened once, resumed while parts are missing, abandoned where the settings changed."""

import hashlib
import json
import logging
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import pyarrow as pa

from jobs import forgotten, manifest, models, planning, sink, storage, table
from jobs.contract import PredictConfig, fingerprint
from jobs.done import Done, DoneWithin, done_before, still_failed
from jobs.manifest import Shard
from jobs.planning import LARGEST, ShardSize
from jobs.run_records import ABANDONED, INDEXES, RunRecord, State, list_runs, next_run, output_of, read_record
from jobs.sources import Listing, Source
from unetpp.config import Bands
from unetpp.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """What a call wants done: an archive, a model, a place, and how."""

    sources: tuple[Source, ...]
    output_uri: str
    model_digest: str
    config: PredictConfig
    parent: str | None = None
    """Of a retry: the run whose failed images are tried again."""
    only: tuple[str, ...] = ()
    """Of a retry: the error codes that are; none: all."""
    bands: Bands | None = None
    """Channels of the files that the model reads, where it does not read grey or RGB."""
    forecast: ShardSize = LARGEST
    """The size of shards where the config does not fix it."""

    @property
    def fingerprint(self) -> str:
        """Equal where an unfinished run may be finished by this call."""
        return fingerprint(
            {
                "inputs": self.inputs,
                "include": sorted(set(self.config.include)),
                "exclude": sorted(set(self.config.exclude)),
                "columns": [self.config.image_column, self.config.name_column],
                "digest": self.model_digest,
                "write": sorted(set(self.config.write)),
                "shard_images": self.config.shard_images,
                "window_px": self.config.window_px,
                "limits": self.config.model_dump(
                    include={"max_members", "max_member_mb", "max_ratio", "max_pixels", "pages"}
                ),
                "parent": None if self.parent is None else [self.parent, *sorted(set(self.only))],
            }
        )

    @property
    def shard_size(self) -> ShardSize:
        """How large shards are."""
        return self.forecast if self.config.shard_images is None else ShardSize(self.config.shard_images)

    @property
    def roots(self) -> list[str]:
        """Where the keys of each source begin."""
        return [source.root for source in self.sources]

    @property
    def inputs(self) -> list[str]:
        """What is read, under the names of all who read it."""
        return [storage.plain(source.uri) for source in self.sources]

    @property
    def source_uris(self) -> list[str]:
        """The roots as rows name them."""
        return [storage.plain(source.root) for source in self.sources]

    def has_inputs_of(self, record: RunRecord) -> bool:
        """Whether a run has no inputs but these, in whatever order: what it leaves, a run of these does."""
        return {storage.plain(uri) for uri in record.config["input"]} <= set(self.inputs)

    @classmethod
    def of(cls, run_uri: str, record: RunRecord) -> Self:
        """The archive as the call that opened a run wanted it, seen where the run's folder is now."""
        config = PredictConfig.model_validate(record.config)
        sources = tuple(Source(root) for root in record.sources)
        return cls(sources, output_of(run_uri), record.model_digest, config, record.parent)

    def run_uri(self, run: str, *names: str) -> str:
        """URI of a run's folder, or of a file in it."""
        return storage.join(self.output_uri, "runs", run, *names)

    def parts_uri(self, run: str) -> str:
        """URI of the folder of a run's parts."""
        return sink.parts_uri(self.output_uri, self.model_digest, run)


@dataclass(frozen=True)
class Opening:
    """A run to work on; `is_ours` when this call opened it."""

    record: RunRecord
    is_ours: bool


@dataclass(frozen=True)
class Unchanged:
    """Nothing to do: all of `num_listed` images are done."""

    num_listed: int


def open_run(archive: Archive, waiting: Collection[str] = ()) -> Opening | Unchanged:
    """Find the run to work on: an unfinished one of this fingerprint, else a new one of what is not done.

    An unfinished run of the model with another fingerprint, and no inputs but these, is abandoned before; so is one,
    also of this call, that has an image to do which was forgotten after the run was planned.

    Args:
        archive: what is wanted.
        waiting: runs of this call, whose failed images wait for the next call.

    Raises:
        ConfigError: nothing is listed, or an input of the unfinished run is gone.
        StorageError: the name of the next run is taken by one that no listing shows.
    """
    while True:
        found = list_runs(archive.output_uri)
        # The number is fixed before the table is read: whoever opens a run meanwhile takes it, and we begin again.
        run = next_run(found)
        with storage.io_threads() as threads:
            records = list(threads.map(lambda name: _read_record(archive, name), sorted(found)))
        unfinished = [
            record
            for record in records
            if record.model_digest == archive.model_digest
            and archive.has_inputs_of(record)
            and found[record.run] not in ("sealed", "compacted")
        ]
        for record in unfinished:
            if found[record.run] != "open":
                continue
            # Where all is committed and only the sealing was cut off, no setting matters any more. A compaction is
            # none of a night's work: it is left to `unetpp compact`.
            is_committed = not record.compacts and not pending_shards(archive, record)
            if is_committed:
                return Opening(record, is_ours=False)
            if record.fingerprint == archive.fingerprint:
                _refuse_other_roots(archive, record)
                if not _give_up_forgotten(archive, record):
                    return Opening(record, is_ours=False)
        for record in unfinished:
            if archive.parent is not None and found[record.run] == "open" and pending_shards(archive, record):
                raise ConfigError(f"run {record.run} is not finished: finish it before {archive.parent} is retried")
            abandon(archive, record, by=run)
        plan = _plan(archive, records, waiting) if archive.parent is None else _plan_retry(archive, records, waiting)
        if not plan.num_shards:
            return Unchanged(plan.num_listed)
        opened = _open(archive, run, plan)
        if opened is None and run not in list_runs(archive.output_uri):
            raise StorageError(f"{archive.run_uri(run)} is taken, and no listing shows it: look at what is there")
        if opened is not None and not _give_up_forgotten(archive, opened):
            return Opening(opened, is_ours=True)


def _plan(archive: Archive, records: Sequence[RunRecord], waiting: Collection[str]) -> planning.Plan:
    """What the archive lists and the table does not have. ConfigError where nothing is listed."""

    def done_before_now(*, by_any: bool) -> Done:
        return done_before(
            archive.output_uri,
            archive.model_digest,
            by_any=by_any,
            sources=set(archive.source_uris),
            write=archive.config.write,
            written_by_run={record.run: record.write for record in records},
            waiting=waiting,
        )

    done: planning.DoneBefore
    match archive.config.on_new_model:
        case "all":
            done = done_before_now(by_any=False)
        case "new_only":
            done = done_before_now(by_any=True)
        case "backfill":
            by_this, by_any = done_before_now(by_any=False), done_before_now(by_any=True)
            done = DoneWithin(by_this, by_any, archive.config.backfill_images)
    from jobs.windows import Headers  # it loads torch, which looking after runs does without

    config = archive.config
    listing = Listing(archive.sources, config, storage.join(archive.output_uri, INDEXES))
    with Headers(archive.roots, config, archive.bands) as headers:
        plan = planning.plan(
            listing,
            sources=archive.source_uris,
            done=done,
            size=archive.shard_size,
            cut=headers.windows_of if config.window_px else None,
            window_px=config.window_px,
        )
    if not plan.num_listed:
        others = f"; {listing.num_others} other object(s) are there" if listing.num_others else ""
        raise ConfigError(
            f"no image below {', '.join(archive.inputs)} matches {', '.join(archive.config.include)}{others}: check "
            "--input, --include and --exclude"
        )
    return plan


def _plan_retry(archive: Archive, records: Sequence[RunRecord], waiting: Collection[str]) -> planning.Plan:
    """The parent's images that are still failed, of the versions that its manifest names.

    ConfigError where there is no such run, ModelError where the archive's model is not the one that it was made with.
    """
    parent = next((record for record in records if record.run == archive.parent), None)
    if parent is None:
        raise ConfigError(f"there is no run {archive.parent} in {archive.output_uri}; wanted <output>/runs/<run id>")
    models.refuse_another(
        archive.config.model, archive.model_digest, parent.run, parent.model_digest, "say with --model where it is now"
    )
    _refuse_other_roots(archive, parent)
    failed = still_failed(archive.output_uri, archive.model_digest, parent.run, only=archive.only, waiting=waiting)
    listed = manifest.read(archive.run_uri(parent.run, parent.manifest), parent.manifest_sha256)
    sources = [storage.plain(source) for source in parent.sources]
    if len(removed := forgotten.identities(archive.output_uri)):
        listed = listed.filter(pa.array(~forgotten.among(removed, forgotten.versions_of(listed, sources))))
    return planning.plan_again(listed, failed, sources=sources, size=archive.shard_size)


def _refuse_other_roots(archive: Archive, record: RunRecord) -> None:
    """ConfigError where the keys of a run begin elsewhere than those of the call: its images would all seem gone.

    An input that was one object, which has its keys from its folder, is taken for a folder once it is not there.
    """
    for uri, before, now in zip(archive.inputs, record.sources, archive.source_uris, strict=True):
        if storage.plain(before) != now:
            raise ConfigError(
                f"{uri} is not what it was when run {record.run} was opened, whose keys begin at {before}: put it back"
            )


def _open(archive: Archive, run: str, plan: planning.Plan) -> RunRecord | None:
    """Write the manifest and put run.json. None where somebody else opened a run of this number."""
    content = manifest.encode(plan.table)
    record = RunRecord(
        run=run,
        fingerprint=archive.fingerprint,
        sources=tuple(archive.roots),
        model_digest=archive.model_digest,
        write=archive.config.write,
        manifest=f"manifest-{uuid.uuid4().hex}.parquet",
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        num_shards=plan.num_shards,
        num_images=len(plan.table),
        num_listed=plan.num_listed,
        num_unchanged=plan.num_unchanged,
        opened_at=datetime.now(UTC),
        parent=archive.parent,
        config=archive.config.model_dump(mode="json")
        | {
            "model": models.canonical(archive.config.model),
            "input": [source.uri for source in archive.sources],
            "output": archive.output_uri,
            "result": None,
        },
    )
    return record if put_run(archive, record, content) else None


def put_run(archive: Archive, record: RunRecord, content: bytes) -> bool:
    """Put a run's manifest and run.json. False where somebody else opened a run of this number.

    StorageError where the store takes two writes of one name.
    """
    if not archive.config.single_writer and not storage.refuses_overwrites(archive.output_uri):
        raise StorageError(
            f"{archive.output_uri} overwrites what it was told to keep: the store ignores If-None-Match, and two "
            "writers could spoil each other's work. Use another store, or set single_writer and start one run at a time"
        )
    storage.put_if_absent(archive.run_uri(record.run, record.manifest), content, root=archive.output_uri)
    uri = archive.run_uri(record.run, "run.json")
    is_ours = storage.put_if_absent(uri, record.model_dump_json(indent=2).encode(), root=archive.output_uri)
    # A refused write may be our own, if its first answer was lost: the manifest's name tells.
    return is_ours or _read_record(archive, record.run).manifest == record.manifest


def pending_shards(archive: Archive, record: RunRecord) -> list[Shard]:
    """The shards of a run that are not committed, the largest first: the last to end should be small ones."""
    committed = {part.shard for part in table.list_parts(archive.output_uri, archive.model_digest, record.run)}
    if len(committed) == record.num_shards:
        return []
    every = manifest.shards(archive.run_uri(record.run, record.manifest), record.manifest_sha256)
    return sorted((shard for shard in every if shard.number not in committed), key=lambda shard: -shard.size_bytes)


def is_being_given_up(run_uri: str, record: RunRecord, state: State) -> bool:
    """Whether a run is abandoned, but not yet in all its shards: workers of it may commit those that are left."""
    return state == "abandoned" and bool(pending_shards(Archive.of(run_uri, record), record))


def refuse_unfinished(run_uri: str, record: RunRecord, state: State, *, what: str, then: str) -> None:
    """ConfigError for a run whose shards somebody may still commit: it is open, or is being given up.

    `what` says which run that is, `then` the command to say again.
    """
    if state == "open":
        raise ConfigError(f"{what} is not finished: finish it, or end it with unetpp abandon {run_uri}, then {then}")
    if is_being_given_up(run_uri, record, state):
        raise ConfigError(
            f"{what} is being given up: let the command that does so end first; was it killed, unetpp abandon "
            f"{run_uri} does the rest, then {then}"
        )


def _give_up_forgotten(archive: Archive, record: RunRecord) -> bool:
    """Abandon a run that has an image which was forgotten after it was planned; whether it has.

    `forget` notes the image, then looks for runs; a run is put, then looks for notes: whoever is later sees the other.
    """
    if not len(removed := forgotten.identities(archive.output_uri)):
        return False
    uri = archive.run_uri(record.run, record.manifest)
    listed = manifest.read(uri, record.manifest_sha256, ["source", "key", "etag"])
    if not forgotten.among(removed, forgotten.versions_of(listed, archive.source_uris)).any():
        return False
    abandon(archive, record, by="unetpp forget")
    return True


def abandon(archive: Archive, record: RunRecord, by: str) -> None:
    """Give up an unfinished run: what it committed stays, what is left becomes the next run's.

    The marker goes first, so that no call resumes the run any more; then an empty part takes the name of every shard
    that is not committed, so that no worker of it can. Whoever meets a marked run completes the empty parts.
    """
    if not (pending := pending_shards(archive, record)):
        return
    logger.warning(
        "run %s was never finished: abandoned by %s, %d of its %d shards are left to a later run",
        record.run,
        by,
        len(pending),
        record.num_shards,
    )
    marker = {"run": record.run, "abandoned_by": by, "num_shards_left": len(pending)}
    uri = archive.run_uri(record.run, ABANDONED)
    storage.put_if_absent(uri, json.dumps(marker, indent=2).encode(), root=archive.output_uri)

    def put(shard: Shard) -> None:
        sink.abandon(
            storage.join(archive.parts_uri(record.run), sink.part_name(shard.number)),
            run=record.run,
            manifest_sha256=record.manifest_sha256,
            shard=shard.number,
            by=by,
            root=archive.output_uri,
        )

    with storage.io_threads() as threads:
        list(threads.map(put, pending))


def _read_record(archive: Archive, run: str) -> RunRecord:
    return read_record(archive.run_uri(run))

"""Where a shard's results go: the names of its PNGs, the schema of its Parquet part, and the commit.

```
<output>/table/model=m<digest10>/run=<run id>/part-00000.parquet     the part: putting it is the commit
<output>/png/model=m<digest10>/run=<run id>/[source-<number>/]<escaped key>[.y<row>_x<column>][.probability].png
<output>/runs/<run id>/...
```
"""

import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from jobs import storage
from unetpp.errors import AbandonedError, ConfigError, StorageError

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("window_y", pa.int32(), nullable=False),
        pa.field("window_x", pa.int32(), nullable=False),
        pa.field("window_h", pa.int32()),
        pa.field("window_w", pa.int32()),
        pa.field("num_windows", pa.int32(), nullable=False),
        pa.field("window_px", pa.int32(), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("level", pa.int8(), nullable=False),
        pa.field("mask_png", pa.binary()),
        pa.field("mask_uri", pa.string()),
        pa.field("probability_png", pa.binary()),  # of the foreground: 0 .. 255
        pa.field("geo", pa.string()),  # JSON of unetpp.geo, of the whole image
        pa.field("class_pixels", pa.list_(pa.int64())),  # pixels of class 0 (background), 1, ...
        pa.field("uncertainty", pa.float32()),
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("seconds", pa.float32(), nullable=False),  # of decoding, predicting and encoding this image
        pa.field("attempts", pa.int16(), nullable=False),  # of this version of the image, this one included
        pa.field("degraded", pa.string()),
        pa.field("error_code", pa.string()),
        pa.field("error", pa.string()),
        pa.field("extra", pa.string()),  # JSON: what the user's manifest says of the image
        pa.field("schema_version", pa.int16(), nullable=False),
    ]
)

COMPRESSION = {name: "none" if name.endswith("_png") else "zstd" for name in SCHEMA.names}
DICTIONARIES = ["source_uri", "geo", "model_digest", "degraded", "error_code"]

_FOOTER_KEY = b"unetpp"
_MAX_COMPONENT = 200
_MAX_PATH = 700


class Footer(BaseModel):
    """Who wrote a part, and what is in it: kept in the Parquet file's own metadata."""

    model_config = ConfigDict(frozen=True)

    run: str
    manifest_sha256: str
    shard: int
    num_predicted: int
    num_failed: int
    failures: dict[str, int]
    megapixels: float
    seconds: float
    committed_at: float
    abandoned_by: str | None = None
    """Of an empty part: the call that gave up the run, and with it this shard."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """Equal for two parts that are the same piece of work."""
        return self.run, self.manifest_sha256, self.shard


def model_folder(digest: str) -> str:
    """Partition of a model. The letter keeps an all-digit digest from being read as a number."""
    return f"model=m{digest[:10]}"


def parts_uri(output: str, digest: str, run: str) -> str:
    """Folder of a run's parts."""
    return storage.join(output, "table", model_folder(digest), f"run={run}")


def pngs_uri(output: str, digest: str, run: str) -> str:
    """Folder of a run's PNGs."""
    return storage.join(output, "png", model_folder(digest), f"run={run}")


def part_name(shard: int) -> str:
    """File name of a shard's part."""
    return f"part-{shard:05d}.parquet"


def png_uri(output: str, digest: str, run: str, row: Mapping[str, Any], source: int, num_sources: int) -> str:
    """Where the mask of an image, or of its window, goes as a PNG.

    Args:
        output: where the table is.
        digest: the model's.
        run: the run's name.
        row: of the table or of the manifest, by column.
        source: which of the run's sources.
        num_sources: how many it has. Several may share keys, so each has a folder of its own then.
    """
    window = (row["window_y"], row["window_x"]) if row["num_windows"] > 1 else None
    folder = [f"source-{source}"] if num_sources > 1 else []
    return storage.join(pngs_uri(output, digest, run), *folder, png_key(row["key"], window))


def split_mask_uri(mask_uri: str, digest: str) -> tuple[str, str]:
    """(run, path below that run's folder of PNGs) of the PNG that a row of a model names.

    By what follows the model's folder: a row names the output as it was called then, and outputs are moved, copied and
    mounted elsewhere.
    """
    run, _, path = mask_uri.rpartition(f"/{model_folder(digest)}/run=")[2].partition("/")
    return run, path


def probability_uri(mask_uri: str) -> str:
    """Where the probability goes that belongs to a mask."""
    return mask_uri.removesuffix(".png") + ".probability.png"


def png_key(key: str, window: tuple[int, int] | None = None) -> str:
    """A path for a mask that any store takes; no two (key, window) share one, nor is any the path of a probability.

    Other characters than letters, digits, `_`, `-` and `.` are percent-escaped byte by byte. `~` marks what was cut to
    length; it occurs nowhere else.
    """
    *folders, name = [_component(part) for part in key.split("/")]
    # A folder never ends in .png, and a whole image's name never looks like a window's or a probability's: no two
    # things meet in one name.
    folders = [re.sub(r"\.png$", "%2Epng", folder) for folder in folders]
    if window is None:
        name = re.sub(r"\.(y\d+_x\d+|probability)$", r"%2E\1", name)
    path = "/".join([*folders, name])
    if len(path) > _MAX_PATH:
        path = f"~{_hash(key)}/{name}"
    return path + ("" if window is None else f".y{window[0]}_x{window[1]}") + ".png"


def _component(part: str) -> str:
    escaped = quote(part, safe="").replace("~", "%7E")
    if escaped in ("", ".", ".."):
        return "%" if not escaped else escaped.replace(".", "%2E")
    if len(escaped) <= _MAX_COMPONENT:
        return escaped
    return re.sub(r"%.?$", "", escaped[: _MAX_COMPONENT - 17]) + "~" + _hash(part)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def commit(
    uri: str, rows: Sequence[dict[str, Any]], *, run: str, manifest_sha256: str, shard: int, seconds: float, root: str
) -> Footer:
    """Put the part of a shard, unless it is there; return the footer of the part that holds.

    ConfigError where the name holds other work than this.
    """
    footer = footer_of(rows, run=run, manifest_sha256=manifest_sha256, shard=shard, seconds=seconds)
    if storage.put_if_absent(uri, encode_part(rows, footer), root=root):
        return footer
    there = read_footer(pq.read_metadata(io.BytesIO(storage.read_bytes(uri))), uri)
    refuse_abandoned(there)
    if there.identity != footer.identity:
        raise ConfigError(
            f"{uri} holds shard {there.shard} of run {there.run} and another manifest; it is not this run's work: "
            "use another output, or move the strange part away"
        )
    return there


def footer_of(rows: Sequence[dict[str, Any]], *, run: str, manifest_sha256: str, shard: int, seconds: float) -> Footer:
    """The footer of a part with these rows, committed now."""
    failures = Counter(row["error_code"] for row in rows if row["error_code"] is not None)
    return Footer(
        run=run,
        manifest_sha256=manifest_sha256,
        shard=shard,
        num_predicted=len(rows) - failures.total(),
        num_failed=failures.total(),
        failures=dict(sorted(failures.items())),
        megapixels=sum(row["window_h"] * row["window_w"] for row in rows if row["error_code"] is None) / 1e6,
        seconds=seconds,
        committed_at=time.time(),
    )


def abandon(uri: str, *, run: str, manifest_sha256: str, shard: int, by: str, root: str) -> None:
    """Put an empty part at the name of a shard that nobody is to do any more; a part that is there stays."""
    footer = Footer(
        run=run,
        manifest_sha256=manifest_sha256,
        shard=shard,
        num_predicted=0,
        num_failed=0,
        failures={},
        megapixels=0.0,
        seconds=0.0,
        committed_at=time.time(),
        abandoned_by=by,
    )
    storage.put_if_absent(uri, encode_part([], footer), root=root)


def refuse_abandoned(footer: Footer) -> None:
    """AbandonedError where the part says that its run was given up."""
    if footer.abandoned_by is not None:
        raise AbandonedError(
            f"run {footer.run} was abandoned by {footer.abandoned_by}, and what was left of it is for a later run: "
            "this call stops"
        )


def encode_part(rows: Sequence[dict[str, Any]], footer: Footer) -> bytes:
    """A part's bytes; `rows` have the columns of SCHEMA."""
    schema = SCHEMA.with_metadata({_FOOTER_KEY: footer.model_dump_json()})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema), sink, compression=COMPRESSION, use_dictionary=DICTIONARIES)
    return sink.getvalue()


def read_footer(metadata: pq.FileMetaData, uri: str) -> Footer:
    """The footer of a part. StorageError where the file is no part of ours."""
    try:
        return Footer.model_validate(json.loads((metadata.metadata or {})[_FOOTER_KEY]))
    except (KeyError, ValueError):
        raise StorageError(f"{uri} is no part that this program wrote; move it out of the table") from None

"""What a labelled set is: the objects that belong to it, and the samples it holds, in any of its forms.

| form    | what is there                                                                             |
|---------|-------------------------------------------------------------------------------------------|
| folder  | a folder or prefix with `images/` and `masks/`                                            |
| coco    | a folder or prefix with `images/` and `annotations.json`, or the URI of a .json beside it |
| parquet | a folder or prefix of .parquet files, or the URI of one                                   |

The first that fits is taken, so that a folder with masks/ and annotations.json is read by its masks; the URI of the
.json asks for the other. `splits.csv` (id, split, and any columns to group by) may lie beside images/. Without a split
anywhere, a fifth of the images, drawn by the hash of their ids, is `val`.

Flows ask here whether a set is new: this imports neither numpy nor torch.
"""

import csv
import hashlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import Field

from jobs import storage
from jobs.contract import fingerprint
from unetpp.config import Frozen
from unetpp.errors import ConfigError

Form = Literal["folder", "coco", "parquet"]

ANNOTATIONS, SPLITS = "annotations.json", "splits.csv"


class Listing(Frozen):
    """The objects of a labelled set: their keys below `root`, with their versions."""

    uri: str
    root: str
    form: Form
    objects: dict[str, str] = Field(description="etag by key")
    annotations: str | None = Field(None, description="key of the COCO file")

    @property
    def fingerprint(self) -> str:
        """Equal for equal content: it follows every object that belongs to the set, and no other."""
        return fingerprint(dict(self.objects))


class CocoImage(Frozen):
    """Where a sample's mask is drawn from: an image of a COCO file of this version."""

    uri: str
    etag: str
    image_id: int | str


class ParquetRow(Frozen):
    """Where a sample's image and mask are: a row of a row group of a Parquet file of this version."""

    uri: str
    etag: str
    row_group: int
    row: int


class Sample(Frozen):
    """One labelled image: where it and its mask are, its split and its groups (the other columns of its row).

    `image_uri` and `mask_uri` name both in any form: in a COCO file and in Parquet with a `#`. The etags pin files.
    """

    id: str
    image_uri: str
    mask_uri: str
    split: str
    groups: dict[str, str] = Field({})
    image_etag: str | None = None
    mask_etag: str | None = None
    coco: CocoImage | None = None
    row: ParquetRow | None = None

    def group(self, column: str | None) -> str:
        """Its group in a column; "none" where it has none: an empty cell, or a key that its entry lacks."""
        return self.groups.get(column or "") or "none"


class LabelledSet(Frozen):
    """The samples of a data set in the order of their ids, and a fingerprint of their listing."""

    uri: str
    samples: tuple[Sample, ...]
    fingerprint: str

    def split(self, name: str | None) -> tuple[Sample, ...]:
        """The samples of a split, all for None; ConfigError where there is none."""
        chosen = tuple(sample for sample in self.samples if name is None or sample.split == name)
        if not chosen:
            names = sorted({sample.split for sample in self.samples})
            raise ConfigError(f"{self.uri} has no image in split {name!r}; its splits are {', '.join(names)}")
        return chosen


class Problem(NamedTuple):
    """What does not belong together in a set: a code, the ids, a sentence. One that is not fatal costs no sample."""

    code: str
    ids: tuple[str, ...]
    sentence: str
    is_fatal: bool = True


class Listed(NamedTuple):
    """The samples of a set that are whole, in the order of their ids, and what is wrong with the others."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]


def find_set(uri: str) -> Listing:
    """List the objects of a labelled set. ConfigError where what is there has no form of one."""
    if uri.endswith(".json"):
        return _find_coco(uri)
    if uri.endswith(".parquet") and (found := storage.find(uri)) is not None:
        return Listing(uri=uri, root=_folder(uri), form="parquet", objects={found.key: found.etag})
    objects = {found.key: found.etag for found in storage.list_objects(uri)}
    top = {key.split("/")[0] + ("/" if "/" in key else "") for key in objects}
    if "masks/" in top:
        return Listing(uri=uri, root=uri, form="folder", objects=dict(_below(objects, ("images", "masks", SPLITS))))
    if top >= {"images/", ANNOTATIONS}:
        ours = dict(_below(objects, ("images", ANNOTATIONS, SPLITS)))
        return Listing(uri=uri, root=uri, form="coco", objects=ours, annotations=ANNOTATIONS)
    tables = {key: etag for key, etag in objects.items() if key.endswith(".parquet") and not _is_hidden(key)}
    if tables:
        return Listing(uri=uri, root=uri, form="parquet", objects=tables)
    there = sorted(top)
    seen = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "") if there else "nothing"
    raise ConfigError(
        f"{uri} is no labelled data set: wanted images/ with masks/, images/ with annotations.json, or .parquet files; "
        f"there is {seen}"
    )


def _find_coco(uri: str) -> Listing:
    root, name = _folder(uri), uri.rpartition("/")[2]
    if (annotations := storage.find(uri)) is None:
        raise ConfigError(f"there is no file {uri}: give the URI of a COCO file that lies beside images/")
    images = storage.list_objects(storage.join(root, "images"), missing_ok=True)
    objects = {f"images/{found.key}": found.etag for found in images}
    if not objects:
        raise ConfigError(f"{uri} has no images/ beside it: a COCO file names images in a folder of that name")
    objects[name] = annotations.etag
    if (splits := storage.find(storage.join(root, SPLITS))) is not None:
        objects[SPLITS] = splits.etag
    return Listing(uri=uri, root=root, form="coco", objects=objects, annotations=name)


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def _below(objects: dict[str, str], names: Collection[str]) -> Iterator[tuple[str, str]]:
    return ((key, etag) for key, etag in objects.items() if key.split("/")[0] in names)


def _is_hidden(key: str) -> bool:
    return any(part.startswith((".", "_")) for part in key.split("/"))


# ------------------------------------------------------------------------------------------------- splits


def read_splits(listing: Listing, split_column: str) -> dict[str, dict[str, str]] | None:
    """The rows of splits.csv by id, None where there is none. ConfigError for absent columns and ids named twice."""
    if SPLITS not in listing.objects:
        return None
    uri = storage.join(listing.root, SPLITS)
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{uri} is no UTF-8 text; save it as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or []
    if "id" not in columns or split_column not in columns:
        raise ConfigError(f"{uri} has columns {', '.join(columns)}; wanted at least id and {split_column}")
    rows: dict[str, dict[str, str]] = {}
    for row in reader:
        if not row["id"]:
            raise ConfigError(f"{uri} has no id in line {reader.line_num}; wanted one, or no such line")
        if row["id"] in rows:
            raise ConfigError(f"{uri} names the id {row['id']!r} twice; remove one of the rows")
        rows[row["id"]] = {column: value or "" for column, value in row.items() if column}
    return rows


def ids_with_split(rows: Mapping[str, Mapping[str, str]], split_column: str) -> set[str]:
    """The ids whose rows name a split: an empty cell names none."""
    return {id_ for id_, row in rows.items() if row.get(split_column)}


def hashed_split(listing: Listing, id_: str, split_column: str) -> str:
    """`val` for a fifth of all ids, else `train`. ConfigError where another column than the usual one was asked for."""
    if split_column != "split":
        raise ConfigError(f"{listing.uri} has no {split_column!r} to split by: name a column it has in split_column")
    return "val" if hashlib.sha256(id_.encode()).digest()[0] < 51 else "train"


def groups_of(row: dict[str, str], split_column: str) -> dict[str, str]:
    """The columns of a row that are neither id nor split."""
    return {column: value for column, value in row.items() if column not in ("id", split_column)}


def group_column(samples: Sequence[Sample], group_by: str | None) -> str | None:
    """The column to report by: the one that is asked for, else modality if there. ConfigError where it is not there."""
    if group_by is None:
        return "modality" if any("modality" in sample.groups for sample in samples) else None
    refuse_absent_column(samples, group_by, "group_by")
    return group_by


def refuse_absent_column(samples: Sequence[Sample], column: str, setting: str) -> None:
    """ConfigError where none of the samples has the column that a setting names to group by."""
    columns = sorted({column for sample in samples for column in sample.groups})
    if column not in columns:
        raise ConfigError(
            f"{setting} is {column!r}; the set has the columns {', '.join(columns) or 'none'}: name one of those, "
            "or leave it out"
        )


def without_split(listing: Listing, ids: Collection[str], split_column: str, where: str) -> Iterator[Problem]:
    """The problem that images have no split, where any have none."""
    return some_lack(listing, "image_without_row", ids, f"{split_column!r} in {where}")


def some_lack(listing: Listing, code: str, ids: Collection[str], what: str) -> Iterator[Problem]:
    """The problem that images lack `what`, where any do."""
    if ids:
        sentence = f"{listing.uri}: {len(ids)} image(s) have no {what}, the first is {min(ids)!r}"
        yield Problem(code, tuple(sorted(ids)), sentence)


def rows_without_image(listing: Listing, ids: Collection[str]) -> Iterator[Problem]:
    """The problem that splits.csv names images that are not there, where it does."""
    if ids:
        sentence = f"{listing.uri}: {SPLITS} names {len(ids)} id(s) without an image, the first is {min(ids)!r}"
        yield Problem("row_without_image", tuple(sorted(ids)), sentence)

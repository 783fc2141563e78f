"""What the table says of every image version: done, or open after some attempts; and what of a run is still failed."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs import forgotten, table
from jobs.manifest import Identities, find, identity, whole_identity
from jobs.table import GRID, PLACE
from unetpp.errors import PERMANENT_IMAGE_ERRORS

MAX_ATTEMPTS = 3
Place = tuple[str, str, int, int]
"""Source, key, window_y, window_x."""

_IDENTITY = ["key", "etag", "window_y", "window_x", "num_windows", "window_px"]


class _Windows(NamedTuple):
    """Rows of windows, column by column. Those of several models are no image together."""

    identities: Identities
    """Of window and model."""
    settled: NDArray[np.bool_]
    grids: Identities
    """Of image version, grid and model."""
    wholes: Identities
    """Of image version and grid."""
    nums: NDArray[np.int32]
    """Windows of the grid."""


def _of(model: str, name: bytes) -> bytes:
    return hashlib.blake2b(model.encode() + b"\0" + name, digest_size=16).digest()


class Done:
    """What the newest row of every image version says, as 16-byte identities: settled, or open after some attempts.

    Two million images take 32 MB; runs are added newest first, so that what is open stays so whatever older runs say.
    """

    def __init__(self) -> None:
        self._settled = bytearray()
        self._open, self._attempts = np.empty(0, "S16"), np.empty(0, np.int16)
        self._run: list[tuple[Identities, NDArray[np.int16]]] = []
        self._windows: list[_Windows] = []

    def add(self, identities: Identities, settled: NDArray[np.bool_], attempts: NDArray[np.int16]) -> None:
        """Some rows of a run: of each its image version, whether it needs nothing now, and its attempts."""
        fresh = ~self._is_open(identities)[0]
        self._settled += identities[fresh & settled].tobytes()
        self._run.append((identities[fresh & ~settled], attempts[fresh & ~settled]))

    def add_windows(self, rows: Sequence[Mapping[str, Any]], settled: NDArray[np.bool_]) -> None:
        """The windows among some rows of a run, which are also added as such."""
        numbers = [number for number, row in enumerate(rows) if row["num_windows"] > 1]
        if not numbers:
            return
        found = [rows[number] for number in numbers]
        models = [row["model_digest"] for row in found]
        wholes = [whole_identity(row["source_uri"], row["key"], row["etag"], row["window_px"]) for row in found]
        windows = [identity(row["source_uri"], *(row[name] for name in _IDENTITY)) for row in found]
        self._windows.append(
            _Windows(
                np.array([_of(model, window) for model, window in zip(models, windows, strict=True)], "S16"),
                settled[numbers],
                np.array([_of(model, whole) for model, whole in zip(models, wholes, strict=True)], "S16"),
                np.array(wholes, "S16"),
                np.array([row["num_windows"] for row in found], np.int32),
            )
        )

    def end_run(self) -> None:
        """All rows of a run are added; the next ones are of an older run."""
        identities = np.concatenate([self._open, *(found for found, _ in self._run)])
        attempts = np.concatenate([self._attempts, *(found for _, found in self._run)])
        order = np.argsort(identities)
        self._open, self._attempts, self._run = identities[order], attempts[order], []

    def lookup(self, identities: Identities) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
        """(needs nothing now, attempts so far) of each identity; (False, 0) for an unknown one."""
        settled = find(self._sorted, identities)[0]  # a newer run's word, if an older one left it open
        return settled, np.where(settled, 0, self._is_open(identities)[1]).astype(np.int16)

    def attempts(self, identities: Identities) -> NDArray[np.int16]:
        """Attempts so far of each identity."""
        return self.lookup(identities)[1]

    def num_windows(self, identities: Identities) -> NDArray[np.int32]:
        """The windows of each image (`manifest.whole_identity`) whose windows are all settled; 0 for any other."""
        complete, nums = self._complete
        is_there, at = find(complete, identities)
        found = np.zeros(len(identities), np.int32)
        found[is_there] = nums[at[is_there]]
        return found

    @cached_property
    def _complete(self) -> tuple[Identities, NDArray[np.int32]]:
        """The images, sorted, of which the newest row of every window is settled, and their numbers of windows."""
        if not self._windows:
            return np.empty(0, "S16"), np.empty(0, np.int32)
        every = _Windows(*(np.concatenate(columns) for columns in zip(*self._windows, strict=True)))
        newest = np.unique(every.identities, return_index=True)[1]  # the first of each: newer runs came first
        newest = newest[every.settled[newest]]
        _, first, counts = np.unique(every.grids[newest], return_index=True, return_counts=True)
        complete = newest[first][counts == every.nums[newest][first]]
        wholes, one = np.unique(every.wholes[complete], return_index=True)
        return wholes, every.nums[complete][one]

    @cached_property
    def _sorted(self) -> Identities:
        settled = np.frombuffer(self._settled, "S16")
        settled.sort()
        return settled

    def _is_open(self, identities: Identities) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
        is_open, at = find(self._open, identities)
        attempts = np.zeros(len(identities), np.int16)
        attempts[is_open] = self._attempts[at[is_open]]
        return is_open, attempts


class DoneWithin:
    """What is done by any model, less a budget of images that are done by older models alone: those are done again.

    A page at a time, in the order of the listing; as `planning.plan` asks.
    """

    def __init__(self, by_this: Done, by_any: Done, budget: int) -> None:
        self._by_this, self._by_any, self._budget = by_this, by_any, budget

    def lookup(self, identities: Identities) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
        """(needs nothing now, attempts so far) of each identity."""
        settled, attempts = self._by_any.lookup(identities)
        settled[self._again(settled, self._by_this.lookup(identities)[0])] = False
        return settled, attempts

    def attempts(self, identities: Identities) -> NDArray[np.int16]:
        """Attempts so far of each identity."""
        return self._by_any.attempts(identities)

    def num_windows(self, identities: Identities) -> NDArray[np.int32]:
        """The windows of each image whose windows are all settled; an image is one of the budget, however large."""
        nums = self._by_any.num_windows(identities)
        nums[self._again(nums > 0, self._by_this.num_windows(identities) > 0)] = 0
        return nums

    def _again(self, by_any: NDArray[np.bool_], by_this: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Which of the images that only older models have done are done again now."""
        older = np.flatnonzero(by_any & ~by_this)[: self._budget]
        self._budget -= len(older)
        return older


class _Newest:
    """Tells, run by run and newest first, which rows readers see: no newer run has the image.

    Of an image in windows also those of the newest run's version, grid and model, which several runs may have. Two
    million images take 32 MB, until all runs are read.
    """

    def __init__(self) -> None:
        self._images, self._grids = np.empty(0, "S16"), np.empty(0, "S16")
        self._run = bytearray(), bytearray()

    def among(self, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_]:
        """Which of some rows of a run they are."""
        images = np.array([identity(row["source_uri"], row["key"], "") for row in rows], "S16")
        grids = np.array([_grid(row) for row in rows], "S16")
        is_cut = np.array([row["num_windows"] > 1 for row in rows], bool)
        is_new = ~find(self._images, images)[0]
        for identities, added in zip(self._run, (images[is_new], grids[is_new & is_cut]), strict=True):
            identities += added.tobytes()
        return is_new | find(self._grids, grids)[0]

    def end_run(self) -> None:
        """All rows of a run are seen; the next ones are of an older run."""
        images, grids = self._run
        self._images, self._grids = _with(self._images, images), _with(self._grids, grids)
        self._run = bytearray(), bytearray()


def _grid(row: Mapping[str, Any]) -> bytes:
    return _of(row["model_digest"], whole_identity(row["source_uri"], row["key"], row["etag"], row["window_px"]))


def _with(there: Identities, more: bytearray) -> Identities:
    """A sorted array with more identities."""
    if not more:
        return there
    both = np.concatenate([there, np.frombuffer(more, "S16")])
    both.sort(kind="stable")  # quick where most of it is sorted
    return both


def done_before(
    output: str,
    digest: str,
    *,
    by_any: bool = False,
    sources: Collection[str],
    write: Collection[str],
    written_by_run: Mapping[str, Collection[str]],
    waiting: Collection[str] = (),
) -> Done:
    """Read what is done of an archive.

    An image version is done when the newest row of its image is of it, comes from a run that wrote at least `write`,
    and has a mask, an error that a second try cannot change, or MAX_ATTEMPTS tries behind it. An earlier version, which
    readers do not see any more, is as if it never was. One that was forgotten is done whatever is wanted, and whatever
    model had it.

    Args:
        output: where the table is.
        digest: the model's.
        by_any: masks of other models count, too. What they failed at does not: this one may read it.
        sources: what is read, as rows name it.
        write: what is wanted now.
        written_by_run: what each run wrote.
        waiting: runs whose failed images are not to be tried again now.
    """
    done, newest = Done(), _Newest()
    removed = forgotten.identities(output)
    done.add(removed, np.ones(len(removed), bool), np.zeros(len(removed), np.int16))
    done.end_run()
    by_run = table.parts_by_run(table.list_parts(output, None if by_any else digest))
    for run in sorted(by_run, reverse=True):
        covers = set(write) <= set(written_by_run.get(run, ()))
        for batch in table.scan(by_run[run], ["source_uri", *_IDENTITY, "error_code", "attempts", "model_digest"]):
            found = [row for row in batch.to_pylist() if row["source_uri"] in sources]
            is_seen = newest.among(found)
            rows = [row for row, seen in zip(found, is_seen, strict=True) if seen or row["error_code"] == "forgotten"]
            names = [identity(row["source_uri"], *(row[name] for name in _IDENTITY)) for row in rows]
            is_ours = [row["model_digest"] == digest for row in rows]
            settled = [
                row["error_code"] == "forgotten" or (covers and _is_settled(row, ours, run in waiting))
                for row, ours in zip(rows, is_ours, strict=True)
            ]
            attempts = [
                row["attempts"] if row["error_code"] and ours else 0 for row, ours in zip(rows, is_ours, strict=True)
            ]
            done.add(np.array(names, "S16"), np.array(settled, bool), np.array(attempts, np.int16))
            done.add_windows(rows, np.array(settled, bool))
        done.end_run()
        newest.end_run()
    return done


def still_failed(
    output: str, digest: str, run: str, *, only: Collection[str] = (), waiting: Collection[str] = ()
) -> dict[Place, int]:
    """The images of a run whose newest row is a failure, with the attempts so far. What is forgotten is none.

    Nor is an image, or a window of one, of which a newer run has another version or grid: that is what counts now.

    Args:
        output: where the table is.
        digest: the model's.
        run: the run whose images are meant.
        only: error codes that count; default: all.
        waiting: runs whose failures are not to be tried again now.
    """
    by_run = table.parts_by_run(table.list_parts(output, digest))
    failed: dict[tuple[str, str], tuple[tuple[object, ...], dict[tuple[int, int], int]]] = {}
    """Of an image: its grid, and the attempts at each of its windows."""
    for number in sorted(name for name in by_run if name >= run):
        for batch in table.scan(by_run[number], [*PLACE, *GRID, "error_code", "attempts"]):
            for row in batch.to_pylist():
                image, window = (row["source_uri"], row["key"]), (row["window_y"], row["window_x"])
                grid, code = tuple(row[name] for name in GRID), row["error_code"]
                is_failed = code not in (None, "forgotten") and number not in waiting and (not only or code in only)
                if number == run:
                    if is_failed:
                        failed.setdefault(image, (grid, {}))[1][window] = row["attempts"]
                elif image in failed:
                    before, attempts = failed[image]
                    if grid != before:
                        del failed[image]
                    elif window in attempts:
                        del attempts[window]
                        if is_failed:
                            attempts[window] = row["attempts"]
    return {(*image, *window): tries for image, (_, of) in failed.items() for window, tries in of.items()}


def _is_settled(row: Mapping[str, object], is_ours: bool, is_waiting: bool) -> bool:
    code, attempts = row["error_code"], row["attempts"]
    assert isinstance(attempts, int)
    return code is None or (is_ours and (code in PERMANENT_IMAGE_ERRORS or attempts >= MAX_ATTEMPTS or is_waiting))

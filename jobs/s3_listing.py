"""Listings of object storage, page by page, never cached; of many pages the folders side by side."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jobs.s3_calls import Calls
from jobs.s3_uri import split

Page = list[tuple[str, str, int]]
"""Key, etag and size in bytes of some objects."""

PAGE_KEYS, MAX_PAGES_IN_LINE, LISTINGS_AT_ONCE = 1000, 4, 16


def list_objects(calls: Calls, uri: str) -> Iterator[tuple[str, str, int]]:
    """(key below the prefix `uri`, etag, size in bytes), few pages in memory at a time.

    In the order of the keys' bytes; after MAX_PAGES_IN_LINE pages the folders below are listed side by side, and
    their pages taken in turn: an order that is the same whenever the same objects are there.
    """
    bucket, prefix = split(uri)
    prefix = prefix.rstrip("/") + "/" if prefix else ""
    first: set[str] = set()
    for number, page in enumerate(pages := _pages(calls, uri, bucket, prefix), start=1):
        yield from page
        if number <= MAX_PAGES_IN_LINE:
            first.update(found[0] for found in page)
        if number == MAX_PAGES_IN_LINE and (folders := _folders(calls, uri, bucket, prefix)):
            pages.close()
            for found in _side_by_side(calls, uri, bucket, prefix, *folders):
                if found[0] not in first:
                    yield found
            return


def _pages(calls: Calls, uri: str, bucket: str, prefix: str, below: str = "") -> Generator[Page]:
    """Pages of the objects below `prefix` + `below`, their keys taken from `prefix` on."""
    more: dict[str, str] = {}
    where = {"Bucket": bucket, "Prefix": prefix + below, "MaxKeys": PAGE_KEYS}
    while True:
        page = calls.call(uri, "list_objects_v2", **where, **more)
        yield _objects(page, prefix)
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _folders(calls: Calls, uri: str, bucket: str, prefix: str) -> tuple[list[str], Page] | None:
    """The folders of the first level below `prefix` that has several, and the objects beside them.

    None where there is no such level, where other objects lie above it, or where it fills more than a page: a
    request for each of a million folders with an object each would cost more than it saves.
    """
    below = ""
    while True:
        where = {"Bucket": bucket, "Prefix": prefix + below, "MaxKeys": PAGE_KEYS}
        page = calls.call(uri, "list_objects_v2", **where, Delimiter="/")
        folders = [found["Prefix"].removeprefix(prefix) for found in page.get("CommonPrefixes", ())]
        beside = _objects(page, prefix)
        if page.get("IsTruncated") or not folders or (beside and len(folders) == 1):
            return None
        if len(folders) > 1:
            return folders, beside
        (below,) = folders


def _side_by_side(
    calls: Calls, uri: str, bucket: str, prefix: str, folders: list[str], beside: Page
) -> Iterator[tuple[str, str, int]]:
    """What lies beside the folders, then what is in them: a page of each in turn."""
    yield from beside
    waiting = deque(folders)
    begun: deque[tuple[Generator[Page], Future[Page | None]]] = deque()
    with ThreadPoolExecutor(LISTINGS_AT_ONCE, thread_name_prefix="listing") as threads:
        while waiting or begun:
            while waiting and len(begun) < LISTINGS_AT_ONCE:
                pages = _pages(calls, uri, bucket, prefix, waiting.popleft())
                begun.append((pages, threads.submit(next, pages, None)))
            pages, coming = begun.popleft()
            if (page := coming.result()) is not None:
                begun.append((pages, threads.submit(next, pages, None)))
                yield from page


def _objects(page: Mapping[str, Any], prefix: str) -> Page:
    return [
        (key, found["ETag"].strip('"'), found["Size"])
        for found in page.get("Contents", ())
        if (key := found["Key"].removeprefix(prefix)) and not key.endswith("/")  # consoles' marks of empty folders
    ]

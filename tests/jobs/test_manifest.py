"""The manifest: every image once, in order, in shards that keep their limits."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import manifest, planning, storage
from jobs.contract import PredictConfig
from jobs.done import Done
from jobs.forecast import shard_size
from jobs.manifest import Listed, identity, matcher
from jobs.planning import LARGEST, PIXELS_A_BYTE, SHARD_BYTES, Plan, ShardSize
from unetpp.config import ModelConfig
from unetpp.errors import ConfigError, StorageError

NOTHING_DONE = Done()
PAPER = ModelConfig(level=4, deep_supervision=False)


def _plan(listing: list[Listed], shard_images: int = 4, done: Done = NOTHING_DONE, **size: Any) -> Plan:
    return planning.plan(listing, sources=["s", "t"], done=done, size=ShardSize(shard_images, **size))


def _listed(*keys: str, size: int = 10) -> list[Listed]:
    return [Listed(0, key, f"etag of {key}", size) for key in keys]


def _stored(plan: Plan, place: str) -> tuple[str, str]:
    content = manifest.encode(plan.table)
    uri = storage.join(place, "manifest.parquet")
    storage.write_bytes(uri, content)
    return uri, hashlib.sha256(content).hexdigest()


def test_images_are_chosen_by_key_in_any_case_and_folder() -> None:
    keys = ["B.PNG", "deep/er/c.Tif", "a.png", "notes.txt", "png", "a.png.bak"]
    assert list(filter(matcher(("*.png", "*.tif")), keys)) == ["B.PNG", "deep/er/c.Tif", "a.png"]
    assert list(filter(matcher(()), keys)) == []


def test_an_image_that_is_listed_twice_is_refused_and_two_sources_may_share_a_key() -> None:
    same = Listed(1, "a.png", "other etag", 10)
    assert _plan([*_listed("a.png"), same]).table["source"].to_pylist() == [0, 1]
    with pytest.raises(ConfigError, match=r"'a\.png' is listed twice"):
        _plan([*_listed("b.png", "a.png"), same, same])


def test_what_is_done_is_left_out_and_counted() -> None:
    names = [identity("s", key, f"etag of {key}", 0, 0, 1, 0) for key in ("a.png", "b.png")]
    done = Done()
    done.add(np.array(names, "S16"), np.array([True, False]), np.array([0, 2], np.int16))
    done.end_run()
    plan = _plan(_listed("a.png", "b.png", "c.png"), done=done)
    assert plan.table["key"].to_pylist() == ["b.png", "c.png"]
    assert plan.table["attempts"].to_pylist() == [2, 0]
    assert (plan.num_listed, plan.num_unchanged) == (3, 1)


def test_a_plan_of_nothing_has_no_shards() -> None:
    assert _plan([]).num_shards == 0


@given(
    sizes=st.lists(st.integers(0, SHARD_BYTES + 5), max_size=60),
    shard_images=st.integers(1, 9),
)
@settings(deadline=None, max_examples=60)
def test_shards_cut_the_listing_within_their_limits(sizes: list[int], shard_images: int) -> None:
    listing = [Listed(0, f"{hash(number)}-{number}.png", "e", size) for number, size in enumerate(sizes)]
    plan = _plan(listing, shard_images)
    rows = plan.table.to_pylist()
    assert [row["key"] for row in rows] == [found.key for found in listing]
    shards = [row["shard"] for row in rows]
    assert shards == sorted(shards)
    assert set(shards) == set(range(plan.num_shards))
    for shard, number in Counter(shards).items():
        assert number <= shard_images
        total = sum(row["size_bytes"] for row in rows if row["shard"] == shard)
        assert total <= SHARD_BYTES or number == 1


def test_shards_are_cut_by_the_pixels_they_are_thought_to_have() -> None:
    plan = _plan(_listed(*"abcdef", size=10), 256, pixels=2 * 10 * PIXELS_A_BYTE)
    assert plan.table["shard"].to_pylist() == [0, 0, 1, 1, 2, 2]
    plan = _plan(_listed(*"ab", size=10), 256, pixels=1)
    assert plan.table["shard"].to_pylist() == [0, 1]  # an image at least


def test_shards_become_smaller_towards_the_end() -> None:
    images = _listed(*(f"{number:03d}.png" for number in range(60)))
    pixel = 10 * PIXELS_A_BYTE  # of one

    def sizes(shard_images: int, **size: Any) -> list[int]:
        return list(Counter(_plan(images, shard_images, **size).table["shard"].to_pylist()).values())

    assert sizes(256) == [60]
    assert sizes(256, share=0.25) == [15, 11, 8, 6, 5, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1]
    assert sizes(256, share=0.25, least_pixels=4 * pixel) == [15, 11, 8, 6, 5, 4, 4, 4, 3]
    assert sizes(256, share=0.25, pixels=10 * pixel, least_pixels=4 * pixel) == [10, 10, 10, 7, 5, 4, 4, 4, 4, 2]
    assert sizes(2, share=0.25) == [2] * 27 + [1] * 6


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        ({"backend": "inline", "threads": 1}, 1 / 3),
        ({"backend": "ray", "threads": 1, "num_workers": 5}, 1 / 15),
    ],
)
def test_a_forecast_makes_shards_of_about_thirty_seconds(asked: dict[str, Any], share: float) -> None:
    places = {"model": "m", "input": "i", "output": "o", "engine": "openvino"}
    size = shard_size(PredictConfig.model_validate(places | asked), PAPER)
    assert (size.images, size.share) == (LARGEST.images, pytest.approx(share))
    # 30 GMAC for 256 x 256, 60 of them a second
    assert (size.pixels, size.least_pixels) == pytest.approx((60 * 256 * 256, 4 * 256 * 256), rel=0.02)
    flips = asked | {"mode": "accurate", "flips": True}
    assert shard_size(PredictConfig.model_validate(places | flips), PAPER).pixels == pytest.approx(
        size.pixels / 4, abs=1
    )


def test_the_shards_of_a_manifest_hold_its_rows(place: str) -> None:
    plan = _plan(_listed(*(f"{number:03d}.png" for number in range(11))), shard_images=4)
    uri, sha256 = _stored(plan, place)
    shards = manifest.shards(uri, sha256)
    assert [(shard.number, shard.start, shard.stop) for shard in shards] == [(0, 0, 4), (1, 4, 8), (2, 8, 11)]
    rows = [row for shard in shards for row in manifest.read_rows(uri, shard)]
    assert [row._asdict() for row in rows] == plan.table.to_pylist()


def test_a_shard_may_cross_row_groups(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROWS_PER_GROUP", 3)
    plan = _plan(_listed(*(f"{number:03d}.png" for number in range(10))), shard_images=7)
    uri, sha256 = _stored(plan, str(tmp_path))
    keys = [[row.key for row in manifest.read_rows(uri, shard)] for shard in manifest.shards(uri, sha256)]
    assert keys == [[f"{number:03d}.png" for number in range(7)], ["007.png", "008.png", "009.png"]]


def test_a_changed_manifest_is_refused(tmp_path) -> None:
    uri, sha256 = _stored(_plan(_listed("a.png")), str(tmp_path))
    _stored(_plan(_listed("b.png")), str(tmp_path))
    with pytest.raises(StorageError, match="must not be changed"):
        manifest.shards(uri, sha256)


def test_an_identity_tells_source_key_version_and_window_apart() -> None:
    different = [
        ("s", "k", "e", 0, 0, 1, 0),
        ("t", "k", "e", 0, 0, 1, 0),
        ("s", "l", "e", 0, 0, 1, 0),
        ("s", "k", "f", 0, 0, 1, 0),
        ("s", "k", "e", 8, 0, 1, 0),
        ("s", "k", "e", 0, 0, 2, 0),
        ("sk", "", "e", 0, 0, 1, 0),
    ]
    assert len({identity(*what) for what in different}) == len(different)
    assert len(identity("s", "k", "e")) == 16

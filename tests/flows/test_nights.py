"""Which night a moment belongs to."""

from datetime import UTC, date, datetime, timedelta

import pytest

from flows.nights import night_of, nights_between, refuse_future
from unetpp.errors import ConfigError


@pytest.mark.parametrize(
    ("moment", "timezone", "night"),
    [
        (datetime(2026, 11, 24, 22, 0, tzinfo=UTC), "UTC", "20261124"),
        (datetime(2026, 11, 25, 3, 0, tzinfo=UTC), "UTC", "20261124"),
        (datetime(2026, 11, 25, 11, 59, tzinfo=UTC), "UTC", "20261124"),
        (datetime(2026, 11, 25, 12, 0, tzinfo=UTC), "UTC", "20261125"),
        (datetime(2026, 11, 25, 3, 0, tzinfo=UTC), "Pacific/Auckland", "20261125"),
        (datetime(2026, 10, 24, 22, 30, tzinfo=UTC), "Europe/Berlin", "20261024"),  # the clock goes back this night
        (datetime(2026, 10, 25, 10, 59, tzinfo=UTC), "Europe/Berlin", "20261024"),
        (datetime(2026, 10, 25, 11, 0, tzinfo=UTC), "Europe/Berlin", "20261025"),
    ],
)
def test_a_night_is_from_noon_to_noon_where_it_is_night(moment: datetime, timezone: str, night: str) -> None:
    assert night_of(moment, timezone) == night


def test_a_shorter_period_is_named_by_its_night_and_its_first_minute() -> None:
    names = [night_of(datetime(2026, 11, 24, 22, minute, 59, tzinfo=UTC), "UTC", 3) for minute in (3, 4, 5, 6)]
    assert names == ["20261124-242203"] * 3 + ["20261124-242206"]


@pytest.mark.parametrize("timezone", ["America/New_York", "Europe/Berlin", "Pacific/Auckland"])
def test_the_periods_of_a_night_are_of_that_night_and_no_two_have_one_name(timezone: str) -> None:
    first = datetime(2026, 10, 20, tzinfo=UTC)  # the clocks of two of them go back in these weeks
    moments = [first + timedelta(hours=hour) for hour in range(24 * 20)]
    names = [night_of(moment, timezone, 60) for moment in moments]
    assert [name[:8] for name in names] == [night_of(moment, timezone) for moment in moments]
    assert len(set(names)) == len(names)


def test_a_range_has_both_its_ends() -> None:
    assert [night.day for night in nights_between(date(2026, 11, 29), date(2026, 12, 1))] == [29, 30, 1]


def test_the_last_night_that_has_begun_is_this_one() -> None:
    tonight = datetime.strptime(night_of(datetime.now(UTC), "Pacific/Auckland"), "%Y%m%d").date()
    refuse_future(tonight, "Pacific/Auckland")
    with pytest.raises(ConfigError, match="has not begun"):
        refuse_future(tonight + timedelta(days=2), "Pacific/Auckland")

"""Which night it is: the same for every flow run that belongs to it, whenever it was started."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

from unetpp.errors import ConfigError

MINUTES_A_DAY = 24 * 60


def night_of(moment: datetime, timezone: str, period_minutes: int = MINUTES_A_DAY) -> str:
    """Name the night that `moment` lies in: `20261124` is from noon of that day to noon of the next.

    Shorter periods, for archives that are looked at several times a day, have the day, hour and minute at which they
    begin, in UTC, after their night: `20261124-250130`.
    """
    night = f"{moment.astimezone(ZoneInfo(timezone)) - timedelta(hours=12):%Y%m%d}"
    if period_minutes == MINUTES_A_DAY:
        return night
    minutes = int(moment.timestamp()) // 60
    start = datetime.fromtimestamp((minutes - minutes % period_minutes) * 60, UTC)
    return f"{night}-{start:%d%H%M}"


def refuse_future(night: date, timezone: str) -> None:
    """ConfigError for a night that has not begun: done before its images come, it would be passed over when they do."""
    now = night_of(datetime.now(UTC), timezone)
    if f"{night:%Y%m%d}" > now:
        raise ConfigError(
            f"the night {night} has not begun: in {timezone} it is {now[:4]}-{now[4:6]}-{now[6:]} until noon; "
            "give none that is later"
        )


def nights_between(first: date, last: date) -> list[date]:
    """Every night from `first` to `last`, both included."""
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]

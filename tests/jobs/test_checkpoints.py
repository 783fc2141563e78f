"""Checkpoints that are whole or passed over, whatever happened to their files."""

import pytest

from jobs import checkpoints, storage
from jobs.checkpoints import EpochMetrics
from jobs.train_records import epochs_csv


def metrics(epoch: int, quality: float = 0.5) -> EpochMetrics:
    return EpochMetrics(
        epoch=epoch,
        step=10 * (epoch + 1),
        loss=1.0,
        learning_rate=1e-3,
        val_iou={"L1": quality, "accurate": 0.1},
        val_mean_iou=quality,
        seconds=60.0 * (epoch + 1),
    )


def save(place: str, qualities: list[float], number: int) -> None:
    history = tuple(metrics(epoch, quality) for epoch, quality in enumerate(qualities[: number + 1]))
    checkpoints.save(place, f"state {number}".encode(), history)


def epochs(place: str) -> list[int]:
    return [each.epoch for each in checkpoints.complete(place)]


def test_the_newest_and_the_best_are_found(place: str) -> None:
    assert checkpoints.newest(place) is None
    assert checkpoints.best(place) is None
    for number in range(3):
        save(place, [0.5, 0.7, 0.7], number)
    assert epochs(place) == [2, 1, 0]
    newest, best = checkpoints.newest(place), checkpoints.best(place)
    assert newest is not None
    assert best is not None
    assert (newest[0].epoch, newest[1]) == (2, b"state 2")
    assert (best[0].epoch, best[1]) == (1, b"state 1")  # the earliest of the equal ones
    assert [each.epoch for each in newest[0].history] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["no state", "torn state", "no record", "torn record"])
def test_a_torn_checkpoint_is_passed_over(place: str, damage: str) -> None:
    for number in range(2):
        save(place, [0.5, 0.7], number)
    newest, _ = checkpoints.complete(place)
    uri = storage.join(place, "checkpoints", newest.state if "state" in damage else newest.name)
    content = storage.read_bytes(uri)
    storage.delete(uri)
    if "torn" in damage:
        storage.write_bytes(uri, content[: len(content) // 2])
    for found in (checkpoints.newest(place), checkpoints.best(place)):
        assert found is not None
        assert (found[0].epoch, found[1]) == (0, b"state 0")


def test_two_writers_of_one_epoch_do_not_mix(place: str) -> None:
    checkpoints.save(place, b"one", (metrics(0),))
    checkpoints.save(place, b"two", (metrics(0),))
    found = checkpoints.newest(place)
    assert found is not None
    assert found[1] == b"two"


def test_an_epoch_without_a_finite_loss_is_read_back(place: str) -> None:
    without = EpochMetrics.model_validate(metrics(1).model_dump() | {"loss": float("nan")})
    history = (metrics(0), without, metrics(2, 0.4))
    for number in range(3):
        checkpoints.save(place, f"state {number}".encode(), history[: number + 1])
        checkpoints.tidy(place, keep=3)
    assert epochs(place) == [2, 1, 0]
    newest = checkpoints.newest(place)
    assert newest is not None
    assert [str(each.loss) for each in newest[0].history] == ["1.0", "nan", "1.0"]


def test_the_last_one_and_the_best_of_the_others_are_kept(place: str) -> None:
    qualities = [0.1, 0.9, 0.3, 0.8, 0.2]
    for number in range(5):
        save(place, qualities, number)
    checkpoints.tidy(place, keep=3)
    assert epochs(place) == [4, 3, 1]
    checkpoints.tidy(place, keep=1)  # the last one goes on from, the best one is exported
    assert epochs(place) == [4, 1]
    assert len(list(storage.list_objects(storage.join(place, "checkpoints")))) == 4


def test_those_from_a_step_on_are_removed(place: str) -> None:
    for number in range(3):
        save(place, [0.5, 0.7, 0.7], number)
    checkpoints.remove(place, step=20)  # the second was saved after as many
    assert epochs(place) == [0]
    assert len(list(storage.list_objects(storage.join(place, "checkpoints")))) == 2


def test_the_table_of_epochs_has_a_line_an_epoch() -> None:
    lines = epochs_csv([metrics(0, 0.25), metrics(1, 0.5)]).decode().splitlines()
    assert lines[0] == "epoch,step,loss,learning_rate,L1,accurate,mean,skipped,seconds"
    assert lines[1:] == ["1,10,1.0,0.001,0.25,0.1,0.25,0,60.0", "2,20,1.0,0.001,0.5,0.1,0.5,0,120.0"]

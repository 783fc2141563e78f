"""The list of faults names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_that_the_list_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (TESTS / "FAULTS.md").read_text()))
    there = {
        name for path in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 40
    assert sorted(named - there) == []

"""Configs as data: what means nothing is refused where it is written."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from unetpp.config import AugmentConfig, ModelConfig


@pytest.mark.parametrize(
    "fields",
    [{"value_range": {"uint16": (0, math.inf)}}, {"mean": (math.nan,)}, {"std": (math.inf,)}, {"gamma": math.inf}],
    ids=str,
)
def test_a_model_has_finite_numbers(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        ModelConfig.model_validate(fields)


@pytest.mark.parametrize(
    "fields", [{"noise_std": math.inf}, {"scale": (0.001, 1.0)}, {"scale": (1.0, 1000.0)}], ids=str
)
def test_a_crop_is_changed_within_bounds(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"finite number|greater than or equal to 0\.1|less than or equal to 10"):
        AugmentConfig.model_validate(fields)

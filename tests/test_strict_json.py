"""What is written is JSON for every reader: no NaN, no numpy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from prophet_gym.demo import DemoConfig, summarise
from prophet_gym.strict_json import json_ready, to_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_nan_and_infinity_become_null() -> None:
    value = {"psnr": math.nan, 40: [np.float32(0.5), np.inf, (np.int64(3), True)], "name": "tiny", "none": None}
    text = to_json(value)
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=refuse) == {
        "psnr": None, "40": [0.5, None, [3, True]], "name": "tiny", "none": None
    }  # fmt: skip
    assert math.isnan(value["psnr"])


def test_numpy_numbers_become_pythons() -> None:
    assert [type(item) for item in json_ready([np.float64(1), np.int32(1), np.bool_(True)])] == [float, int, bool]


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="ndarray"):
        to_json({"frames": np.zeros(3)})


def test_demo_summary_shows_undefined_figures() -> None:
    undefined = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    keys = ("psnr", "epe_mean", "cos_mean", "block_within", "block_lost")
    rows = {name: dict.fromkeys(keys, undefined) for name in ("model", "last_frame", "shuffled_actions")}
    rows["model"]["psnr"] = {**undefined, "value": 27.125}
    result = {
        "protocol": {"steps": 40},
        "groups": {"all": {"horizons": {"40": {"predictors": rows}}}},
        "episodes": [{}, {}],
    }
    verdicts = {"precision": {"value": None}, "recall": {"value": 0.875}, "successes": 8}
    text = summarise(result, verdicts, DemoConfig(), 3.0)
    assert "nan" not in text and "precision n/a, recall 0.88 (8 successes)" in text
    assert "27.12" in text and "at the end n/a, lost n/a" in text

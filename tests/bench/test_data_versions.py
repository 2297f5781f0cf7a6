"""The comparison of the data path with an earlier checkout: what its page says, and this version beside itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.bench import data, data_versions
from pipeline.errors import ConfigError
from tests.helpers.runs import ROOT


def test_the_page_states_the_ratio_of_rounds_and_whether_the_pixels_are_equal() -> None:
    both = {"now": [2.0, 3.0, 2.2], "before": [2.0, 3.0, 2.0]}
    result = data_versions.Result({"batch": "2"}, {"off": both, "hsv": both}, {"off": True, "hsv": False})
    text = data_versions.markdown(result, {"cores": "2"}, "fovea bench data --before x")
    assert "| off | 2.00 | 2.20 | 1.033 ± 0.065 | equal, bit for bit |" in text
    assert "| hsv | 2.00 | 2.20 | 1.033 ± 0.065 | NOT EQUAL |" in text


def test_a_folder_that_is_not_a_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a checkout of fovea"):
        data_versions.measure(data.Options(), tmp_path)


@pytest.mark.slow
def test_this_version_makes_the_pixels_of_this_version() -> None:
    result = data_versions.measure(data.Options(images=4, batch=2, rounds=1), ROOT)
    assert result.equal == {"off": True, "hsv": True}
    assert all(len(costs) == 1 and costs[0] > 0 for both in result.milliseconds.values() for costs in both.values())

"""The same ten steps as ever, of seven methods on one and two ranks, one half of them resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden_runs import METHODS, differences, run
from tests.helpers.matrix import matrix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "ranks"), matrix(METHODS, [1, 2], together=1, always=[("dinov2", 1), ("dinov2", 2), ("clip", 2)])
)
def test_ten_steps_are_those_that_were_recorded(method: str, ranks: int, shards: str, tmp_path: Path) -> None:
    assert not differences(method, ranks, run(method, ranks, shards, tmp_path))

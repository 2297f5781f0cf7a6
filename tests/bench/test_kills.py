"""The benchmark of killed ranks: what its page says, and a short one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.bench.chaos import kills

DEATHS = [kills.Death(1, 8, 6, 0.5, 3.0), kills.Death(0, 12, 12, 0.7, 4.0), kills.Death(3, 20, 17, 2.5, 9.0)]
RESULT = kills.Result(DEATHS, ended=True, equal=True, samples_wrong=0, cold=20.0)


def test_the_page_states_what_deaths_cost_and_whether_the_bits_are_the_same() -> None:
    text = kills.markdown(RESULT, kills.Options(kills=3), {"cores": "2"}, "fovea bench kills")
    assert "3 times a random rank is killed" in text and "its bits are those of an undisturbed run**" in text
    assert "| steps executed again | 2 | 2.9 | 3 |" in text
    assert "| seconds from a death to the next step | 4.7 | 10.8 | 11.5 |" in text
    bad = kills.markdown(replace(RESULT, ended=False, equal=False), kills.Options(), {}, "x")
    assert "did not come to its end" in bad and "its bits are NOT those" in bad


@pytest.mark.slow
def test_ranks_that_are_killed_are_replaced_and_the_bits_are_the_same(tmp_path: Path) -> None:
    lines: list[str] = []
    result = kills.measure(kills.Options(kills=2, ranks=2, seed=3), tmp_path, log=lines.append)
    assert result.ended and result.equal and result.samples_wrong == 0
    assert [death.resumed <= death.step for death in result.deaths] == [True, True] and result.cold > 0
    assert len(lines) == 3, "the undisturbed run, and each death"

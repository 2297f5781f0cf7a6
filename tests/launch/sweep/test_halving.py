"""Successive halving: the numbers of Jamieson and Talwalkar's schedule, and who continues."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from launch.sweep.halving import rung_step, rungs, survivors
from launch.sweep.state import Comparison, Halving, Record, Sweep, create, find
from pipeline.errors import ConfigError
from pipeline.runtime.run_directory import RunDirectory


def test_the_schedule_is_that_of_the_paper() -> None:
    assert [rungs(n, 3) for n in (2, 3, 8, 9, 26, 27, 81)] == [0, 1, 1, 2, 2, 3, 4]
    assert [rungs(n, 2) for n in (2, 7, 8, 1000)] == [1, 2, 3, 9]
    # Hyperband's bracket of 81 members and R = 81 with eta = 3: 1, 3, 9 and 27 of 81 units, 81, 27, 9, 3 and 1 members.
    assert [rung_step(81, rung, 4, 3) for rung in range(4)] == [1, 3, 9, 27]
    scores = {n: float(n) for n in range(81)}
    left = list(range(81))
    for rung, number in enumerate((27, 9, 3, 1)):
        left = survivors({n: scores[n] for n in left}, 81, rung, 3, higher=True)
        assert left == list(range(80, 80 - number, -1))
    assert rung_step(100, 0, 3, 2) == 13, "rounded up"


def test_ties_and_missing_scores() -> None:
    scores = {3: 0.5, 1: 0.5, 2: None, 0: math.nan}
    assert survivors(scores, 4, 0, 2, higher=True) == [1, 3]
    assert survivors({0: 1.0, 1: 3.0, 2: 2.0}, 3, 0, 3, higher=False) == [0]
    assert survivors({0: None, 1: 1.0}, 2, 0, 2, higher=True) == [1]


def journal(run: RunDirectory, attempt: int, *rows: tuple[int, float]) -> None:
    run.tracking.mkdir(parents=True, exist_ok=True)
    lines = [{"t": 1.0, "kind": "metrics", "step": step, "values": {"knn/k3": value}} for step, value in rows]
    run.journal(attempt).write_text("".join(json.dumps(line) + "\n" for line in lines))


def record(members: int = 4, **values: object) -> Record:
    rule = Halving(metric="knn/k3", higher=True, eta=2, steps=(12,) * members)
    texts = tuple((f"a={n}", "b=1") for n in range(members))
    base = {"id": "0" * 12, "config": "c", "members": texts, "fingerprints": ("f",) * members, "halving": rule}
    return Record(**{**base, **values})  # type: ignore[arg-type]


def test_the_score_of_exactly_the_step_counts_and_decisions_are_kept(tmp_path: Path) -> None:
    sweep = create(tmp_path / "s", record())
    for number, value in enumerate((0.1, 0.4, 0.3, 0.2)):
        journal(sweep.run(number), 0, (2, 1.0 - value), (3, value), (4, 1.0 - value))
    journal(sweep.run(3), 1, (3, 0.9))  # a later attempt repeated the step
    first = sweep.compare(0)
    assert first.steps == {str(n): 3 for n in range(4)}
    assert first.scores == {"0": 0.1, "1": 0.4, "2": 0.3, "3": 0.9} and first.continued == (3, 1)
    assert sweep.left() == [1, 3]
    cut = sweep.stopped_at(0)
    assert isinstance(cut, Comparison) and cut.rung == 0 and sweep.stopped_at(1) is None
    with pytest.raises(ConfigError, match="no member has knn/k3 at its step"):
        sweep.compare(1)
    assert find(str(tmp_path / "s")).comparisons() == [first], "read again as it was written"


def test_another_sweep_in_the_directory_is_refused(tmp_path: Path) -> None:
    first = create(tmp_path / "s", record())
    assert create(tmp_path / "s", record(id="1" * 12)).record.id == first.record.id
    for changed, message in (
        (record(3), "other members"),
        (record(halving=None), "another rule"),
        (record(fingerprints=("f", "f", "g", "f")), r"the config has changed .*member 002"),
    ):
        with pytest.raises(ConfigError, match=message):
            create(tmp_path / "s", changed)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is not a sweep"):
        create(tmp_path / "other", record())
    with pytest.raises(ConfigError, match="is not a sweep"):
        find(str(tmp_path / "other"))


@pytest.mark.parametrize("content", ["[]", "{", '{"format": 1}', "null", '{"format": 2}'])
def test_a_damaged_record_is_one_message(tmp_path: Path, content: str) -> None:
    sweep = create(tmp_path / "s", record())
    (sweep.path / "sweep.json").write_text(content)
    with pytest.raises(ConfigError):
        find(str(sweep.path))
    (sweep.path / "sweep.json").write_text(sweep.record.model_dump_json())
    (sweep.path / "decisions.json").write_text(content)
    if content != "[]":
        with pytest.raises(ConfigError):
            Sweep(sweep.path, sweep.record).comparisons()
    row = {"rung": 0, "metric": "knn/k3", "steps": {"0": 1}, "scores": {"0": 0.5}, "continued": [0]}
    for changed in ({"steps": {}}, {"scores": {"1": 0.5}}, {"continued": [7]}):
        (sweep.path / "decisions.json").write_text(json.dumps([row | changed]))
        with pytest.raises(ConfigError):
            Sweep(sweep.path, sweep.record).comparisons()

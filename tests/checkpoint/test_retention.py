"""Which checkpoints stay, by rules that hold for any history of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.retention import Mark, Retention, read_best, write_best


def marks(*steps: int, scores: dict[int, float] | None = None) -> list[Mark]:
    return [
        Mark(f"step_{step:09d}", step, number, {"knn/k20": scores[step]} if scores and step in scores else {})
        for number, step in enumerate(steps, start=1)
    ]


def left(rule: Retention, have: list[Mark]) -> list[int]:
    gone = rule.superfluous(have)
    return [mark.step for mark in have if mark not in gone]


def test_the_last_are_kept_and_never_fewer_than_two() -> None:
    assert left(Retention(3), marks(1, 2, 3, 4, 5)) == [3, 4, 5]
    assert left(Retention(1), marks(1, 2, 3)) == [2, 3]


def test_the_first_in_each_stretch_is_kept_for_ever_though_no_checkpoint_hits_the_multiple() -> None:
    assert left(Retention(2, every=10), marks(3, 6, 9, 12, 15, 18, 21, 24, 27)) == [12, 21, 24, 27]
    assert left(Retention(2, every=10), marks(5, 10, 15, 20, 25, 30, 35, 40)) == [10, 20, 30, 35, 40]


def test_the_best_is_kept_and_of_equal_ones_the_first() -> None:
    have = marks(1, 2, 3, 4, 5, scores={1: 0.5, 2: 0.9, 3: 0.9, 5: float("nan")})
    assert left(Retention(2, best="knn/k20"), have) == [2, 4, 5]
    assert Retention(2, best="knn/k5").best_of(have) is None
    assert Retention(2).best_of(have) is None


def test_a_run_that_went_back_keeps_what_it_wrote_last_not_what_is_furthest() -> None:
    assert left(Retention(2), marks(60, 70, 3, 6)) == [3, 6]


def test_a_score_counts_only_at_the_step_it_was_measured() -> None:
    manifest = {"step": 12, "serial": 4, "scores": {"knn/k20": 0.8}}
    assert Mark.of("a", {**manifest, "scored": 12}).scores == {"knn/k20": 0.8}
    assert Mark.of("a", {**manifest, "scored": 10}).scores == {}
    assert Mark.of("a", {"step": 12, "scores": {}}).serial == 0


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=30, unique=True),
    st.integers(1, 5),
    st.integers(0, 50),
    st.dictionaries(st.integers(1, 200), st.floats(0, 1)),
)
def test_pruning_at_every_checkpoint_leaves_what_the_rule_promises(
    steps: list[int], last: int, every: int, scores: dict[int, float]
) -> None:
    rule, have = Retention(last, every, "knn/k20"), []
    for mark in marks(*sorted(steps), scores=scores):
        have.append(mark)
        gone = rule.superfluous(have)
        have = [one for one in have if one not in gone]
    ordered = sorted(steps)
    assert {mark.step for mark in have} >= set(ordered[-max(last, 2) :])
    scored = [step for step in ordered if step in scores]
    if scored:
        assert max(scores[step] for step in scored) in {mark.scores.get("knn/k20") for mark in have}
    if every:
        windows = {step // every for step in ordered if step >= every}
        assert windows <= {mark.step // every for mark in have}
    else:
        assert len(have) <= max(last, 2) + 1


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_best_json_is_replaced_whole_and_its_absence_or_damage_is_no_fault(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "best.json").write_text(text)
    assert read_best(tmp_path) == {}
    write_best(tmp_path, "knn/k20", marks(7, scores={7: 0.25})[0])
    assert read_best(tmp_path) == {"checkpoint": "step_000000007", "step": 7, "metric": "knn/k20", "score": 0.25}
    assert json.loads((tmp_path / "best.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["best.json"]


def test_a_score_that_was_measured_earlier_is_not_this_checkpoints() -> None:
    manifest = {"step": 2, "scored": 2, "scores": {"knn/k10": 0.4, "linear/top1": 0.9}, "judged": ["knn/k10"]}
    assert Mark.of("two", manifest).scores == {"knn/k10": 0.4}
    assert Mark.of("two", {**manifest, "step": 3}).scores == {}

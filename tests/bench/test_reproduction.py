"""The ledger of results: what identifies a config, when two results agree, and the headers that repeat it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from pipeline.bench.reproduction import headers, ledger
from pipeline.bench.reproduction.agreement import compare, interval, quantile
from pipeline.bench.reproduction.ledger import Entry, config_hash, main_metric, record, result_of
from pipeline.config.load import available, load
from pipeline.errors import ConfigError, DataError

NAME = "simclr/cifar10_small"


def entry(values: list[float], **changes: Any) -> Entry:
    seeds = [
        {
            "seed": seed,
            "samples": 1280,
            "minutes": 2.0 + seed,
            "cpu_minutes": 1.5,
            "commits": ["commit 1"],
            "scores": {"knn/k20": value, "baseline/random_init/knn/k20": 0.3, "baseline/pixels/knn/k20": 0.2},
        }
        for seed, value in enumerate(values)
    ]
    about = {
        "id": "a",
        "config": NAME,
        "config_hash": "0",
        "metric": "knn/k20",
        "data_fingerprint": "f",
        "data_samples": 100,
        "date": "2026-11-30",
        "versions": {"torch": "2"},
        "machine": {"processor": "a processor", "cores": "2", "system": "Linux"},
        "ranks": 1,
        "seeds": seeds,
    }
    return Entry.model_validate({**about, **changes})


@pytest.mark.parametrize(
    "same", [["data.shards=/a/b.tar"], ["run.seed=3", "run.name=x"], ["launch.num_processes=2", "data.num_workers=3"], []]
)
def test_paths_names_and_the_seed_leave_the_hash_alone(same: list[str]) -> None:
    assert config_hash(load(NAME, same).config) == config_hash(load(NAME).config)


@pytest.mark.parametrize(
    "other", ["schedule.lr.peak=1e-3", "train.duration=7 epochs", "evaluation.knn.max_train=100", "model.stem=small"]
)
def test_what_is_computed_or_evaluated_changes_the_hash(other: str) -> None:
    assert config_hash(load(NAME, [other]).config) != config_hash(load(NAME).config)


def test_a_setting_at_its_default_is_not_in_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before, whole = config_hash(load(NAME).config), ledger.flatten
    monkeypatch.setattr(ledger, "flatten", lambda config: {**whole(config), "evaluation.new": 1})
    assert config_hash(load(NAME).config) == before


def test_the_metric_is_knn_with_most_neighbours() -> None:
    assert main_metric(load(NAME, ["evaluation.knn.k=[10, 20, 5]"]).config) == "knn/k20"
    with pytest.raises(ConfigError, match="evaluates nothing"):
        main_metric(load(NAME, ["evaluation.knn.enabled=false"]).config)


def test_intervals_are_students() -> None:
    for degrees in range(1, 31):
        assert quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)
    values = [0.48, 0.47, 0.5]
    low, high = stats.t.interval(0.95, 2, statistics.fmean(values), stats.sem(values))
    ours = interval(values)
    assert ours.half is not None
    assert (ours.mean - ours.half, ours.mean + ours.half) == pytest.approx((low, high), abs=1e-4)
    assert interval([0.4]).half is None and interval([0.4]).percent() == "40.0 %"


@pytest.mark.parametrize("shift", [0.0, 0.01, -0.01, 0.05, -0.05])
def test_two_results_differ_if_students_test_says_so(shift: float) -> None:
    old, new = [0.48, 0.47, 0.49], [0.485 + shift, 0.475 + shift, 0.47 + shift]
    chance = stats.ttest_ind(new, old).pvalue > 0.05
    expected = "reproduced" if chance else "better" if shift > 0 else "worse"
    assert compare(entry(new), entry(old)) == expected


def test_a_single_seed_is_compared_with_the_spread_of_the_record() -> None:
    record_ = entry([0.48, 0.47, 0.49])
    assert compare(entry([0.475]), record_) == "reproduced" and compare(entry([0.4]), record_) == "worse"
    assert compare(entry([0.475]), entry([0.48])) == "undecided"
    assert compare(entry([0.475]), entry([0.475])) == "reproduced"


def test_nothing_is_compared_without_a_record_or_with_other_data() -> None:
    assert compare(entry([0.1]), None) == "recorded"
    assert compare(entry([0.1, 0.1], data_fingerprint="other"), entry([0.5, 0.5])) == "other data"


def test_the_first_line_of_a_config_is_its_record_and_an_id_is_added_once(tmp_path: Path) -> None:
    file = tmp_path / "new" / "ledger.jsonl"
    assert ledger.read(file) == []
    lines = [entry([0.4], id="a", config_hash="old"), entry([0.5], id="b"), entry([0.6], id="c"), entry([0.7], id="b")]
    assert [ledger.append(file, one) for one in lines] == [True, True, True, False]
    entries = ledger.read(file)
    assert [one.id for one in entries] == ["a", "b", "c"]
    assert record(entries, NAME, "0") == entries[1] and record(entries, NAME, "old") == entries[0]
    assert record(entries, "other", "0") is None


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', "NaN"])
def test_a_line_that_is_not_a_result_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "ledger.jsonl"
    ledger.append(file, entry([0.5]))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"ledger\.jsonl:2: is not a result"):
        ledger.read(file)


def test_only_a_finished_run_has_a_result() -> None:
    outcome = {"samples_seen": 128, "seconds": 90.0, "scores": {"knn/k20": 0.5}}
    assert result_of(outcome, seed=1).minutes == 1.5
    with pytest.raises(DataError, match="no result"):
        result_of({"seconds": 90.0}, seed=1)


def test_a_header_states_mean_interval_seeds_baselines_and_cost() -> None:
    reached, cost = (" ".join(part.split()) for part in "\n".join(headers.lines(entry([0.48, 0.47, 0.49]))).split("#   cost"))
    assert "k-NN (k=20) 48.0 ± 2.5 % after 1,280 samples" in reached.replace("# ", "")
    assert "three seeds: 48.0, 47.0, 49.0" in reached.replace("# ", "")
    assert "untrained 30.0 %" in reached.replace("# ", "") and "raw pixels 20.0 %" in reached.replace("# ", "")
    assert "3 minutes a seed, 2 CPU minutes (one rank on 2 shared cores, a processor)" in cost
    text = "# What.\n#\n#   command   x\n#   reached   old\n#             and more\n#   cost      old\n#   source    y\nbase: a\n"
    new = headers.updated(text, entry([0.5]))
    assert new.split("\n")[:3] == text.split("\n")[:3] and new.endswith("#   source    y\nbase: a\n") and "old" not in new
    assert headers.updated(new, entry([0.5])) == new


def test_the_headers_of_shipped_configs_are_those_of_the_ledger() -> None:
    entries = ledger.read(ledger.default_file())
    for _, file, one in headers.records(entries):
        text = file.read_text(encoding="utf-8")
        assert headers.updated(text, one) == text, "run `fovea reproduce --headers`"
    current = {(name, one.config_hash) for name, _, one in headers.records(entries)}
    for one in entries:
        assert one.config not in available() or (one.config, one.config_hash) in current, (
            f"{one.config} has changed since it was recorded: repeat it, or remove its lines"
        )

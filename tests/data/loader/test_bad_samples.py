"""The account of bad samples: a budget over the last samples, and a state that survives a checkpoint."""

from __future__ import annotations

import json

import pytest

from pipeline.data.loader.bad_samples import BadSamples, Event
from pipeline.errors import TrainingError


def events(n: int) -> list[Event]:
    return [Event(0, number, f"key{number}", "a.tar", "corrupt", -1) for number in range(n)]


def test_the_budget_is_a_share_of_the_last_samples() -> None:
    bad_samples = BadSamples(None, budget=0.1, window=100)
    for _ in range(50):
        bad_samples.saw(10, events(1))
    with pytest.raises(TrainingError, match="11 of the last 100"):
        bad_samples.saw(10, events(2))


def test_old_losses_are_forgiven() -> None:
    bad_samples = BadSamples(None, budget=0.1, window=100)
    for _ in range(20):
        bad_samples.saw(50, events(5))
        bad_samples.saw(50, events(5))
        for _ in range(2):
            bad_samples.saw(50)
    assert bad_samples.reasons == {"corrupt": 200}
    assert bad_samples.seen == 4000


def test_a_budget_of_nothing_and_of_everything() -> None:
    with pytest.raises(TrainingError, match="1 of the last 8"):
        BadSamples(None, budget=0.0).saw(8, events(1))
    bad_samples = BadSamples(None, budget=1.0, window=100)
    for _ in range(30):
        bad_samples.saw(64, events(64))
    assert bad_samples.seen == sum(bad_samples.reasons.values()) == 30 * 64


def test_its_state_goes_through_json() -> None:
    first, second = BadSamples(None, budget=1.0), BadSamples(None)
    first.saw(8, events(3))
    second.load(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert second.quarantine == {0: "corrupt", 1: "corrupt", 2: "corrupt"}


def test_each_checkpoint_is_told_only_what_is_new() -> None:
    samples = BadSamples(None, budget=1.0)
    samples.saw(4, events(2))
    assert samples.changes()["quarantine"] == {0: "corrupt", 1: "corrupt"}
    samples.saw(4, events(3)[2:])
    assert samples.changes() == {"seen": 8, "reasons": {"corrupt": 3}, "counts": {}, "quarantine": {2: "corrupt"}}
    assert samples.changes()["quarantine"] == {} and len(samples.quarantine) == 3
    samples.saw(4, events(4)[3:])
    samples.load({"seen": 8, "reasons": {}, "quarantine": {"7": "corrupt"}})
    assert samples.changes()["quarantine"] == {} and samples.of_all_ranks == {7: "corrupt"}


def test_what_is_remembered_is_bounded_and_what_is_counted_is_not() -> None:
    samples = BadSamples(None, budget=1.0, excluded=[100], known=5)
    samples.saw(16, events(8))
    assert samples.quarantine == {100: "excluded", **dict.fromkeys(range(4), "corrupt")} and samples.reasons == {"corrupt": 8}
    samples.saw(16, [events(4)[3], events(7)[6]])
    assert len(samples.quarantine) == 5 and samples.reasons == {"corrupt": 10}
    samples.merge(dict.fromkeys(range(3), "corrupt"))
    samples.merge(dict.fromkeys((0, 1, *range(10, 20)), "corrupt"))
    assert list(samples.of_all_ranks) == [0, 1, 2, 10, 11]
    samples.load({"seen": 1, "reasons": {}, "quarantine": dict.fromkeys(map(str, range(50)), "corrupt")})
    assert set(samples.quarantine) == {0, 1, 2, 3, 4, 100}, "what a user excluded always is"

"""The simulated job of many ranks: what it trains on, saves and resumes is right, and the first rank alone gathers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pipeline.bench.large_job import Options, Result, Start, Started, _probe, markdown, measure
from pipeline.data.pack import synthetic
from pipeline.errors import ConfigError
from tests.helpers.limits import hang_limit


@pytest.fixture(scope="module")
def result() -> Result:
    return measure(Options((16,), (), 2, 48, 2), log=lambda _: None)


@pytest.mark.slow
def test_sixteen_ranks_start_and_twelve_resume(result: Result) -> None:
    first, second = result.starts
    assert (first.world, second.world, first.resumed, second.resumed) == (16, 12, False, True)
    assert first.right and second.right, "the ranks read other batches than the order's"
    assert (first.quarantine, first.seen, second.seen) == (16, 96, 192)
    assert 16 < second.quarantine <= 16 + 12
    assert first.wrong == second.wrong == 0, "weights that were not restored"
    assert first.streams == second.streams == 16, "which 12 ranks share"


@pytest.mark.slow
def test_the_first_rank_alone_receives_what_all_have_to_save(result: Result) -> None:
    for one in result.starts:
        costs = one.phases["checkpoint"]
        assert costs["others"]["received"] < 0.7 * costs["first"]["received"]
    resume = result.starts[1].phases["resume"]
    assert resume["others"]["opened"] <= 8, "each rank opens what it needs of the checkpoint, and its manifest"


@pytest.mark.slow
def test_the_page_has_each_phase_and_what_came_out(result: Result) -> None:
    text = markdown(result, Options((16,)), {"cores": "2"}, "fovea bench large-job")
    for phase in ("rendezvous", "index and order", "steps", "checkpoint"):
        assert f"## Start: {phase}" in text and f"## Resume on three quarters of the ranks: {phase}" in text
    assert "| resumed on 12 | equal | 0 |" in text


def test_a_start_that_takes_too_long_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the start on 5 ranks did not end within 0\.1 s"):
        _probe(Start(f"{tmp_path}/none", 5, 1, 10, 1), limit=0.1)


def test_growth_is_shown_by_its_exponent() -> None:
    costs = dict.fromkeys(("sent", "received", "messages_in", "messages_out", "opened"), 1.0)

    def started(world: int, mesh: bool) -> Started:
        rows = {"first": {**costs, "sent": world**2.0}, "others": {**costs, "sent": 2.0 * world}}
        return Started(world, False, {"rendezvous": rows, "steps": rows}, True, 0, 0, 0, world, mesh)

    text = markdown(Result([started(n, mesh) for n in (8, 64) for mesh in (False, True)]), Options(), {}, "c")
    assert text.count("| exponent | 2.00 | | | | | 1.00 |") == 3
    assert "## Start where gloo connects each rank with each: rendezvous" in text


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_start_of_all(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "data", train=256, val=16, size=16, seed=0, samples_per_shard=256)
    with socket.create_server(("127.0.0.1", 0)) as taken, hang_limit(600):  # half of the ranks' own timeout
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=r"the start on 3 ranks failed \(rank 0 of 3: .*port"):
            _probe(Start(str(tmp_path), 3, 1, 24, port))


@pytest.mark.slow
def test_a_start_that_fails_is_named(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=r"the start on 5 ranks failed .*no shard matches"):
        _probe(Start(f"{tmp_path}/none", 5, 1, 10, 1))

"""Requests to stop: noted by handlers, decided by all ranks together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.runtime.stop_requests import Stop, StopRequests
from tests.helpers.rank_pool import pool


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    names = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {name: signal.getsignal(name) for name in names}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may be under nohup
    heard = StopRequests()
    heard.listen()
    yield heard
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_noted_and_nothing_else_happens(requests: StopRequests, name: str) -> None:
    assert requests.requested is Stop.NO
    os.kill(os.getpid(), getattr(signal, name))
    assert requests.requested is Stop[name]


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    try:
        StopRequests().listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in {**others, signal.SIGHUP: before}.items():
            signal.signal(number, handler)


def test_the_strongest_of_several_stays(requests: StopRequests) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert requests.requested is Stop.SIGTERM


def _ask(asked: dict[int, str]) -> list[str]:
    requests = StopRequests()
    answers = [requests.agreed(None).name]
    requests.requested = Stop[asked.get(dist.get_rank(), "NO")]
    answers.append(requests.agreed(None).name)
    return answers


@pytest.mark.parametrize(
    ("asked", "answer"),
    [({}, "NO"), ({0: "SIGUSR1"}, "SIGUSR1"), ({1: "SIGTERM"}, "SIGTERM"), ({0: "SIGUSR2", 1: "SIGUSR1"}, "SIGUSR2")],
)
def test_all_ranks_do_what_any_of_them_was_asked(asked: dict[int, str], answer: str) -> None:
    assert pool(2).run(_ask, asked=asked) == [["NO", answer]] * 2


def _read_files(folder: str, names: list[str]) -> list[object]:
    requests = StopRequests()
    if dist.get_rank() == 0:
        requests.watch(Path(folder), attempt=3)
        for name in names:
            (Path(folder) / name).write_text("{}")
    dist.barrier()
    first = requests.agreed(None).name
    saves = requests.save
    requests.agreed(None)  # at once: nobody looks again within a second
    return [first, saves, requests.save, sorted(path.name for path in Path(folder).iterdir())]


@pytest.mark.parametrize(
    ("names", "stop", "saves", "left"),
    [
        ([], "NO", False, []),
        (["stop"], "USER_REQUEST", False, ["stop"]),
        (["stop-3"], "PREEMPTED", False, ["stop-3"]),
        (["stop-2"], "NO", False, ["stop-2"]),
        (["stop", "stop-3"], "USER_REQUEST", False, ["stop", "stop-3"]),
        (["save"], "NO", True, []),
    ],
)
def test_files_are_requests_that_one_rank_reads_and_all_heed(
    tmp_path: Path, names: list[str], stop: str, saves: bool, left: list[str]
) -> None:
    assert pool(2).run(_read_files, folder=str(tmp_path), names=names) == [[stop, saves, False, left]] * 2

"""Requests to stop: noted by handlers, decided by all ranks together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from pipeline.training.control import Stop, StopRequests
from tests.pool import pool


@pytest.fixture
def requests() -> Iterator[StopRequests]:
    names = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = {name: signal.getsignal(name) for name in names}
    heard = StopRequests()
    heard.listen()
    yield heard
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_signal_is_noted_and_nothing_else_happens(requests: StopRequests, name: str) -> None:
    assert requests.asked is Stop.NO
    os.kill(os.getpid(), getattr(signal, name))
    assert requests.asked is Stop[name]


def test_the_strongest_of_several_stays(requests: StopRequests) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert requests.asked is Stop.SIGTERM


def _ask(asked: dict[int, str]) -> list[str]:
    requests = StopRequests()
    answers = [requests.agreed(None).name]
    requests.asked = Stop[asked.get(dist.get_rank(), "NO")]
    answers.append(requests.agreed(None).name)
    return answers


@pytest.mark.parametrize(
    ("asked", "answer"),
    [({}, "NO"), ({0: "SIGUSR1"}, "SIGUSR1"), ({1: "SIGTERM"}, "SIGTERM"), ({0: "SIGUSR2", 1: "SIGUSR1"}, "SIGUSR2")],
)
def test_all_ranks_do_what_any_of_them_was_asked(asked: dict[int, str], answer: str) -> None:
    assert pool(2).run(_ask, asked=asked) == [["NO", answer]] * 2

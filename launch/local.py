"""Starts and monitors ranks on this host, and leaves no process behind.

Rank 0 writes to the terminal, every other rank to ``<log_directory>/rank-<n>.log``. SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2
are forwarded to every rank, and the launcher waits for the ranks to exit; the third SIGINT (Ctrl-C) kills them. When a rank
fails, the others get ``grace`` seconds to exit by themselves, then SIGTERM, then SIGKILL. The kernel kills the ranks if this
process dies, even by SIGKILL: each rank requests that first. Does not import torch.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from launch.forked import ForkedRank, RankServer, ServerGone
from launch.rank_environment import RankEnvironment
from pipeline.errors import LaunchError
from pipeline.masking import printable
from pipeline.runtime.interpreter import module_argv, safe_environment

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Start of every rank: die with the launcher (PR_SET_PDEATHSIG = 1), then exec the program in the same process. If the launcher
# died before the request took effect, the child already has another parent.
_HEAD = (
    "import ctypes, os, sys\n"
    "if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0) or os.getppid() != int(sys.argv[1]): os._exit(143)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes] | ForkedRank
    log: Path | None
    code: int | None = None


def tied(argv: Sequence[str]) -> list[str]:
    """The command line that runs a program which the kernel kills when this process dies, even by SIGKILL."""
    return [sys.executable, "-I", "-S", "-c", _HEAD, str(os.getpid()), *argv]


def free_port() -> int:
    """A free TCP port above the kernel's range for outgoing connections.

    Raises:
        LaunchError: none could be bound.
    """
    for port in random.SystemRandom().sample(range(61001, 65536), 200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LaunchError(
        "no free TCP port between 61001 and 65535", where="127.0.0.1", hint="End a process that listens on one of these ports"
    )


def start(
    argv_of_rank: Sequence[str],
    ranks: int,
    *,
    log_directory: Path,
    environment: Mapping[str, str] | None = None,
    threads: int | None = None,
    grace: float = 10.0,
    kill_on_signal: bool = False,
    server: RankServer | None = None,
    received: list[int] | None = None,
) -> int:
    """Run ``ranks`` copies of a program and return when all have exited.

    Args:
        argv_of_rank: the program and its arguments, the same for all ranks; usually starts with ``sys.executable``.
        ranks: number of processes.
        log_directory: created if necessary; ``rank-<n>.log`` of every rank but 0 is appended to there.
        environment: the ranks' environment (default: this process's); each rank's own variables are added.
        threads: compute threads per rank (``OMP_NUM_THREADS``); by default the cores are divided among the ranks, unless the
            variable is set.
        grace: seconds that the other ranks get to exit after one failed, and again after SIGTERM.
        kill_on_signal: give the other ranks no time after one was ended by a signal.
        server: forks the ranks; if there is none, or it cannot be used, they are started without it.
        received: the signals that were forwarded are added to it; those that it holds already are forwarded first.

    Returns:
        0 if every rank returned 0; else the code of the rank that failed first, 128 + n if it was ended by signal n.

    Raises:
        LaunchError: the program cannot be started.
    """
    if ranks < 1:
        raise LaunchError(f"cannot start {ranks} ranks", where="launch.num_processes", hint="Set it to 1 or more")
    base = common_environment(ranks, environment, threads)
    if shutil.which(argv_of_rank[0]) is None:
        raise LaunchError(
            "the ranks' program cannot be run", where=argv_of_rank[0], hint="Check that it is installed and executable"
        )
    port, key = free_port(), secrets.token_hex(8)
    log_directory.mkdir(parents=True, exist_ok=True)
    started: list[_Rank] = []
    with _forwarding(started, received if received is not None else []) as forward:
        try:
            for number in range(ranks):
                rank_environment = RankEnvironment(number, ranks, number, ranks, "127.0.0.1", port, "torchrun", key)
                log = log_directory / f"rank-{number}.log" if number else None
                started.append(_spawn(argv_of_rank, number, base | rank_environment.variables(), log, server))
            forward()
            return _wait(started, grace, kill_on_signal=kill_on_signal)
        finally:
            for rank in started:
                if rank.process.poll() is None:
                    rank.process.kill()
                rank.process.wait()


def common_environment(ranks: int, environment: Mapping[str, str] | None = None, threads: int | None = None) -> dict[str, str]:
    """The variables of all ranks, without those of each; arguments as for :func:`start`."""
    base = safe_environment(environment)
    base.setdefault("OMP_NUM_THREADS", str(threads or max(1, _cores() // ranks)))
    if threads is not None:
        base["OMP_NUM_THREADS"] = str(threads)
    return base


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _spawn(
    argv: Sequence[str], number: int, environment: Mapping[str, str], log: Path | None, server: RankServer | None
) -> _Rank:
    sink: IO[bytes] | None = log.open("ab", buffering=0) if log is not None else None
    command = tied(argv)
    try:
        if server is not None and (module := module_argv(argv)):
            with contextlib.suppress(ServerGone):
                return _Rank(number, server.start(module, environment, sink), log)
        # A separate session: Ctrl-C in the terminal reaches only the launcher, which forwards it once.
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT if sink is not None else None,
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchError(f"rank {number} cannot be started: {error.strerror}", hint="Start fewer ranks") from error
    finally:
        if sink is not None:
            sink.close()
    return _Rank(number, process, log)


@contextlib.contextmanager
def _forwarding(ranks: list[_Rank], received: list[int]) -> Iterator[Callable[[], None]]:
    """Forward signals to the ranks within the context; signals are queued until the yielded function is called."""
    seen: Counter[int] = Counter()
    complete = False

    def send(number: int) -> None:
        seen[number] += 1
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.process.send_signal(signal.SIGKILL if seen[signal.SIGINT] > 2 else number)

    def forward(number: int, frame: FrameType | None) -> None:
        if complete:
            received.append(number)
            send(number)
        else:
            _note(received, number)

    def begin() -> None:
        nonlocal complete
        complete = True
        for number in tuple(received):
            send(number)

    with _handled(forward):
        yield begin


def _note(received: list[int], number: int) -> None:
    """Note a signal while there is no rank to send it to; the third SIGINT ends this process."""
    received.append(number)
    if number == signal.SIGINT and received.count(number) > 2:
        raise KeyboardInterrupt


@contextlib.contextmanager
def noted(received: list[int]) -> Iterator[None]:
    """Add the signals that :func:`start` forwards to a list within the context, instead of ending this process.

    Raises:
        KeyboardInterrupt: by the third SIGINT, at any place.
    """
    with _handled(lambda number, frame: _note(received, number)):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that are forwarded; only the main thread can, in others they are left as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # An ignored SIGHUP stays ignored, here and in the ranks: with nohup the run continues without its terminal.
    heeded = [n for n in FORWARDED if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _wait(ranks: list[_Rank], grace: float, *, kill_on_signal: bool) -> int:
    first: _Rank | None = None
    deadline, strength = float("inf"), 0
    while any(rank.code is None for rank in ranks):
        for rank in ranks:
            if rank.code is None and (code := rank.process.poll()) is not None:
                rank.code = code if code >= 0 else 128 - code
                if rank.code and first is None:
                    first, deadline = rank, time.monotonic() + grace
                    if kill_on_signal and code < 0:
                        deadline, strength = time.monotonic(), 1
        if time.monotonic() >= deadline:
            strength, deadline = strength + 1, time.monotonic() + grace
            for rank in ranks:
                if rank.code is None:
                    rank.process.send_signal(signal.SIGTERM if strength == 1 else signal.SIGKILL)
        time.sleep(0.02)
    if first is None:
        return 0
    _report(first, len(ranks))
    return first.code or 1


def _report(rank: _Rank, ranks: int, lines: int = 20) -> None:
    code = rank.code or 0
    ended = f"was ended by {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else f"ended with code {code}"
    print(f"fovea: rank {rank.number} of {ranks} {ended}", file=sys.stderr, end="")
    if rank.log is None:
        print("; its messages are above.", file=sys.stderr, flush=True)
        return
    tail = _tail(rank.log, lines)
    print(f"; the end of {rank.log}:" if tail else f"; {rank.log} is empty.", file=sys.stderr)
    print("".join(f"  | {printable(line)}\n" for line in tail), file=sys.stderr, end="", flush=True)


def _tail(log: Path, lines: int) -> list[str]:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65536))
        return file.read().decode(errors="replace").splitlines()[-lines:]

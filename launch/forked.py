"""Ranks forked from a process that has imported everything (:mod:`launch.rank_server`), as the launcher sees them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO

from launch.rank_server import LENGTH
from pipeline.runtime.interpreter import module_command

_PATIENCE = 600.0  # seconds that the imports may take


class ServerGone(Exception):
    """The server cannot be used: it did not start, or has ended."""


class ForkedRank:
    """One rank, with the part of :class:`subprocess.Popen` that the launcher uses."""

    def __init__(self, server: RankServer, number: int, pid: int) -> None:
        self.pid, self._number, self._server = pid, number, server

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, or ``None`` while it runs."""
        return self._server.code(self._number)

    def wait(self) -> int:
        """Waits for its end; returns the exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it is known to have ended; reads nothing, since it is called by handlers of signals."""
        if not self._server.ended(self._number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it."""
        self.send_signal(signal.SIGKILL)


class RankServer:
    """Starts the server; it imports while the caller goes on, until the first rank is asked for.

    Args:
        tied: what stands before a program's command line to have the kernel kill it with this process.
        environment: the environment under which it imports: that of the ranks, but for their own variables.
        compiling: number of ranks that compile blocks and share the cores of this host for that; 0 if none does.
    """

    def __init__(self, tied: Sequence[str], environment: Mapping[str, str], compiling: int = 0) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*tied, *module_command("launch.rank_server", str(theirs.fileno()), str(compiling))]
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        ours.setblocking(False)  # a signal's handler may read what was seen to be there
        self._connection, self._text, self._ready = ours, b"", False
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        self._requests = 0

    def start(self, argv: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None) -> ForkedRank:
        """Forks a rank.

        Args:
            argv: module and arguments.
            environment: its environment.
            log: for its output; this process's streams if ``None``.

        Raises:
            ServerGone: the server cannot be used.
        """
        ignored = [number for number in range(1, 32) if signal.getsignal(number) == signal.SIG_IGN]
        self._requests += 1
        number = self._requests
        request = {"number": number, "argv": list(argv), "environment": dict(environment), "ignored": ignored}
        body = json.dumps(request).encode()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        streams = [log.fileno(), log.fileno()] if log is not None else [1, 2]
        try:
            while not self._ready:
                self._read(_PATIENCE)
            self._connection.setblocking(True)
            try:
                socket.send_fds(self._connection, [LENGTH.pack(len(body))], streams)
                self._connection.sendall(body)
            finally:
                self._connection.setblocking(False)
            while number not in self._pids:
                self._read(_PATIENCE)
        except (OSError, ServerGone) as error:
            self.close()  # it must not fork the rank after all
            raise ServerGone(str(error)) from error
        return ForkedRank(self, number, self._pids[number])

    def code(self, number: int) -> int | None:
        """The exit code of a rank, ``None`` while it runs; that of SIGKILL if the server is gone, which takes its ranks along."""
        try:
            while self._read(0.0):
                pass
        except ServerGone:
            return self._codes.get(number, -signal.SIGKILL)
        return self._codes.get(number)

    def ended(self, number: int) -> bool:
        """Whether it is known already that a rank has ended."""
        return number in self._codes

    def close(self) -> None:
        """Ends the server, and ranks that still run with it."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _read(self, seconds: float) -> bool:
        """Takes what the server says within some seconds; whether it said something.

        Raises:
            ServerGone: it has ended, or says nothing although more than no time was given.
        """
        if self._connection.fileno() < 0:  # closed after it had failed
            raise ServerGone("it has ended")
        ready, _, _ = select.select([self._connection], [], [], seconds)
        if not ready:
            if seconds:
                raise ServerGone(f"nothing was heard for {seconds:.0f} s")
            return False
        try:
            part = self._connection.recv(65536)
        except BlockingIOError:
            return True
        except OSError as error:
            raise ServerGone(str(error)) from error
        if not part:
            raise ServerGone("it has ended")
        *lines, self._text = (self._text + part).split(b"\n")
        for line in lines:
            row = json.loads(line)
            self._ready = self._ready or "ready" in row
            if "started" in row:
                self._pids[row["started"]] = row["pid"]
            if "ended" in row:
                self._codes[row["ended"]] = row["code"]
        return True

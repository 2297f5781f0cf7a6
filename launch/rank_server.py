"""A process that has imported what a rank imports, and forks a rank for each request: ``python -m launch.rank_server SOCKET``.

Importing takes longer than all else of a start. The process computes nothing and never touches a GPU, since a fork could not use
one after that; it ends with the launcher that holds the other end of the socket. Client: :mod:`launch.forked`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
import tempfile
import traceback
from typing import Any, NoReturn

from pipeline.config.paths import user_name
from pipeline.runtime.compile_cache import use_compile_cache
from pipeline.runtime.interpreter import exit_code

# Signals that a launcher forwards: sent to all processes of a service or job, they must not end this one, whose ranks would die.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ALL = frozenset(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
# Chosen for this process alone, or chosen by imports where a rank checks for itself what is safe.
_OWN = ("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")
_IMPORTED = (
    "launch.rank_main",
    "pipeline.training.build",
    "pipeline.evaluation.runner",
    "pipeline.data.augment.dali",
    "pipeline.data.augment.decode",
)
LENGTH = struct.Struct("=I")


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes, or none if the other end is closed."""
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)


def main() -> None:
    """Import, say so, and serve until the launcher is gone."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    before = dict(os.environ)
    if compiling := int(sys.argv[2]):
        use_compile_cache(user_name(), compiling)  # read when torch is imported
    chosen = {name: value for name, value in os.environ.items() if before.get(name) != value}
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counts GPUs without opening them
    gc.disable()  # what is imported stays: looking for garbage meanwhile takes a tenth of the time and more
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.enable()
    added = chosen | {n: value for n, value in os.environ.items() if before.get(n) != value and n not in _OWN}
    gc.collect()
    gc.freeze()
    connection = socket.socket(fileno=int(sys.argv[1]))
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    connection.sendall(json.dumps({"ready": os.getpid()}).encode() + b"\n")
    numbers: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([connection.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _tell_ended(connection, numbers)
        if connection.fileno() in ready:
            head, streams, _, _ = socket.recv_fds(connection, LENGTH.size, 2)
            if len(head) < LENGTH.size:
                os._exit(0)
            request = json.loads(receive(connection, LENGTH.unpack(head)[0]))
            server = os.getpid()
            signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)  # until the fork has handlers of its own
            pid = os.fork()
            if pid == 0:
                connection.close()
                os.close(wake)
                os.close(waker)
                _become(request, streams, added, server)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ALL)
            for stream in streams:
                os.close(stream)
            numbers[pid] = request["number"]
            connection.sendall(json.dumps({"started": request["number"], "pid": pid}).encode() + b"\n")


def _tell_ended(connection: socket.socket, numbers: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if (number := numbers.pop(pid, None)) is not None:
            code = os.waitstatus_to_exitcode(status)
            connection.sendall(json.dumps({"ended": number, "code": code}).encode() + b"\n")


def _become(request: dict[str, Any], streams: list[int], added: dict[str, str], server: int) -> NoReturn:
    """In the fork: be the rank that was asked for."""
    code = 1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(1, signal.SIGKILL, 0, 0, 0) or os.getppid() != server:
            os._exit(143)
        os.setsid()
        signal.set_wakeup_fd(-1)
        ignored = set(request["ignored"])
        for number in _ALL:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        if signal.SIGINT not in ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as the interpreter itself does
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ALL)
        for target, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
            os.dup2(stream, target)
            os.close(stream)
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(added | request["environment"])
        libc.prctl(15, f"fovea-rank-{os.environ.get('RANK', '')}".encode(), 0, 0, 0)  # what ps shows
        tempfile.tempdir = None
        random.seed()
        name, *arguments = request["argv"]
        sys.argv[1:] = arguments
        sys.modules.pop(name, None)
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = exit_code(stop)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
